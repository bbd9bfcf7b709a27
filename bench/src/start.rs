//! What a worker costs before it has computed anything. In: a checkpoint. Out: from the start of a worker's process to the
//! first row that one of its experts answers, with the files in the page cache; and, for one, two and four workers that
//! share all experts, the memory that each takes beside its share of the experts' bytes. Workers are real processes; the
//! store and the plan, which a router would make, are this program's.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use conclave_model::checkpoint::Checkpoint;
use conclave_model::wire::{self as codec, Encoding};
use conclave_placement::ids::{Cluster, PlanVersion, WorkerId};
use conclave_placement::keys::Keys;
use conclave_placement::store::{memory::MemoryStore, serve::serve_memory};
use conclave_placement::{LayerIdx, Plan, publication};
use conclave_proto::expert::v1 as wire;
use conclave_proto::expert::v1::combine_batch::Outcome;
use conclave_proto::expert::v1::expert_worker_client::ExpertWorkerClient;
use conclave_runtime::channel::{self, MAX_INTERNAL_MESSAGE};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::checkpoint::{self, Weights};
use crate::cluster::beside_this_program;
use crate::memory::Resident;
use crate::stats::Samples;

const STARTS: usize = 5;
const WORKERS: [usize; 3] = [1, 2, 4];
/// Between two tries to be answered: short against what is measured.
const AGAIN: Duration = Duration::from_millis(1);
const WITHIN: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub(crate) struct Report(Vec<OfModel>);

#[derive(Debug)]
struct OfModel {
    name: String,
    experts: usize,
    expert_bytes: u64,
    /// Milliseconds from the start of the process.
    first_answer: Samples,
    all_resident: Samples,
    memory: Vec<Memory>,
}

/// Of each of `workers` workers, all experts read once.
#[derive(Debug)]
struct Memory {
    workers: usize,
    /// The most that one has, so the fullest.
    share: u64,
    resident: Vec<Resident>,
}

/// Measures `model` and the checkpoints of DeepSeek-V2-Lite's layers.
pub(crate) async fn measure(model: &Path) -> anyhow::Result<Report> {
    let mut all = vec![of_model(model, model.display().to_string()).await?];
    for (weights, format) in [(Weights::Bf16, "bf16"), (Weights::Fp8, "FP8")] {
        let folder = tokio::task::spawn_blocking(move || checkpoint::v2_lite(weights)).await??;
        all.push(of_model(&folder, format!("{}, {format}", checkpoint::V2_LITE_IS)).await?);
    }
    Ok(Report(all))
}

async fn of_model(folder: &Path, name: String) -> anyhow::Result<OfModel> {
    let (checkpoint, folder_there) = (Checkpoint::open(folder)?, folder.to_owned());
    // Into the page cache, so that every start finds it as warm as the next.
    tokio::task::spawn_blocking(move || read_through(&folder_there)).await??;
    let all = Experts::of(&checkpoint);
    let (mut first_answer, mut all_resident, mut memory) = (Samples::default(), Samples::default(), Vec::new());
    for start in 1..=STARTS {
        eprintln!("start: {name}, start {start} of {STARTS}");
        let mut few = Few::start(folder, &all, 1).await?;
        first_answer.push((few.first_answer(&all).await? - few.began).as_secs_f64() * 1e3);
        few.wait_for_all(&all).await?;
        all_resident.push(few.began.elapsed().as_secs_f64() * 1e3);
        few.stop().await?;
    }
    for workers in WORKERS {
        eprintln!("start: {name}, memory of {workers} workers");
        let mut few = Few::start(folder, &all, workers).await?;
        few.wait_for_all(&all).await?;
        few.ask_all(&all).await?;
        memory.push(Memory { workers, share: all.share(workers), resident: few.resident()? });
        few.stop().await?;
    }
    let (experts, expert_bytes) = (all.all.len(), all.bytes);
    Ok(OfModel { name, experts, expert_bytes, first_answer, all_resident, memory })
}

fn read_through(folder: &Path) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        std::io::copy(&mut std::fs::File::open(entry?.path())?, &mut std::io::sink())?;
    }
    Ok(())
}

/// The routed experts of a checkpoint.
struct Experts {
    hidden: usize,
    per_layer: usize,
    layers: Vec<u32>,
    /// Layer and number of each.
    all: Vec<(u32, u16)>,
    /// Of one, as stored.
    bytes: u64,
}

impl Experts {
    fn of(checkpoint: &Checkpoint) -> Self {
        let (config, bytes) = (checkpoint.config(), checkpoint.expert_bytes());
        let per_layer = config.n_routed_experts;
        let layers: Vec<u32> = config.moe_layers().map(|layer| layer as u32).collect();
        let all = layers.iter().flat_map(|layer| (0..per_layer as u16).map(|expert| (*layer, expert))).collect();
        Self { hidden: config.hidden_size, per_layer, layers, all, bytes }
    }

