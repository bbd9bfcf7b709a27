//! The cost of sending rows to an expert worker in another process and having them back, without any compute. Out: for
//! each number of rows the time of a raw TCP echo of the same bytes, which is the limit, and of the `Exchange` stream
//! beside it. The two are measured in turns, so a machine that slows down slows both.
//!
//! The caller's thread is none of the runtime's own, as with the router's engine: each batch crosses to the network's
//! threads and back.

use std::fmt;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use conclave_model::wire::{self as codec, Encoding};
use conclave_proto::expert::EXCHANGE_PATH;
use conclave_proto::expert::v1 as wire;
use conclave_proto::expert::v1::combine_batch::Outcome;
use conclave_runtime::channel;
use conclave_runtime::stream::{self, Message, Outbox};
use conclave_runtime::wire_thread::WireThread;
use prost::Message as _;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::stats::Samples;

const HIDDEN: usize = 2048;
/// Rows a batch, and round trips of each kind a round: the larger, the fewer are needed for a steady median.
const CASES: [(usize, usize); 4] = [(1, 50), (8, 50), (64, 25), (512, 8)];
/// The first warms up and is not counted.
const ROUNDS: usize = 21;

/// What was measured for one number of rows, in microseconds.
#[derive(Debug)]
struct Case {
    rows: usize,
    trips: usize,
    raw: Samples,
    exchange: Samples,
    /// As `exchange`, from f32 rows to f32 rows: encoding before and decoding after are counted too.
    with_codec: Samples,
}

#[derive(Debug)]
pub(crate) struct Report(Vec<Case>);

/// Measures all cases against a fresh echo process.
pub(crate) async fn measure() -> anyhow::Result<Report> {
    let far = Far::start().await?;
    let mut raw = Raw::connect(&far.raw)?;
    let mut exchange = Exchange::connect(&far.exchange).await?;
    let mut report = Report(CASES.map(|(rows, trips)| Case::new(rows, trips)).into());
    for round in 0..ROUNDS {
        for case in &mut report.0 {
            case.measure_round(&mut raw, &mut exchange, round > 0).await?;
        }
    }
    drop(exchange);
    far.stop().await?;
    Ok(report)
}

impl Case {
    fn new(rows: usize, trips: usize) -> Self {
        Self { rows, trips, raw: Samples::default(), exchange: Samples::default(), with_codec: Samples::default() }
    }

    fn bytes(&self) -> usize {
        self.rows * Encoding::Bf16.row_bytes(HIDDEN)
    }

    /// One of each after the other, so that each finds the far process asleep, as a router finds it in mid-step: a
    /// tight loop of one kind would keep both ends awake on warm caches.
    async fn measure_round(&mut self, raw: &mut Raw, exchange: &mut Exchange, count: bool) -> anyhow::Result<()> {
        let values: Vec<f32> = (0..self.rows * HIDDEN).map(|i| (i % 251) as f32 / 64.0 - 2.0).collect();
        let (hidden, _) = codec::encode(&values, HIDDEN, Encoding::Bf16);
        let framed = framed(&hidden)?;
        for _ in 0..self.trips {
            let started = Instant::now();
            raw.round_trip(&framed)?;
            let raw_took = started.elapsed();

            let batch = dispatch_batch(self.rows, hidden.clone())?;
            let started = Instant::now();
            let rows = exchange.round_trip(batch).await?;
            let exchange_took = started.elapsed();
            ensure!(rows == hidden, "the echo changed {} rows", self.rows);

            let started = Instant::now();
            let (hidden, _) = codec::encode(&values, HIDDEN, Encoding::Bf16);
            let rows = exchange.round_trip(dispatch_batch(self.rows, hidden)?).await?;
            let rows = codec::decode(Encoding::Bf16, &rows, &[], self.rows, HIDDEN)?;
            let codec_took = started.elapsed();
            ensure!(rows == values, "the codec changed {} rows", self.rows);

            if count {
                self.raw.push_us(raw_took);
                self.exchange.push_us(exchange_took);
                self.with_codec.push_us(codec_took);
            }
        }
        Ok(())
    }
}

