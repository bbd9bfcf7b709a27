//! How many rows one router can send and have back, whatever computes them: this process is the router's end, with its
//! real `Exchange` on a thread of its own as its engine is, beside 1 to 64 workers in another process that answer at once.
//! Rows of 2048 leave in FP8 and come back in bf16, one weighted sum per row sent. Out: rows a second, and how much
//! processor time of this process they took.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use conclave_model::gate::Routing;
use conclave_model::wire::Encoding;
use conclave_placement::ids::{ExpertId, Incarnation, LayerIdx, WorkerId};
use conclave_placement::state::{ClusterState, ModelIdentity, WorkerRecord, WorkerState};
use conclave_router::load::SentRows;
use conclave_router::moe::{Exchange, Mode};
use conclave_router::workers::Workers;
use futures::future::try_join_all;
use rand::rngs::StdRng;
use rand::seq::index;
use rand::{Rng, SeedableRng};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::fakes::HIDDEN;
use crate::stats::Samples;

const WORKERS: [usize; 7] = [1, 2, 4, 8, 16, 32, 64];
const EXPERTS: usize = 64;
const TOP: usize = 6;
/// Rows of one pass, and passes under way at once: two micro-batches of two routers' steps.
const ROWS: usize = 512;
const PASSES: usize = 4;
const WINDOW: Duration = Duration::from_secs(1);
/// The first warms up and is not counted.
const WINDOWS: usize = 6;
const LAYER: u32 = 1;

#[derive(Debug)]
pub(crate) struct Report(Vec<Row>);

/// One number of workers.
#[derive(Debug)]
struct Row {
    workers: usize,
    /// Sent, counted once per worker that they went to: a second.
    rows: Samples,
    /// Through the layer, with all their experts: a second.
    tokens: Samples,
    /// Of this process.
    cores: Samples,
}

/// Measures each number of workers in turn.
pub(crate) async fn measure() -> anyhow::Result<Report> {
    let mut rows = Vec::new();
    for workers in WORKERS {
        eprintln!("ceiling: {workers} workers");
        rows.push(with(workers).await?);
    }
    Ok(Report(rows))
}

async fn with(workers: usize) -> anyhow::Result<Row> {
    let (far, addresses) = start(workers).await?;
    let stop = CancellationToken::new();
    let (_state, cluster) = watch::channel(Arc::new(state(&addresses)?));
    let reachable = Workers::start(cluster, HIDDEN, stop.clone())?;
    let mut snapshots = reachable.watch();
    let all_there = snapshots.wait_for(|snapshot| snapshot.workers.len() == workers);
    tokio::time::timeout(Duration::from_secs(30), all_there).await.context("some workers are not reached")??;
    let exchange = Exchange {
        workers: reachable,
        mode: Mode::PartialSum,
        encoding: Encoding::Fp8Block128,
        hidden: HIDDEN,
        patience: Duration::from_secs(10),
        hedging: None,
        sent: Arc::new(SentRows::new(std::iter::once(LAYER as usize), EXPERTS)),
        stall: Arc::default(),
    };
    let row = tokio::task::spawn_blocking(move || {
        // As the engine's thread has it: its own runtime, while streams live on the process's.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(drive(&exchange, workers))
    })
    .await??;
    stop.cancel();
    end(far).await?;
    Ok(row)
}

/// Passes without end, [`PASSES`] at once, counted by windows.
async fn drive(exchange: &Exchange, workers: usize) -> anyhow::Result<Row> {
    let mut random = StdRng::seed_from_u64(0);
    let values: Vec<f32> = (0..ROWS * HIDDEN).map(|_| random.random_range(-2.0..2.0)).collect();
    let routings: Vec<Routing> = (0..PASSES).map(|_| routing(&mut random)).collect();
    let mut row = Row { workers, rows: Samples::default(), tokens: Samples::default(), cores: Samples::default() };
    let sent = || exchange.workers.counters().rows.load(std::sync::atomic::Ordering::Relaxed);
    for window in 0..WINDOWS {
        let (began, cpu, before) = (Instant::now(), cpu_time(), sent());
        let pass = async |routing: &Routing| {
            let mut passes = 0;
            while began.elapsed() < WINDOW {
                let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
                exchange.routed(LAYER, &values, routing, deadline).await?;
                passes += 1;
            }
            anyhow::Ok(passes)
        };
        let passes: usize = try_join_all(routings.iter().map(pass)).await?.into_iter().sum();
        let took = began.elapsed().as_secs_f64();
        if window > 0 {
            row.rows.push((sent() - before) as f64 / took);
            row.tokens.push((passes * ROWS) as f64 / took);
            row.cores.push((cpu_time() - cpu).as_secs_f64() / took);
        }
    }
    Ok(row)
}

