//! A GPU: what the experts of one layer cost a worker there by the number of rows, beside the time that reading their weights
//! takes and beside libtorch's products, of groups and one by one; then a whole cluster on it beside transformers. In: checkpoints of
//! DeepSeek-V2-Lite's layers, made here. Out: microseconds and ratios. Where there is no GPU the reason is the error.

use std::fmt;
use std::time::Instant;

use anyhow::Context;
use conclave_model::checkpoint::Checkpoint;
use conclave_model::compute::{self, ExpertBatch, side_by_side};
use conclave_model::device::{Compute, Device, Dtype, Numerics, init_thread};
use conclave_model::expert::Expert;
use conclave_model::plain;
use rand::rngs::StdRng;
use rand::seq::index::sample;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::checkpoint::{self, V2_LITE_TOP, Weights};
use crate::decode;
use crate::stats::Samples;

const DEVICE: Device = Device::Cuda(0);
/// The layer whose experts are measured.
const LAYER: u32 = 1;
/// Rows of a batch, each of which goes to as many experts as the model's top.
const ROWS: [usize; 6] = [1, 4, 16, 64, 256, 1024];
/// Batches of each side that count, after some that do not: there libtorch chooses kernels and takes memory.
const BATCHES: usize = 40;
const UNCOUNTED: usize = 5;

#[derive(Debug)]
pub(crate) struct Report {
    /// Bytes a second.
    bandwidth: f64,
    cases: Vec<Case>,
    cluster: decode::Report,
}

#[derive(Debug)]
struct Case {
    weights: Weights,
    rows: usize,
    /// Mean of the experts that a batch's rows went to.
    experts: f64,
    /// Of one expert on the GPU.
    bytes: u64,
    /// Microseconds, f32 rows in and out.
    ours: Samples,
    /// As libtorch has them; of BF16 weights only.
    groups: Option<Samples>,
    one_by_one: Option<Samples>,
}

/// Makes the checkpoints where they are missing, and measures.
pub(crate) async fn measure() -> anyhow::Result<Report> {
    let (bandwidth, cases) = tokio::task::spawn_blocking(experts).await??;
    Ok(Report { bandwidth, cases, cluster: decode::measure(DEVICE, None).await? })
}

fn experts() -> anyhow::Result<(f64, Vec<Case>)> {
    DEVICE.open()?;
    init_thread(1);
    let bandwidth = plain::copied_a_second(DEVICE);
    let mut cases = Vec::new();
    for weights in [Weights::Bf16, Weights::Fp8] {
        let checkpoint = Checkpoint::open(&checkpoint::v2_lite(weights)?)?;
        let compute = Compute { device: DEVICE, dtype: Dtype::Bf16, numerics: Numerics::Fast };
        let load = |(_, expert)| Expert::load(&checkpoint, LAYER, expert, compute);
        let here = || checkpoint::v2_lite_experts().filter(|(layer, _)| *layer == LAYER);
        let alone: Vec<Expert> = here().map(load).collect::<Result<_, _>>()?;
        let mut together: Vec<Expert> = here().map(load).collect::<Result<_, _>>()?;
        side_by_side(&mut together.iter_mut().collect::<Vec<_>>());
        for rows in ROWS {
            eprintln!("gpu: experts, {weights:?}, {rows} rows");
            cases.push(in_turns(&alone, &together, weights, rows)?);
        }
    }
    Ok((bandwidth, cases))
}

fn in_turns(alone: &[Expert], together: &[Expert], weights: Weights, rows: usize) -> anyhow::Result<Case> {
    let (mut ours, mut chosen) = (Samples::default(), 0);
    let libtorch = || (weights == Weights::Bf16).then(Samples::default);
    let (mut groups, mut one_by_one) = (libtorch(), libtorch());
    let mut random = StdRng::seed_from_u64(rows as u64);
    for nth in 0..UNCOUNTED + BATCHES {
        let batch = drawn(rows, alone.len(), &mut random);
        let timed = |run: Run, experts: &[Expert], samples: &mut Samples| {
            let began = Instant::now();
            let computed = run(&[&batch], experts)?;
            std::hint::black_box(computed.first().context("one batch gives one answer")?);
            if nth >= UNCOUNTED {
                samples.push_us(began.elapsed());
            }
            anyhow::Ok(())
        };
        timed(by_the_quickest, together, &mut ours)?;
        if let (Some(groups), Some(one_by_one)) = (&mut groups, &mut one_by_one) {
            timed(by_libtorch, together, groups)?;
            timed(by_libtorch, alone, one_by_one)?;
        }
        let mut ids = batch.expert_ids;
        ids.sort_unstable();
        ids.dedup();
        chosen += ids.len();
    }
    let experts = chosen as f64 / (UNCOUNTED + BATCHES) as f64;
    let bytes = alone.first().context("a layer has experts")?.bytes();
    Ok(Case { weights, rows, experts, bytes, ours, groups, one_by_one })
}

