//! The cost of sending rows to an expert worker in another process and having them back, without any compute. Out: for
//! each number of rows the time of a raw TCP echo of the same bytes, which is the limit, and beside it of the `Exchange`
//! stream over TCP and over a Unix socket, and of the router's whole way from f32 rows to their weighted sum. They are
//! measured in turns, so a machine that slows down slows all of them. And the rows a second that one router can have.
//!
//! The caller's thread is what the router's engine is: a runtime of its own, with the connections on another thread.

use std::fmt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use conclave_model::gate::Routing;
use conclave_model::wire::{self as codec, Encoding};
use conclave_placement::ids::{ExpertId, Incarnation, LayerIdx, WorkerId};
use conclave_placement::state::{ClusterState, LocalSocket, ModelIdentity, Residency, WorkerRecord, WorkerState};
use conclave_proto::expert::EXCHANGE_PATH;
use conclave_proto::expert::v1 as wire;
use conclave_proto::expert::v1::combine_batch::Outcome;
use conclave_proto::integrity;
use conclave_router::load::SentRows;
use conclave_router::moe::{self, Mode};
use conclave_router::workers::Workers;
use conclave_runtime::socket::Socket;
use conclave_runtime::stream::{self, Lookout, Message, Outbox};
use conclave_runtime::wire_thread::WireThread;
use conclave_runtime::{channel, listen, tensor_thread};
use futures::future::try_join_all;
use prost::Message as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::stats::Samples;

const HIDDEN: usize = 2048;
const EXPERTS: u16 = 64;
const LAYER: u32 = 1;
/// Rows a batch, and round trips of each kind a round: the larger, the fewer are needed for a steady median.
const CASES: [(usize, usize); 4] = [(1, 50), (8, 50), (64, 25), (512, 8)];
/// The first warms up and is not counted.
const ROUNDS: usize = 21;
/// The rate: rows a batch, batches under way at once (the engine has two).
const RATE: (usize, usize) = (256, 2);
/// It is counted in so many windows of this length; the first warms up and is not counted.
const WINDOWS: (usize, Duration) = (31, Duration::from_millis(100));
/// Smaller answers are looked for by whoever waits, as the router does it (`router/src/workers/link.rs`).
const LOOKED_FOR: usize = 32 << 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// What was measured for one number of rows, in microseconds.
#[derive(Debug)]
struct Case {
    rows: usize,
    trips: usize,
    raw: Samples,
    exchange: Samples,
    local: Samples,
    /// From f32 rows to f32 sums by the router's own `Exchange`, over the Unix socket and over TCP: plan, encode,
    /// checksum, send; receive, check, weigh and sum.
    whole_local: Samples,
    whole: Samples,
}

#[derive(Debug)]
pub(crate) struct Report {
    cases: Vec<Case>,
    /// Rows a second, FP8 out and BF16 back, over TCP and over the Unix socket.
    rates: [Samples; 2],
}

/// Everything that can be measured, connected.
struct Ways {
    raw: Raw,
    exchange: Stream,
    local: Stream,
    router: Router,
    router_local: Router,
}

/// Measures all cases against a fresh echo process.
pub(crate) async fn measure() -> anyhow::Result<Report> {
    let far = Far::start().await?;
    let places = far.places.clone();
    let report = tensor_thread::spawn_local("caller", move || measure_all(places))?.await??;
    far.stop().await?;
    Ok(report)
}

async fn measure_all(places: Places) -> anyhow::Result<Report> {
    let mut ways = Ways {
        raw: Raw::connect(&places.raw)?,
        exchange: Stream::connect(channel_to(places.exchange.clone(), None)).await?,
        local: Stream::connect(channel_to(places.exchange.clone(), Some(places.local.clone()))).await?,
        router: Router::start(&places, false).await?,
        router_local: Router::start(&places, true).await?,
    };
    let mut cases: Vec<Case> = CASES.map(|(rows, trips)| Case::new(rows, trips)).into();
    for round in 0..ROUNDS {
        for case in &mut cases {
            case.measure_round(&mut ways, round > 0).await?;
        }
    }
    let rates = [ways.router.rate().await?, ways.router_local.rate().await?];
    Ok(Report { cases, rates })
}

impl Case {
    fn new(rows: usize, trips: usize) -> Self {
        let none = Samples::default;
        Self { rows, trips, raw: none(), exchange: none(), local: none(), whole_local: none(), whole: none() }
    }

    fn bytes(&self) -> usize {
        self.rows * Encoding::Bf16.row_bytes(HIDDEN)
    }