/// One assignment a row, so that as many bytes come back as went out.
fn dispatch_batch(rows: usize, hidden: Bytes) -> anyhow::Result<wire::DispatchBatch> {
    let rows = u32::try_from(rows)?;
    Ok(wire::DispatchBatch {
        layer: 1,
        plan_version: 1,
        deadline_us: 1_000_000,
        encoding: wire::Encoding::Bf16.into(),
        rows,
        hidden,
        expert_ids: (0..rows).flat_map(|row| ((row % 64) as u16).to_le_bytes()).collect(),
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
    raw: String,
    exchange: String,
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
        Ok(Self {
            raw: address("raw")?,
            exchange: address(if std::env::var_os("LOCAL").is_some() { "local" } else { "exchange" })?,
            child,
        })
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

/// One `Exchange` stream as the router holds it.
struct Exchange {
    outbox: Outbox,
    answers: mpsc::Receiver<Bytes>,
    batch_id: u64,
    _wire: WireThread,
}

impl Exchange {
    async fn connect(address: &str) -> anyhow::Result<Self> {
        let wire = WireThread::start("wire")?;
        let address = address.to_owned();
        let opening = wire.spawn(async move {
            let socket = if address.starts_with("conclave") {
                channel::local(&address).await?
            } else {
                channel::tcp(&address).await?
            };
            anyhow::Ok(stream::open(socket, "bench", EXCHANGE_PATH, &[]).await?)
        });
        let (outbox, mut inbox) = opening.await??;
        let (arrived, answers) = mpsc::channel(16);
        wire.spawn(async move {
            while let Ok(Some(message)) = inbox.next().await {
                if arrived.send(message).await.is_err() {
                    break;
                }
            }
        });
        Ok(Self { outbox, answers, batch_id: 0, _wire: wire })
    }

    async fn round_trip(&mut self, mut batch: wire::DispatchBatch) -> anyhow::Result<Bytes> {
        self.batch_id += 1;
        batch.batch_id = self.batch_id;
        let mut message = Message::with_capacity(batch.encoded_len());
        batch.encode(message.body())?;
        self.outbox.send(message.finish()?).await?;
        let answer = self.answers.recv().await.context("the stream ended")?;
        let answer = wire::CombineBatch::decode(answer)?;
        ensure!(answer.batch_id == self.batch_id, "batch {} was answered by {}", self.batch_id, answer.batch_id);
        match answer.outcome {
            Some(Outcome::Returned(returned)) => Ok(returned.rows),
            outcome => bail!("the echo answered {outcome:?}"),
        }
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let cases = self.0.iter().map(|case| {
            json!({
                "rows": case.rows,
                "bytes_each_way": case.bytes(),
                "raw_tcp_us": case.raw.to_json(),
                "exchange_us": case.exchange.to_json(),
                "with_codec_us": case.with_codec.to_json(),
                "exchange_over_raw_tcp": case.exchange.median() / case.raw.median(),
                "with_codec_over_raw_tcp": case.with_codec.median() / case.raw.median(),
            })
        });
        json!({ "hidden": HIDDEN, "encoding": "bf16", "cases": cases.collect::<Vec<_>>() })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "One dispatch–combine round trip, hidden {HIDDEN}, bf16, two processes over loopback TCP, no compute."
        )
        .and_then(|()| {
            writeln!(f, "The limit is a raw TCP echo (nodelay) of the same bytes: ratio 1. µs, median (p90).")
        })?;
        let (raw, exchange, codec) = ("raw TCP = limit", "Exchange stream", "and f32 ⇄ bf16");
        writeln!(
            f,
            "{:>6} {:>14} {raw:>19} {exchange:>19} {:>6} {codec:>19} {:>6}",
            "rows", "KiB each way", "÷ raw", "÷ raw"
        )?;
        for case in &self.0 {
            let cell = |samples: &Samples| format!("{:.0} ({:.0})", samples.median(), samples.p90());
            let ratio = |samples: &Samples| samples.median() / case.raw.median();
            let [raw, exchange, codec] = [&case.raw, &case.exchange, &case.with_codec].map(cell);
            let (kib, rows) = (case.bytes() / 1024, case.rows);
            let (plain, coded) = (ratio(&case.exchange), ratio(&case.with_codec));
            writeln!(f, "{rows:>6} {kib:>14} {raw:>19} {exchange:>19} {plain:>6.2} {codec:>19} {coded:>6.2}")?;
        }
        Ok(())
    }
}