type Run = fn(&[&ExpertBatch], &[Expert]) -> Result<Vec<compute::Computed>, compute::Error>;

fn by_the_quickest(batches: &[&ExpertBatch], experts: &[Expert]) -> Result<Vec<compute::Computed>, compute::Error> {
    compute::run(batches, &|id| experts.get(usize::from(id)))
}

fn by_libtorch(batches: &[&ExpertBatch], experts: &[Expert]) -> Result<Vec<compute::Computed>, compute::Error> {
    compute::run_by_libtorch(batches, &|id| experts.get(usize::from(id)))
}

/// Rows that each go to other experts.
fn drawn(rows: usize, experts: usize, random: &mut StdRng) -> ExpertBatch {
    let (hidden, _) = checkpoint::v2_lite_expert();
    ExpertBatch {
        layer: LAYER,
        rows,
        hidden: (0..rows * hidden).map(|_| random.random_range(-1.0..1.0)).collect(),
        expert_ids: (0..rows).flat_map(|_| sample(random, experts, V2_LITE_TOP)).map(|id| id as u16).collect(),
        row_ids: (0..rows as u32).flat_map(|row| std::iter::repeat_n(row, V2_LITE_TOP)).collect(),
        weights: None,
    }
}

impl Case {
    /// Bytes of weights a second, where each expert's are read once.
    fn rate(&self) -> f64 {
        self.experts * self.bytes as f64 / (self.ours.median() / 1e6)
    }

    /// Above 1: ours is faster than the better of libtorch's ways.
    fn over_libtorch(&self) -> Option<f64> {
        let median = |samples: &Option<Samples>| samples.as_ref().map(Samples::median);
        Some(median(&self.groups)?.min(median(&self.one_by_one)?) / self.ours.median())
    }
}

impl Report {
    pub(crate) fn to_json(&self) -> Value {
        let cases = self.cases.iter().map(|case| {
            json!({
                "weights": format!("{:?}", case.weights).to_lowercase(), "rows": case.rows, "experts": case.experts,
                "expert_bytes": case.bytes, "us": case.ours.to_json(),
                "groups_us": case.groups.as_ref().map(Samples::to_json),
                "one_by_one_us": case.one_by_one.as_ref().map(Samples::to_json),
                "bytes_per_second": case.rate(), "of_bandwidth": case.rate() / self.bandwidth,
                "libtorch_over_ours": case.over_libtorch(),
            })
        });
        json!({
            "device": DEVICE, "bandwidth": self.bandwidth, "experts": cases.collect::<Vec<_>>(),
            "cluster": self.cluster.to_json(),
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hidden, inner) = checkpoint::v2_lite_expert();
        let limit = self.bandwidth / 1e9;
        writeln!(
            f,
            "A layer of experts of 3 × {hidden} × {inner} on {DEVICE}, f32 rows in, BF16 out, each row through {V2_LITE_TOP}; medians of"
        )?;
        writeln!(f, "{BATCHES} batches. Copying within its memory reads and writes {limit:.0} GB/s in this run.")?;
        writeln!(
            f,
            "{:>8} {:>6} {:>8} {:>8} {:>6} {:>11} {:>21} {:>25} {:>17}",
            "weights",
            "rows",
            "experts",
            "µs",
            "GB/s",
            "% of limit",
            "libtorch's groups, µs",
            "libtorch one by one, µs",
            "libtorch ÷ ours"
        )?;
        for case in &self.cases {
            let (rate, of_limit) = (case.rate() / 1e9, 100.0 * case.rate() / self.bandwidth);
            let or_none =
                |value: Option<f64>, digits: usize| value.map_or("–".to_owned(), |v| format!("{v:.digits$}"));
            let median = |samples: &Option<Samples>| or_none(samples.as_ref().map(Samples::median), 0);
            writeln!(
                f,
                "{:>8} {:>6} {:>8.1} {:>8.0} {rate:>6.0} {of_limit:>11.0} {:>21} {:>25} {:>17}",
                format!("{:?}", case.weights).to_lowercase(),
                case.rows,
                case.experts,
                case.ours.median(),
                median(&case.groups),
                median(&case.one_by_one),
                or_none(case.over_libtorch(), 2)
            )?;
        }
        writeln!(f)?;
        self.cluster.fmt(f)
    }
}
