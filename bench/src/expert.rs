//! One expert of DeepSeek-V2-Lite's shape, by the number of rows: our own way through it (as a worker calls it: f32 rows in
//! and out), against the time that reading its weights must take and against libtorch's plain products in bf16. Weights are
//! bf16, and FP8 as stored. Experts are taken in turns out of more than caches hold, both sides on the same cores, so that
//! weights come from memory.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use conclave_model::checkpoint::Checkpoint;
use conclave_model::compute::{self, ExpertBatch};
use conclave_model::device::{Compute, Device, Dtype, Numerics, init_thread};
use conclave_model::expert::Expert;
use conclave_model::plain::{PlainExpert, PlainRows};
use serde_json::{Value, json};

use crate::bandwidth;
use crate::checkpoint::{self, Weights};
use crate::stats::Samples;

/// Rows, and calls of each side: the fewer rows, the more are needed for a steady median.
const CASES: [(usize, usize); 6] = [(1, 144), (4, 144), (16, 144), (64, 72), (256, 36), (1024, 18)];
/// Experts in turns: 1.2 GB in bf16. The other half of what is loaded is the other side's, where it must be expanded.
const EXPERTS: usize = 72;
const THREADS: usize = 2;
/// Calls of one side before it is the other's turn: each gets the machine to itself.
const CALLS_A_TURN: usize = 12;
/// And how long its first calls are not counted: a size's kernels are chosen and memory is had, and the other side's threads
/// spin on for some milliseconds, during which the faster has more calls.
const UNCOUNTED: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(crate) struct Report {
    threads: usize,
    /// Bytes a second.
    bandwidth: f64,
    cases: Vec<Case>,
}

#[derive(Debug)]
struct Case {
    weights: Weights,
    /// Of one expert as stored, scales included.
    bytes: u64,
    rows: usize,
    /// Microseconds.
    ours: Samples,
    libtorch: Samples,
}

/// Makes the checkpoints where they are missing, loads experts of each and measures.
pub(crate) async fn measure() -> anyhow::Result<Report> {
    tokio::task::spawn_blocking(|| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS);
        init_thread(threads);
        eprintln!("expert: read bandwidth");
        let bandwidth = bandwidth::read(threads);
        let mut cases = Vec::new();
        for weights in [Weights::Bf16, Weights::Fp8] {
            cases.extend(in_turns(&checkpoint::v2_lite(weights)?, weights)?);
        }
        Ok(Report { threads, bandwidth, cases })
    })
    .await?
}

fn in_turns(folder: &Path, weights: Weights) -> anyhow::Result<Vec<Case>> {
    let checkpoint = Checkpoint::open(folder)?;
    let compute = Compute { device: Device::Cpu, dtype: Dtype::Bf16, numerics: Numerics::Fast };
    let (hidden, _) = checkpoint::v2_lite_expert();
    let mut experts = Vec::new();
    for (layer, expert) in checkpoint::v2_lite_experts().take(EXPERTS) {
        let ours = Expert::load(&checkpoint, layer, expert, compute)?;
        experts.push((ours, PlainExpert::load(&checkpoint, layer, expert)?));
    }
    let values: Vec<f32> = (0..hidden).map(|i| (i % 251) as f32 / 128.0 - 1.0).collect();
    // Every page is there before the first call is timed.
    for (ours, plain) in &experts {
        call(ours, &batch(&values, 1))?;
        plain.forward(&PlainRows::new(&values, hidden));
    }
    let mut cases = Vec::new();
    for (rows, calls) in CASES {
        eprintln!("expert: {weights:?}, {rows} rows");
        let values = values.repeat(rows);
        let (batch, plain_rows) = (batch(&values, rows), PlainRows::new(&values, hidden));
        let (mut ours, mut libtorch) = (Samples::default(), Samples::default());
        let [mut ours_turn, mut libtorch_turn] =
            [0, experts.len() / 2].map(|first| (first..).map(|n| n % experts.len()));
        for _ in 0..calls.div_ceil(CALLS_A_TURN) {
            turn(&mut ours, &mut ours_turn, |expert| {
                std::hint::black_box(call(&experts[expert].0, &batch)?);
                Ok(())
            })?;
            turn(&mut libtorch, &mut libtorch_turn, |expert| {
                std::hint::black_box(experts[expert].1.forward(&plain_rows));
                Ok(())
            })?;
        }
        cases.push(Case { weights, bytes: checkpoint.expert_bytes(), rows, ours, libtorch });
    }
    Ok(cases)
}