    /// One of each after the other, so that each finds the far process asleep, as a router finds it in mid-step: a
    /// tight loop of one kind would keep both ends awake on warm caches.
    async fn measure_round(&mut self, ways: &mut Ways, count: bool) -> anyhow::Result<()> {
        let (values, routing) = (values(self.rows), routing(self.rows));
        let (hidden, _) = codec::encode(&values, HIDDEN, Encoding::Bf16);
        let framed = framed(&hidden)?;
        for _ in 0..self.trips {
            let started = Instant::now();
            ways.raw.round_trip(&framed)?;
            let raw = started.elapsed();

            let batch = dispatch_batch(self.rows, hidden.clone())?;
            let started = Instant::now();
            let rows = ways.exchange.round_trip(batch).await?;
            let exchange = started.elapsed();
            ensure!(rows == hidden, "the echo changed {} rows", self.rows);

            let batch = dispatch_batch(self.rows, hidden.clone())?;
            let started = Instant::now();
            let rows = ways.local.round_trip(batch).await?;
            let local = started.elapsed();
            ensure!(rows == hidden, "the echo changed {} rows", self.rows);

            let whole = ways.router.sum(&values, &routing, Encoding::Bf16).await?;
            let whole_local = ways.router_local.sum(&values, &routing, Encoding::Bf16).await?;
            if count {
                self.raw.push_us(raw);
                self.exchange.push_us(exchange);
                self.local.push_us(local);
                self.whole.push_us(whole);
                self.whole_local.push_us(whole_local);
            }
        }
        Ok(())
    }
}

/// Rows that bf16 holds exactly.
fn values(rows: usize) -> Vec<f32> {
    (0..rows * HIDDEN).map(|i| (i % 251) as f32 / 64.0 - 2.0).collect()
}

/// One assignment a row, so that as many rows come back as went out.
fn routing(rows: usize) -> Routing {
    let expert_ids = (0..rows).map(|row| row as u16 % EXPERTS).collect();
    Routing { experts_per_row: 1, expert_ids, weights: vec![1.0; rows] }
}

fn dispatch_batch(rows: usize, hidden: Bytes) -> anyhow::Result<wire::DispatchBatch> {
    let rows = u32::try_from(rows)?;
    Ok(wire::DispatchBatch {
        layer: LAYER,
        plan_version: 1,
        deadline_us: 1_000_000,
        encoding: wire::Encoding::Bf16.into(),
        rows,
        hidden,
        expert_ids: (0..rows).flat_map(|row| (row as u16 % EXPERTS).to_le_bytes()).collect(),
        row_ids: (0..rows).flat_map(u32::to_le_bytes).collect(),
        mode: wire::CombineMode::PerAssignment.into(),
        return_encoding: wire::Encoding::Bf16.into(),
        ..Default::default()
    })
}

fn framed(message: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut framed = u32::try_from(message.len())?.to_le_bytes().to_vec();
    framed.extend_from_slice(message);
    Ok(framed)
}

/// The echo process and where it listens.
#[derive(Debug)]
struct Far {
    child: Child,
    places: Places,
}

#[derive(Clone, Debug)]
struct Places {
    raw: String,
    exchange: String,
    local: String,
}

impl Far {
    async fn start() -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("echo")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the echo process")?;
        let stdout = child.stdout.take().context("the echo process has no standard output")?;
        let line = BufReader::new(stdout).lines().next_line().await?.context("the echo process said nothing")?;
        let addresses: Value = serde_json::from_str(&line)?;
        let address =
            |key: &str| addresses[key].as_str().map(str::to_owned).context("the echo process gave no address");
        let places = Places { raw: address("raw")?, exchange: address("exchange")?, local: address("local")? };
        Ok(Self { places, child })
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = tokio::time::timeout(Duration::from_secs(10), self.child.wait()).await??;
        ensure!(status.success(), "the echo process ended with {status}");
        Ok(())
    }
}

/// A blocking socket: no runtime between the caller and the kernel, for this is the limit.
#[derive(Debug)]
struct Raw {
    socket: TcpStream,
    answer: Vec<u8>,
}

impl Raw {
    fn connect(address: &str) -> anyhow::Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, answer: Vec::new() })
    }

    fn round_trip(&mut self, framed: &[u8]) -> anyhow::Result<()> {
        self.answer.resize(framed.len() - 4, 0);
        self.socket.write_all(framed)?;
        self.socket.read_exact(&mut self.answer)?;
        Ok(())
    }
}