/// [`TOP`] different experts a row, all as likely.
fn routing(random: &mut StdRng) -> Routing {
    let expert_ids = (0..ROWS).flat_map(|_| index::sample(random, EXPERTS, TOP).into_vec());
    Routing {
        expert_ids: expert_ids.map(|expert| expert as u16).collect(),
        weights: vec![1.0 / TOP as f32; ROWS * TOP],
        experts_per_row: TOP,
    }
}

/// A cluster in which each expert lives on one worker, dealt out in turns.
fn state(addresses: &[String]) -> anyhow::Result<ClusterState> {
    let mut workers = BTreeMap::new();
    for (index, address) in addresses.iter().enumerate() {
        let id = WorkerId::parse(&format!("fake-{index}"))?;
        let experts = (index..EXPERTS).step_by(addresses.len());
        let record = WorkerRecord {
            device: "none".to_owned(),
            state: WorkerState::Serving,
            resident: experts.map(|expert| (LayerIdx(LAYER), ExpertId(expert as u16))).collect(),
            ..WorkerRecord::starting(id.clone(), Incarnation::fresh(), address.clone())
        };
        workers.insert(id, record);
    }
    let model =
        ModelIdentity::new("none".to_owned(), [String::new(), String::new()], 2, std::iter::once(1), EXPERTS, 0);
    Ok(ClusterState { model: Some(model), workers, ..ClusterState::empty() })
}

async fn start(workers: usize) -> anyhow::Result<(Child, Vec<String>)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["fakes", &workers.to_string()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start the fake workers")?;
    let stdout = child.stdout.take().context("the fake workers have no standard output")?;
    let line = BufReader::new(stdout).lines().next_line().await?.context("the fake workers said nothing")?;
    Ok((child, serde_json::from_str(&line)?))
}

async fn end(mut far: Child) -> anyhow::Result<()> {
    drop(far.stdin.take());
    let status = tokio::time::timeout(Duration::from_secs(10), far.wait()).await??;
    ensure!(status.success(), "the fake workers ended with {status}");
    Ok(())
}

/// Of all threads of this process so far.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or_default())
}

impl Row {
    /// Payload both ways, a second.
    fn bytes(&self) -> f64 {
        let out = Encoding::Fp8Block128.row_bytes(HIDDEN) + Encoding::Fp8Block128.scale_bytes(HIDDEN);
        self.rows.median() * (out + Encoding::Bf16.row_bytes(HIDDEN)) as f64
    }

    fn per_core(&self) -> f64 {
        self.rows.median() / self.cores.median()
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let rows = self.0.iter().map(|row| {
            json!({
                "workers": row.workers, "rows_per_second": row.rows.to_json(), "tokens_per_second": row.tokens.to_json(),
                "router_cores": row.cores.to_json(), "rows_per_core_second": row.per_core(), "bytes_per_second": row.bytes(),
            })
        });
        json!({
            "hidden": HIDDEN, "out": "fp8", "back": "bf16", "mode": "partial-sum", "rows_a_pass": ROWS,
            "passes_at_once": PASSES, "experts": EXPERTS, "experts_per_row": TOP, "cases": rows.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "One router's exchange, rows of {HIDDEN} out in FP8 and back in bf16, a weighted sum per row sent; workers that answer at"
        )?;
        writeln!(
            f,
            "once in one other process on the same cores. {PASSES} passes of {ROWS} rows at once, {TOP} of {EXPERTS} experts a row; a row counts once per"
        )?;
        writeln!(f, "worker that it is sent to. Medians of {} windows.", WINDOWS - 1)?;
        writeln!(
            f,
            "{:>8} {:>10} {:>23} {:>13} {:>14} {:>12} {:>9}",
            "workers", "rows/s", "range", "layer rows/s", "router's cores", "rows/s/core", "MB/s"
        )?;
        for row in &self.0 {
            writeln!(
                f,
                "{:>8} {:>10.0} {:>23} {:>13.0} {:>14.2} {:>12.0} {:>9.0}",
                row.workers,
                row.rows.median(),
                format!("{:.0}–{:.0}", row.rows.quantile(0.0), row.rows.quantile(1.0)),
                row.tokens.median(),
                row.cores.median(),
                row.per_core(),
                row.bytes() / 1e6
            )?;
        }
        Ok(())
    }
}