    /// Bytes of the experts that the fullest of `workers` workers has.
    fn share(&self, workers: usize) -> u64 {
        (self.per_layer.div_ceil(workers) * self.layers.len()) as u64 * self.bytes
    }

    /// Each layer's experts in turns over `workers`.
    fn plan(&self, workers: &[WorkerId]) -> Plan {
        let holders: Vec<_> = (0..self.per_layer).map(|expert| vec![workers[expert % workers.len()].clone()]).collect();
        Plan {
            version: PlanVersion(1),
            parent: PlanVersion::NONE,
            policy: "benchmark".to_owned(),
            reason: "all experts in turns".to_owned(),
            layers: self.layers.iter().map(|layer| (LayerIdx(*layer), holders.clone())).collect(),
        }
    }
}

/// A few workers and the store that they follow.
struct Few {
    began: Instant,
    workers: Vec<(Child, String)>,
    _store: DropGuard,
}

impl Few {
    /// A store with a plan in it, then the processes.
    async fn start(folder: &Path, all: &Experts, count: usize) -> anyhow::Result<Self> {
        let (listener, stop) = (tokio::net::TcpListener::bind("127.0.0.1:0").await?, CancellationToken::new());
        let (store, spec) = (MemoryStore::new(), format!("etcd=http://{}", listener.local_addr()?));
        tokio::spawn(serve_memory(store.clone(), listener, stop.clone()));
        let cluster = Cluster::parse("bench")?;
        let ids = (0..count).map(|index| WorkerId::parse(&format!("worker-{index}"))).collect::<Result<Vec<_>, _>>()?;
        publication::publish(&store, &Keys::new(&cluster), &all.plan(&ids), "bench", None).await?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (program, began) = (beside_this_program("conclave-expert-worker")?, Instant::now());
        let mut workers = Vec::new();
        for id in &ids {
            let address = free_address()?;
            let child = Command::new(&program)
                .args(["--cluster", cluster.as_str(), "--store", &spec, "--id", id.as_str(), "--dtype", "bf16"])
                .args(["--threads", &(cores / count).max(1).to_string(), "--listen", &address])
                .args(["--admin-listen", "127.0.0.1:0", "--drain-grace", "1", "--die-with-parent", "--model"])
                .arg(folder)
                .stdin(std::process::Stdio::null())
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .context("cannot start conclave-expert-worker")?;
            workers.push((child, address));
        }
        Ok(Self { began, workers, _store: stop.drop_guard() })
    }

    /// When the first worker has answered a row for the first of its experts.
    async fn first_answer(&self, all: &Experts) -> anyhow::Result<Instant> {
        let (layer, expert) = *all.all.first().context("a model without routed experts")?;
        let asking = async {
            let mut asker = loop {
                match Asker::connect(&self.workers[0].1).await {
                    Ok(asker) => break asker,
                    Err(_) => tokio::time::sleep(AGAIN).await,
                }
            };
            while !asker.ask(all.hidden, layer, expert).await? {
                tokio::time::sleep(AGAIN).await;
            }
            anyhow::Ok(Instant::now())
        };
        tokio::time::timeout(WITHIN, asking).await.context("no expert was served")?
    }

    /// Until all workers together hold everything.
    async fn wait_for_all(&mut self, all: &Experts) -> anyhow::Result<()> {
        let count = self.workers.len();
        let waiting = async {
            for (index, (child, address)) in self.workers.iter_mut().enumerate() {
                let mine = (0..all.per_layer).filter(|expert| expert % count == index).count();
                while held(address).await.unwrap_or(0) < mine * all.layers.len() {
                    if let Some(status) = child.try_wait()? {
                        bail!("worker-{index} on {address} has ended: {status}");
                    }
                    tokio::time::sleep(AGAIN * 5).await;
                }
            }
            Ok(())
        };
        tokio::time::timeout(WITHIN, waiting).await.context("the workers do not load all experts")?
    }

    /// A row through every expert, so that all that serving needs is in memory.
    async fn ask_all(&self, all: &Experts) -> anyhow::Result<()> {
        for (index, (_, address)) in self.workers.iter().enumerate() {
            let mut asker = Asker::connect(address).await?;
            for (layer, expert) in
                all.all.iter().filter(|(_, expert)| usize::from(*expert) % self.workers.len() == index)
            {
                ensure!(asker.ask(all.hidden, *layer, *expert).await?, "expert {expert} of layer {layer} is not there");
            }
        }
        Ok(())
    }

    fn resident(&self) -> anyhow::Result<Vec<Resident>> {
        let pids = self.workers.iter().map(|(child, _)| child.id().context("a worker has ended"));
        pids.map(|pid| Resident::of(pid?)).collect()
    }

    async fn stop(self) -> anyhow::Result<()> {
        for (child, _) in &self.workers {
            if let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) {
                kill_process(pid, Signal::TERM)?;
            }
        }
        for (mut child, _) in self.workers {
            tokio::time::timeout(WITHIN, child.wait()).await.context("a worker does not end")??;
        }
        Ok(())
    }
}