async fn channel_to(address: String, local: Option<String>) -> std::io::Result<Socket> {
    match local {
        Some(name) => channel::local(&name).await,
        None => channel::tcp(&address).await,
    }
}

/// One `Exchange` stream as the router holds it: bytes with their checksums, both ways.
struct Stream {
    outbox: Outbox,
    lookout: Option<Lookout>,
    answers: mpsc::Receiver<Bytes>,
    batch_id: u64,
    _wire: WireThread,
}

impl Stream {
    async fn connect(socket: impl Future<Output = std::io::Result<Socket>> + Send + 'static) -> anyhow::Result<Self> {
        let wire = WireThread::start("wire")?;
        let opening =
            wire.spawn(async move { anyhow::Ok(stream::open(socket.await?, "bench", EXCHANGE_PATH, &[]).await?) });
        let (outbox, mut inbox) = opening.await??;
        let (arrived, answers) = mpsc::channel(16);
        wire.spawn(async move {
            while let Ok(Some(message)) = inbox.next().await {
                if arrived.send(message).await.is_err() {
                    break;
                }
            }
        });
        Ok(Self { outbox, lookout: None, answers, batch_id: 0, _wire: wire })
    }

    async fn round_trip(&mut self, mut batch: wire::DispatchBatch) -> anyhow::Result<Bytes> {
        if batch.hidden.len() > LOOKED_FOR {
            self.lookout = None;
        } else if self.lookout.is_none() {
            self.lookout = self.outbox.look_out();
        }
        self.batch_id += 1;
        batch.batch_id = self.batch_id;
        batch.checksum = Some(integrity::of_dispatch(&batch));
        let mut message = Message::with_capacity(batch.encoded_len());
        batch.encode(message.body())?;
        self.outbox.send(message.finish()?).await?;
        let answer = match &self.lookout {
            Some(lookout) => tokio::select! {
                biased;
                answer = self.answers.recv() => answer,
                answer = lookout.next() => Some(answer),
            },
            None => self.answers.recv().await,
        };
        let answer = wire::CombineBatch::decode(answer.context("the stream ended")?)?;
        ensure!(answer.batch_id == self.batch_id, "batch {} was answered by {}", self.batch_id, answer.batch_id);
        match answer.outcome {
            Some(Outcome::Returned(returned)) => {
                let sum = integrity::of_returned(answer.batch_id, &returned);
                ensure!(answer.checksum == Some(sum), "rows were damaged on their way");
                Ok(returned.rows)
            }
            outcome => bail!("the echo answered {outcome:?}"),
        }
    }
}

/// The router's half of a layer, with the echo as the only worker.
struct Router {
    exchange: moe::Exchange,
    _cluster: watch::Sender<Arc<ClusterState>>,
    _end: DropGuard,
}

impl Router {
    async fn start(places: &Places, local: bool) -> anyhow::Result<Self> {
        let (cluster, watched) = watch::channel(Arc::new(cluster(places, local)?));
        let end = CancellationToken::new();
        let workers = Workers::start(watched, HIDDEN, end.clone())?;
        workers.watch().wait_for(|snapshot| !snapshot.workers.is_empty()).await?;
        let exchange = moe::Exchange {
            workers,
            mode: Mode::PerAssignment,
            encoding: Encoding::Bf16,
            hidden: HIDDEN,
            patience: PATIENCE,
            hedging: None,
            sent: Arc::new(SentRows::new(std::iter::empty(), 0)),
            stall: Arc::default(),
        };
        Ok(Self { exchange, _cluster: cluster, _end: end.drop_guard() })
    }

    /// How long it took.
    async fn sum(&mut self, values: &[f32], routing: &Routing, encoding: Encoding) -> anyhow::Result<Duration> {
        self.exchange.encoding = encoding;
        let started = Instant::now();
        let sums = self.exchange.routed(LAYER, values, routing, (started + PATIENCE).into()).await?;
        let took = started.elapsed();
        ensure!(sums == values, "the sums are not what was sent");
        Ok(took)
    }

    /// Rows a second with several batches under way, FP8 out and BF16 back: a sample each window.
    async fn rate(&mut self) -> anyhow::Result<Samples> {
        self.exchange.encoding = Encoding::Fp8Block128;
        let (values, routing) = (values(RATE.0), routing(RATE.0));
        let mut rates = Samples::default();
        for window in 0..WINDOWS.0 {
            let started = Instant::now();
            let one = || self.batches_until(started + WINDOWS.1, &values, &routing);
            let batches: usize = try_join_all((0..RATE.1).map(|_| one())).await?.into_iter().sum();
            if window > 0 {
                rates.push((batches * RATE.0) as f64 / started.elapsed().as_secs_f64());
            }
        }
        Ok(rates)
    }