/// Some calls of one side, on one expert after the other.
fn turn(
    side: &mut Samples,
    experts: &mut impl Iterator<Item = usize>,
    mut call: impl FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (turn, mut counted) = (Instant::now(), 0);
    while counted < CALLS_A_TURN {
        let expert = experts.next().context("experts go round")?;
        let began = Instant::now();
        call(expert)?;
        if began.duration_since(turn) >= UNCOUNTED {
            side.push_us(began.elapsed());
            counted += 1;
        }
    }
    Ok(())
}

/// All rows through one expert.
fn batch(values: &[f32], rows: usize) -> ExpertBatch {
    ExpertBatch {
        layer: 1,
        rows,
        hidden: values.to_vec(),
        expert_ids: vec![0; rows],
        row_ids: (0..rows as u32).collect(),
        weights: None,
    }
}

fn call(expert: &Expert, batch: &ExpertBatch) -> anyhow::Result<compute::Computed> {
    let mut computed = compute::run(&[batch], &|_| Some(expert))?;
    computed.pop().context("one batch gives one answer")
}

impl Case {
    /// Bytes of weights a second.
    fn rate(&self) -> f64 {
        self.bytes as f64 / (self.ours.median() / 1e6)
    }

    fn teraflops(&self) -> f64 {
        let (hidden, inner) = checkpoint::v2_lite_expert();
        (2 * 3 * hidden * inner * self.rows) as f64 / self.ours.median() / 1e6
    }

    /// Above 1: ours is faster.
    fn over_libtorch(&self) -> f64 {
        self.libtorch.median() / self.ours.median()
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let cases = self.cases.iter().map(|case| {
            json!({
                "weights": format!("{:?}", case.weights).to_lowercase(), "bytes": case.bytes, "rows": case.rows,
                "us": case.ours.to_json(), "libtorch_us": case.libtorch.to_json(), "bytes_per_second": case.rate(),
                "of_bandwidth": case.rate() / self.bandwidth, "teraflops": case.teraflops(),
                "libtorch_over_ours": case.over_libtorch(),
            })
        });
        let (hidden, inner) = checkpoint::v2_lite_expert();
        json!({
            "hidden": hidden, "inner": inner, "threads": self.threads, "experts_in_turns": EXPERTS,
            "read_bandwidth": self.bandwidth, "cases": cases.collect::<Vec<_>>(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hidden, inner) = checkpoint::v2_lite_expert();
        let threads = self.threads;
        writeln!(
            f,
            "One expert of 3 × {hidden} × {inner}, {threads} threads, {EXPERTS} experts in turns; medians. Beside it libtorch's plain"
        )?;
        writeln!(
            f,
            "products in bf16, of FP8 weights expanded to bf16. Read bandwidth in this run: {:.1} GB/s.",
            self.bandwidth / 1e9
        )?;
        writeln!(
            f,
            "{:>8} {:>6} {:>10} {:>8} {:>12} {:>9} {:>13} {:>17}",
            "weights", "rows", "µs", "GB/s", "% of limit", "TFLOP/s", "libtorch, µs", "libtorch ÷ ours"
        )?;
        for case in &self.cases {
            let (rate, of_limit) = (case.rate() / 1e9, 100.0 * case.rate() / self.bandwidth);
            writeln!(
                f,
                "{:>8} {:>6} {:>10.0} {rate:>8.1} {of_limit:>12.0} {:>9.2} {:>13.0} {:>17.2}",
                format!("{:?}", case.weights).to_lowercase(),
                case.rows,
                case.ours.median(),
                case.teraflops(),
                case.libtorch.median(),
                case.over_libtorch()
            )?;
        }
        Ok(())
    }
}