/// Free now, and of those that no system gives away by itself: the ends of the workers' own connections are of the others, and one of
/// them could be it before its worker is.
fn free_address() -> anyhow::Result<String> {
    let mut tries = (0..100).map(|_| format!("127.0.0.1:{}", rand::random_range(10_000..32_000)));
    tries.find(|address| std::net::TcpListener::bind(address).is_ok()).context("no port is free")
}

/// How many experts a worker has.
async fn held(address: &str) -> anyhow::Result<usize> {
    let mut client = ExpertWorkerClient::new(channel::internal(address)?.connect().await?);
    let inventory = client.get_inventory(wire::GetInventoryRequest {}).await?.into_inner();
    Ok(inventory.layers.iter().map(|layer| layer.experts.len()).sum())
}

/// One stream to one worker.
struct Asker {
    batches: mpsc::Sender<wire::DispatchBatch>,
    answers: tonic::Streaming<wire::CombineBatch>,
    batch_id: u64,
}

impl Asker {
    async fn connect(address: &str) -> anyhow::Result<Self> {
        let mut client = ExpertWorkerClient::new(channel::internal(address)?.connect().await?)
            .max_decoding_message_size(MAX_INTERNAL_MESSAGE)
            .max_encoding_message_size(MAX_INTERNAL_MESSAGE);
        let (batches, queued) = mpsc::channel(1);
        let answers = client.exchange(ReceiverStream::new(queued)).await?.into_inner();
        Ok(Self { batches, answers, batch_id: 0 })
    }

    /// One row for one expert; false where it is not there.
    async fn ask(&mut self, hidden: usize, layer: u32, expert: u16) -> anyhow::Result<bool> {
        self.batch_id += 1;
        let (values, _) = codec::encode(&vec![0.5; hidden], hidden, Encoding::Bf16);
        let batch = wire::DispatchBatch {
            batch_id: self.batch_id,
            layer,
            plan_version: 1,
            deadline_us: u64::try_from(WITHIN.as_micros())?,
            encoding: wire::Encoding::Bf16.into(),
            rows: 1,
            hidden: values,
            expert_ids: expert.to_le_bytes().to_vec().into(),
            row_ids: 0u32.to_le_bytes().to_vec().into(),
            mode: wire::CombineMode::PerAssignment.into(),
            return_encoding: wire::Encoding::Bf16.into(),
            ..Default::default()
        };
        self.batches.send(batch).await.context("the stream is closed")?;
        match self.answers.message().await?.context("the stream ended")?.outcome {
            Some(Outcome::Returned(_)) => Ok(true),
            Some(Outcome::Refused(refused)) if refused.reason() == wire::RefusedReason::NotResident => Ok(false),
            outcome => bail!("the worker answered {outcome:?}"),
        }
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let models = self.0.iter().map(|model| {
            let memory = model.memory.iter().map(|memory| {
                let resident: Vec<_> = memory.resident.iter().copied().map(Resident::to_json).collect();
                json!({ "workers": memory.workers, "share_bytes": memory.share, "resident": resident })
            });
            json!({
                "model": model.name, "experts": model.experts, "expert_bytes": model.expert_bytes,
                "first_answer_ms": model.first_answer.to_json(), "all_resident_ms": model.all_resident.to_json(),
                "memory": memory.collect::<Vec<_>>(),
            })
        });
        Value::Array(models.collect())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        writeln!(
            f,
            "One worker, bf16 products, files in the page cache; {STARTS} starts, median (range), ms from the start of its process"
        )?;
        for model in &self.0 {
            let cell = |samples: &Samples| {
                format!("{:.0} ({:.0}–{:.0})", samples.median(), samples.quantile(0.0), samples.quantile(1.0))
            };
            let mib_each = model.expert_bytes as f64 / f64::from(1 << 20);
            writeln!(f, "{}: {} experts of {mib_each:.1} MiB", model.name, model.experts)?;
            writeln!(
                f,
                "  first row answered {}, all experts there {}",
                cell(&model.first_answer),
                cell(&model.all_resident)
            )?;
            writeln!(
                f,
                "{:>10} {:>26} {:>14} {:>16} {:>12} {:>15} {:>14}",
                "workers",
                "share of the experts, MiB",
                "resident, MiB",
                "anonymous, MiB",
                "files, MiB",
                "beyond, MiB",
                "÷ share"
            )?;
            for memory in &model.memory {
                // The first worker has the largest share.
                let Some(first) = memory.resident.first() else { continue };
                writeln!(
                    f,
                    "{:>10} {:>26} {:>14} {:>16} {:>12} {:>15} {:>14.2}",
                    memory.workers,
                    mib(memory.share),
                    mib(first.all),
                    mib(first.anonymous),
                    mib(first.files()),
                    (first.all as i64 - memory.share as i64) >> 20,
                    first.all as f64 / memory.share as f64
                )?;
            }
        }
        Ok(())
    }
}