    /// One batch after the other; how many.
    async fn batches_until(&self, end: Instant, values: &[f32], routing: &Routing) -> anyhow::Result<usize> {
        let mut batches = 0;
        while Instant::now() < end {
            let deadline = (Instant::now() + PATIENCE).into();
            let sums = self.exchange.routed(LAYER, values, routing, deadline).await?;
            ensure!(sums.len() == values.len(), "as many sums as rows");
            batches += 1;
        }
        Ok(batches)
    }
}

/// One worker that holds every expert of one layer.
fn cluster(places: &Places, local: bool) -> anyhow::Result<ClusterState> {
    let layers = [LAYER as usize].into_iter();
    let none = || [String::new(), String::new()];
    let model = ModelIdentity::new("bench".to_owned(), none(), 2, layers, usize::from(EXPERTS), 1);
    let mut resident = Residency::new();
    for expert in 0..EXPERTS {
        resident.insert(LayerIdx(LAYER), ExpertId(expert));
    }
    let id = WorkerId::parse("echo")?;
    let socket = || Some(LocalSocket { boot_id: listen::boot_id()?, name: places.local.clone() });
    let worker = WorkerRecord {
        local: local.then(socket).flatten(),
        state: WorkerState::Serving,
        resident,
        ..WorkerRecord::starting(id.clone(), Incarnation::fresh(), places.exchange.clone())
    };
    Ok(ClusterState { model: Some(model), workers: [(id, worker)].into(), ..ClusterState::empty() })
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let cases = self.cases.iter().map(|case| {
            let ratio = |samples: &Samples| samples.median() / case.raw.median();
            json!({
                "rows": case.rows,
                "bytes_each_way": case.bytes(),
                "raw_tcp_us": case.raw.to_json(),
                "exchange_us": case.exchange.to_json(),
                "exchange_local_us": case.local.to_json(),
                "whole_us": case.whole.to_json(),
                "whole_local_us": case.whole_local.to_json(),
                "exchange_over_raw_tcp": ratio(&case.exchange),
                "exchange_local_over_raw_tcp": ratio(&case.local),
                "whole_over_raw_tcp": ratio(&case.whole),
                "whole_local_over_raw_tcp": ratio(&case.whole_local),
            })
        });
        let [tcp, local] = &self.rates;
        let rates = json!({ "tcp": tcp.to_json(), "local": local.to_json() });
        json!({
            "hidden": HIDDEN, "encoding": "bf16", "cases": cases.collect::<Vec<_>>(),
            "rows_per_second_fp8_out_bf16_back": rates,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "One dispatch–combine round trip, hidden {HIDDEN}, bf16, two processes of one host, no compute.")?;
        writeln!(f, "The limit is a raw TCP echo (nodelay) of the same bytes: ratio 1. µs, median (p90).")?;
        writeln!(f, "Whole: f32 rows planned, encoded, sent; received, checked, weighed and summed in f32.")?;
        let heads = ["Exchange, TCP", "Exchange, unix", "whole, TCP", "whole, unix"];
        write!(f, "{:>5} {:>8} {:>15}", "rows", "KiB", "raw TCP = limit")?;
        heads.iter().try_for_each(|head| write!(f, " {head:>15} {:>5}", "÷ raw"))?;
        writeln!(f)?;
        for case in &self.cases {
            let cell = |samples: &Samples| format!("{:.0} ({:.0})", samples.median(), samples.p90());
            write!(f, "{:>5} {:>8} {:>15}", case.rows, case.bytes() / 1024, cell(&case.raw))?;
            for samples in [&case.exchange, &case.local, &case.whole, &case.whole_local] {
                write!(f, " {:>15} {:>5.2}", cell(samples), samples.median() / case.raw.median())?;
            }
            writeln!(f)?;
        }
        let ([tcp, local], (rows, at_once)) = (&self.rates, RATE);
        writeln!(
            f,
            "One router, {at_once} x {rows} rows under way, FP8 out, BF16 back, weighted sum, far side included;"
        )?;
        let cell = |rate: &Samples| format!("{:.0} ({:.0})", rate.median(), rate.quantile(1.0));
        writeln!(
            f,
            "rows/s, median (best) of {} windows: {} over TCP, {} over a Unix socket.",
            WINDOWS.0 - 1,
            cell(tcp),
            cell(local)
        )
    }
}
