//! `conclave placement show`: who holds what in a cluster, as tables or JSON. With `--rows` each worker is asked what it
//! computed. Nothing is changed, neither in the store nor in a worker.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use conclave_placement::{Cluster, ClusterState, ExpertId, LayerIdx, WorkerRecord, WorkerState};
use conclave_proto::expert::v1 as pb;
use conclave_proto::expert::v1::expert_worker_client::ExpertWorkerClient;
use conclave_runtime::channel;
use futures::future;
use serde::Serialize;

use super::load::{self, LayerLoad};
use super::place::{Found, Where};
use crate::client;
use crate::terminal::{self, Output};
use crate::up::ready::reachable;

/// How long a worker may take to say what it computed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Who holds what.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave placement show
  conclave placement show --ready-file /tmp/ready.json --rows
  conclave placement show --store etcd=http://127.0.0.1:2379 --cluster production --json")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Where,
    /// Ask each worker how many rows it has computed.
    #[arg(long)]
    rows: bool,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Found { cluster, state, .. } = args.place.find().await?;
    let rows = if args.rows { ask_all(&state).await } else { BTreeMap::new() };
    let report = Report::of(&cluster, &state, &rows);
    let mut output = Output::stdout();
    if args.json {
        output.line(&serde_json::to_string_pretty(&report)?)?;
    } else {
        output.text(&report.text(args.rows))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What each worker says it computed, by id: rows, or why it did not say.
async fn ask_all(state: &ClusterState) -> BTreeMap<String, Result<u64, String>> {
    let asked = state.workers.values().map(|worker| async move {
        let answer = match tokio::time::timeout(TIMEOUT, ask(worker)).await {
            Ok(answer) => answer.map_err(|error| format!("{error:#}")),
            Err(_) => Err("no answer".to_owned()),
        };
        (worker.id.to_string(), answer)
    });
    future::join_all(asked).await.into_iter().collect()
}

async fn ask(worker: &WorkerRecord) -> anyhow::Result<u64> {
    let connection = channel::internal(&reachable(&worker.address))?.connect().await?;
    let mut client = ExpertWorkerClient::new(connection).max_decoding_message_size(channel::MAX_INTERNAL_MESSAGE);
    match client.get_inventory(pb::GetInventoryRequest {}).await {
        Ok(response) => Ok(response.into_inner().rows_total),
        Err(status) => bail!("{}", client::sentence(&status)),
    }
}

/// What is printed; the keys are a contract with scripts.
#[derive(Debug, Serialize)]
struct Report {
    cluster: String,
    model: Option<String>,
    plan: Option<PlanReport>,
    leader: Option<String>,
    routers: Vec<RouterReport>,
    workers: Vec<WorkerReport>,
    layers: Vec<LayerReport>,
    /// By layer; absent while too little is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<Vec<LayerLoad>>,
}

#[derive(Debug, Serialize)]
struct PlanReport {
    version: u64,
    policy: String,
    reason: String,
}

#[derive(Debug, Serialize)]
struct RouterReport {
    id: String,
    inference: String,
    admin: String,
    plan_version: u64,
}

#[derive(Debug, Serialize)]
struct WorkerReport {
    id: String,
    state: &'static str,
    device: String,
    address: String,
    host: String,
    zone: String,
    plan_version: u64,
    experts: usize,
    assigned: usize,
    /// Of those assigned, such as could not be loaded.
    failing: usize,
    bytes: u64,
    /// 0 is no limit.
    memory_budget: u64,
    /// Rows per second through one expert; 0 while unknown.
    speed: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    rows: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rows_error: Option<String>,
    resident: BTreeMap<u32, Vec<u16>>,
}

#[derive(Debug, Serialize)]
struct LayerReport {
    layer: u32,
    experts: u32,
    resident: u32,
    min_replicas: usize,
    max_replicas: usize,
}

impl Report {
    fn of(cluster: &Cluster, state: &ClusterState, rows: &BTreeMap<String, Result<u64, String>>) -> Self {
        let plan = state.plan.as_deref();
        Self {
            cluster: cluster.to_string(),
            model: state.model.as_ref().map(|model| model.name.clone()),
            plan: plan.map(|plan| PlanReport {
                version: plan.version.0,
                policy: plan.policy.clone(),
                reason: plan.reason.clone(),
            }),
            leader: state.leader.as_ref().map(ToString::to_string),
            routers: state.routers.values().map(RouterReport::of).collect(),
            workers: state.workers.values().map(|worker| WorkerReport::of(state, worker, rows)).collect(),
            layers: layers(state),
            load: load::report(state),
        }
    }

    fn text(&self, with_rows: bool) -> String {
        let mut text = format!("cluster {}", self.cluster);
        match &self.model {
            Some(model) => text.push_str(&format!(", model {model}")),
            None => text.push_str(", no model so far"),
        }
        match &self.plan {
            Some(plan) => text.push_str(&format!(", plan {} ({}: {})\n\n", plan.version, plan.policy, plan.reason)),
            None => text.push_str(", no plan so far\n\n"),
        }
        text.push_str(&self.router_table());
        text.push('\n');
        text.push_str(&self.worker_table(with_rows));
        let silent = self.workers.iter().filter_map(|worker| Some((&worker.id, worker.rows_error.as_ref()?)));
        for (id, error) in silent {
            text.push_str(&format!("{id} did not say how many rows it computed: {error}\n"));
        }
        for worker in self.workers.iter().filter(|worker| worker.failing > 0) {
            text.push_str(&format!("{} could not load {} experts, see its log\n", worker.id, worker.failing));
        }
        text.push('\n');
        text.push_str(&self.layer_table());
        if let Some(load) = &self.load {
            text.push('\n');
            text.push_str(&load::table(load));
        }
        text
    }

    fn router_table(&self) -> String {
        let mut rows = vec![row(["ROUTER", "INFERENCE", "ADMIN", "PLAN", ""])];
        for router in &self.routers {
            let leads = if self.leader.as_ref() == Some(&router.id) { "leader" } else { "" };
            let plan = router.plan_version.to_string();
            rows.push(row([&router.id, &router.inference, &router.admin, &plan, leads]));
        }
        terminal::table(&rows)
    }

    fn worker_table(&self, with_rows: bool) -> String {
        let mut header = row(["WORKER", "STATE", "DEVICE", "ADDRESS", "PLAN", "EXPERTS", "BYTES"]);
        let mut rows = Vec::new();
        for worker in &self.workers {
            let (plan, bytes) = (worker.plan_version.to_string(), terminal::bytes(worker.bytes));
            let experts = match worker.experts == worker.assigned {
                true => worker.experts.to_string(),
                false => format!("{} of {}", worker.experts, worker.assigned),
            };
            let mut cells = row([&worker.id, worker.state, &worker.device, &worker.address, &plan, &experts, &bytes]);
            if with_rows {
                cells.push(worker.rows.map_or_else(|| "?".to_owned(), |rows| rows.to_string()));
            }
            cells.push(ranges(&worker.resident));
            rows.push(cells);
        }
        if with_rows {
            header.push("ROWS".to_owned());
        }
        header.push("PER LAYER".to_owned());
        rows.insert(0, header);
        terminal::table(&rows)
    }

    /// Neighbouring layers that look the same share a line.
    fn layer_table(&self) -> String {
        let mut rows = vec![row(["LAYERS", "EXPERTS", "RESIDENT", "MIN REPLICAS", "MAX REPLICAS"])];
        let looks = |layer: &LayerReport| (layer.experts, layer.resident, layer.min_replicas, layer.max_replicas);
        for group in self.layers.chunk_by(|a, b| a.layer + 1 == b.layer && looks(a) == looks(b)) {
            let (first, last) = (&group[0], &group[group.len() - 1]);
            let cells = [
                range(first.layer, last.layer),
                first.experts.to_string(),
                first.resident.to_string(),
                first.min_replicas.to_string(),
                first.max_replicas.to_string(),
            ];
            rows.push(cells.into());
        }
        terminal::table(&rows)
    }
}

impl RouterReport {
    fn of(record: &conclave_placement::RouterRecord) -> Self {
        Self {
            id: record.id.to_string(),
            inference: record.inference_address.clone(),
            admin: record.admin_address.clone(),
            plan_version: record.plan_version.0,
        }
    }
}

impl WorkerReport {
    fn of(state: &ClusterState, record: &WorkerRecord, rows: &BTreeMap<String, Result<u64, String>>) -> Self {
        let expert_bytes = state.model.as_ref().map_or(0, |model| model.expert_bytes);
        let experts = record.resident.len();
        let rows = rows.get(record.id.as_str());
        let resident = record.resident.0.iter();
        Self {
            id: record.id.to_string(),
            state: match record.state {
                WorkerState::Starting => "starting",
                WorkerState::Serving => "serving",
                WorkerState::Draining => "draining",
            },
            device: record.device.clone(),
            address: record.address.clone(),
            host: record.locality.host.clone(),
            zone: record.locality.zone.clone(),
            plan_version: record.plan_version.0,
            failing: record.failing.len(),
            memory_budget: record.memory_budget,
            speed: record.speed,
            experts,
            assigned: state.plan.as_ref().map_or(0, |plan| plan.assigned_to(&record.id).len()),
            bytes: experts as u64 * expert_bytes,
            rows: rows.and_then(|rows| rows.as_ref().ok().copied()),
            rows_error: rows.and_then(|rows| rows.as_ref().err().cloned()),
            resident: resident.map(|(layer, experts)| (layer.0, experts.iter().map(|e| e.0).collect())).collect(),
        }
    }
}

fn layers(state: &ClusterState) -> Vec<LayerReport> {
    let Some(model) = &state.model else { return Vec::new() };
    let experts = u16::try_from(model.experts).unwrap_or(u16::MAX);
    let report = |layer: LayerIdx| {
        let holders: Vec<usize> = (0..experts).map(|expert| state.holders(layer, ExpertId(expert)).count()).collect();
        LayerReport {
            layer: layer.0,
            experts: model.experts,
            resident: holders.iter().filter(|count| **count > 0).count() as u32,
            min_replicas: holders.iter().copied().min().unwrap_or(0),
            max_replicas: holders.iter().copied().max().unwrap_or(0),
        }
    };
    model.moe_layers.iter().map(|layer| report(*layer)).collect()
}

/// "1-26: 16, 27: 15": how many experts, by ranges of layers.
fn ranges(resident: &BTreeMap<u32, Vec<u16>>) -> String {
    let counts: Vec<(u32, usize)> = resident.iter().map(|(layer, experts)| (*layer, experts.len())).collect();
    let groups = counts.chunk_by(|a, b| a.0 + 1 == b.0 && a.1 == b.1);
    let texts = groups.map(|group| format!("{}: {}", range(group[0].0, group[group.len() - 1].0), group[0].1));
    texts.collect::<Vec<String>>().join(", ")
}

fn range(first: u32, last: u32) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

#[cfg(test)]
#[path = "show_tests.rs"]
mod tests;
