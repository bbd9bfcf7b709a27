//! Experts on a GPU, made up where this machine has none: what a worker makes of rows there is what the processor makes of them, with
//! experts that lie side by side and one by one, and while some come and go.

mod made_up_gpu;

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context, Result, ensure};
use conclave_model::{
    checkpoint::Checkpoint,
    compute::{self, Computed, ExpertBatch, side_by_side},
    device::{Compute, Device, Dtype, Numerics, init_thread},
    expert::Expert,
};

/// The first layer with experts of the golden models, and their number there.
const LAYER: u32 = 1;

type Experts = BTreeMap<u16, Expert>;

/// Every expert of the layer.
fn experts(checkpoint: &Checkpoint, compute: Compute) -> Result<Experts> {
    let all = 0..checkpoint.config().n_routed_experts as u16;
    all.map(|id| Ok((id, Expert::load(checkpoint, LAYER, id.into(), compute)?))).collect()
}

/// `rows` rows of which the nth goes to experts n, n + 1 and so on by turns, `per_row` of them; some in none.
fn batch(hidden: usize, rows: usize, per_row: usize, ids: &[u16]) -> ExpertBatch {
    let assignments = || (0..rows).flat_map(|row| (0..per_row).map(move |nth| (row, nth)));
    ExpertBatch {
        layer: LAYER,
        rows,
        hidden: (0..rows * hidden).map(|nth| ((nth * 37 % 64) as f32 - 32.0) / 32.0).collect(),
        expert_ids: assignments().map(|(row, nth)| ids[(row * 3 + nth * nth) % ids.len()]).collect(),
        row_ids: assignments().map(|(row, _)| row as u32).collect(),
        weights: None,
    }
}

fn computed(batches: &[&ExpertBatch], experts: &Experts) -> Result<Vec<f32>> {
    let each = compute::run(batches, &|id| experts.get(&id))?;
    Ok(each.into_iter().flat_map(Computed::into_f32).collect())
}

fn lay_out(experts: &mut Experts) {
    side_by_side(&mut experts.values_mut().collect::<Vec<_>>());
}

/// The root mean square of the difference, as a share of theirs.
fn off(ours: &[f32], right: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let difference = square(&mut ours.iter().zip(right).map(|(a, b)| a - b));
    (difference / square(&mut right.iter().copied())).sqrt()
}

fn golden(name: &str) -> Result<Checkpoint> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    Checkpoint::open(&folder).with_context(|| folder.display().to_string())
}

#[test]
fn experts_on_a_gpu_compute_what_they_do_on_the_processor() -> Result<()> {
    let device = Device::Cuda(0);
    if let Err(error) = device.open() {
        made_up_gpu::again(error);
        return Ok(());
    }
    init_thread(1);
    for name in ["v2_lite", "moonlight", "kimi_k2", "v3_fp8", "v3_aligned"] {
        let checkpoint = golden(name)?;
        let hidden = checkpoint.config().hidden_size;
        let on = |device| Compute { device, dtype: Dtype::Bf16, numerics: Numerics::Fast };
        let right = experts(&checkpoint, on(Device::Cpu))?;
        let (alone, mut together) = (experts(&checkpoint, on(device))?, experts(&checkpoint, on(device))?);
        lay_out(&mut together);
        let ids: Vec<u16> = right.keys().copied().collect();
        for rows in [1, 2, 7, 64, 300] {
            // One that leaves experts without rows, and one that comes along.
            let (one, other) = (batch(hidden, rows, 2, &ids), batch(hidden, rows, 1, &ids[1..2]));
            for batches in [&[&one][..], &[&other], &[&one, &other]] {
                let right = computed(batches, &right)?;
                for (how, experts) in [("one by one", &alone), ("side by side", &together)] {
                    let off = off(&computed(batches, experts)?, &right);
                    ensure!(off < 1e-2, "{name}, {rows} rows, {how}: off by {off}");
                }
            }
        }
        // One goes, another comes back: who stays computes what it did.
        let (gone, came) = (ids[2], experts(&checkpoint, on(device))?.remove(&ids[2]));
        together.remove(&gone);
        lay_out(&mut together);
        let rest: Vec<u16> = together.keys().copied().collect();
        let some = batch(hidden, 9, 2, &rest);
        ensure!(off(&computed(&[&some], &together)?, &computed(&[&some], &right)?) < 1e-2, "{name}: without {gone}");
        together.insert(gone, came.context("it was loaded")?);
        let all = batch(hidden, 9, 2, &ids);
        ensure!(off(&computed(&[&all], &together)?, &computed(&[&all], &right)?) < 1e-2, "{name}: {gone} alone");
        lay_out(&mut together);
        ensure!(off(&computed(&[&all], &together)?, &computed(&[&all], &right)?) < 1e-2, "{name}: {gone} is back");
    }
    Ok(())
}
