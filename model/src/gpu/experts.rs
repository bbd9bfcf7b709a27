//! A layer's experts by our own kernels on a GPU, `experts.cu`.
//!
//! In: rows in their order, experts and the rows that each of them gets. Out: a row for each. Never here: a weight moved, copied
//! or expanded for it; a row whose bits depend on others.

use std::ffi::c_void;

use tch::{Kind, Tensor};

use super::{Error, Kernel, Module, PerGpu, argument};
use crate::{device::Compute, expert::Expert, hidden::Hidden, transfer::placed};

/// Rows of one tile, and tiles that a block of threads may take at once.
const ROWS: usize = 8;
const TILES: [usize; 3] = [1, 2, 4];
/// Outputs that a block of threads makes.
const OUTS: usize = 16;
/// Sizes are whole multiples of what one thread reads at once: 16 bytes, of codes too.
const ALIGNED: usize = 16;
/// A warp's step along the inner dimension has one scale.
const STEP: usize = 64;
/// From this many rows of one expert on, libtorch's products of groups cost less.
const MOST_ROWS: usize = 32;

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Bf16,
    /// E4M3 codes with scales per block of so many by so many.
    Fp8 {
        block: usize,
    },
}

/// A weight `[out, in]` on the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) format: Format,
    pub(crate) values: *const c_void,
    /// f32 `[ceil(out / block), ceil(in / block)]`; null where there are none.
    pub(crate) scales: *const c_void,
}

/// The kernels of one GPU.
#[derive(Debug)]
pub(crate) struct Kernels {
    module: Module,
    /// By format and tiles.
    bf16: [Pair; TILES.len()],
    fp8: [Pair; TILES.len()],
}

#[derive(Clone, Copy, Debug)]
struct Pair {
    gate_and_up: Kernel,
    down: Kernel,
}

impl Kernels {
    /// Those for `compute`, see [`PerGpu::of`].
    pub(crate) fn of(compute: Compute) -> Option<&'static Self> {
        static COMPILED: PerGpu<Kernels> = PerGpu::new();
        COMPILED.of(compute, Self::compile, "libtorch computes experts, FP8 ones as BF16")
    }

    fn compile(index: usize) -> Result<Self, Error> {
        let module = Module::compile(index, "experts.cu", include_str!("experts.cu"))?;
        let pair = |gate_and_up, down| -> Result<Pair, Error> {
            Ok(Pair { gate_and_up: module.kernel(gate_and_up)?, down: module.kernel(down)? })
        };
        let bf16 = [
            pair(c"gate_and_up_bf16_1", c"down_bf16_1")?,
            pair(c"gate_and_up_bf16_2", c"down_bf16_2")?,
            pair(c"gate_and_up_bf16_4", c"down_bf16_4")?,
        ];
        let fp8 = [
            pair(c"gate_and_up_fp8_1", c"down_fp8_1")?,
            pair(c"gate_and_up_fp8_2", c"down_fp8_2")?,
            pair(c"gate_and_up_fp8_4", c"down_fp8_4")?,
        ];
        Ok(Self { module, bf16, fp8 })
    }

    /// Whether experts of these sizes can be computed.
    pub(crate) fn suit(hidden: usize, inner: usize, format: Format) -> bool {
        let one_scale_a_step = match format {
            Format::Bf16 => true,
            Format::Fp8 { block } => block > 0 && block.is_multiple_of(STEP),
        };
        one_scale_a_step && hidden.is_multiple_of(ALIGNED) && inner.is_multiple_of(ALIGNED)
    }

    /// Whether products of groups would be slower for `counts` rows an expert.
    pub(crate) fn beat_groups(counts: &[usize]) -> bool {
        counts.iter().all(|count| *count < MOST_ROWS)
    }

    /// Rows `order` of `rows` `[n, D]` through `experts`, the first `counts[0]` of them through the first and so on; result
    /// `nth` to row `places[nth]` of `[A, D]`. Panics where the experts are none, or of several formats or sizes.
    pub(crate) fn forward(
        &self,
        rows: &Hidden,
        experts: &[&Expert],
        counts: &[usize],
        order: &[usize],
        places: &[usize],
    ) -> Result<Hidden, Error> {
        let (assignments, most) = (order.len(), counts.iter().copied().max().unwrap_or(0));
        let parts: Vec<[Matrix; 3]> = experts.iter().filter_map(|expert| expert.on_gpu()).collect();
        let (Some(any), Some([Matrix { format, .. }, ..])) = (experts.first(), parts.first().copied()) else {
            panic!("experts on a GPU");
        };
        assert!(parts.len() == experts.len() && parts.as_flattened().iter().all(|part| part.format == format));
        let (hidden, inner) = (any.hidden_size(), any.inner_size());
        if assignments == 0 {
            return Ok(rows.run(0, 0));
        }
        assert!(experts.iter().all(|expert| (expert.hidden_size(), expert.inner_size()) == (hidden, inner)));
        assert!(Self::suit(hidden, inner, format) && rows.0.kind() == Kind::BFloat16 && rows.0.is_contiguous());
        assert!(order.iter().all(|row| *row < rows.rows()) && places.iter().all(|place| *place < assignments));
        assert!((places.len(), counts.iter().sum::<usize>()) == (assignments, assignments), "one place each");
        // Everything that the kernels look up, in one piece: groups, order, places.
        let mut first = 0;
        let mut table = Vec::with_capacity(experts.len() * 8 + 2 * assignments);
        for (parts, count) in parts.iter().zip(counts) {
            table.extend(parts.map(|part| part.values as i64));
            table.extend(parts.map(|part| part.scales as i64));
            table.extend([first, *count as i64]);
            first += *count as i64;
        }
        let (order_at, places_at) = (table.len(), table.len() + assignments);
        table.extend(order.iter().chain(places).map(|index| *index as i64));
        let device = rows.0.device();
        let table = placed(&table, device);
        let between = Tensor::empty([assignments as i64, inner as i64], (Kind::BFloat16, device));
        let y = Tensor::empty([assignments as i64, hidden as i64], (Kind::BFloat16, device));

        let nth = TILES.iter().position(|tiles| most <= tiles * ROWS).unwrap_or(TILES.len() - 1);
        let (pair, block) = match format {
            Format::Bf16 => (self.bf16[nth], 1),
            Format::Fp8 { block } => (self.fp8[nth], block),
        };
        let in_table = |at: usize| table.data_ptr().cast::<i64>().wrapping_add(at).cast::<c_void>();
        let blocks = most.div_ceil(TILES[nth] * ROWS);
        let grid = |outs: usize| [outs.div_ceil(OUTS), experts.len(), blocks];
        let launch = |kernel, outs, from: &Tensor, indices: usize, to: &Tensor| {
            let (mut groups, mut from, mut indices, mut to) =
                (in_table(0), from.data_ptr(), in_table(indices), to.data_ptr());
            let mut sizes = [hidden, inner, block].map(|size| i32::try_from(size).unwrap_or(i32::MAX));
            let [hidden, inner, block] = &mut sizes;
            let mut arguments = [
                argument(&mut groups),
                argument(&mut from),
                argument(&mut indices),
                argument(&mut to),
                argument(hidden),
                argument(inner),
                argument(block),
            ];
            // SAFETY: seven values as the kernels declare them. Weights are the experts', of the sizes that they say, and they
            // stay until libtorch frees them, which it does in the order of its stream; so do the tensors of this function. Rows
            // and places were checked above.
            unsafe { self.module.launch(kernel, grid(outs), &mut arguments) }
        };
        launch(pair.gate_and_up, inner, &rows.0, order_at, &between)?;
        launch(pair.down, hidden, &between, places_at, &y)?;
        Ok(Hidden(y))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compute::{ExpertBatch, run},
        device::{Device, Dtype, Numerics},
        made_up_gpu,
    };

    fn experts(count: usize, hidden: usize, inner: usize, format: Format, device: Device) -> Vec<Expert> {
        tch::manual_seed((hidden + inner) as i64);
        let compute = Compute { device, dtype: Dtype::Bf16, numerics: Numerics::Reproducible };
        let one = |_| match format {
            Format::Bf16 => Expert::drawn(hidden, inner, compute),
            Format::Fp8 { block } => Expert::drawn_in_fp8(hidden, inner, block, compute),
        };
        (0..count).map(one).collect()
    }

    /// Row n goes to expert 0, and to another by turns; the last expert gets none.
    fn batch(hidden: usize, rows: usize, experts: usize) -> ExpertBatch {
        let values = Tensor::randn([(rows * hidden) as i64], (Kind::Float, tch::Device::Cpu));
        ExpertBatch {
            layer: 0,
            rows,
            hidden: Vec::try_from(values).expect("f32 values"),
            expert_ids: (0..rows).flat_map(|row| [0, (1 + row % (experts - 2)) as u16]).collect(),
            row_ids: (0..rows as u32).flat_map(|row| [row, row]).collect(),
            weights: None,
        }
    }

    #[test]
    fn kernels_compute_what_the_processor_does_and_every_row_as_if_alone() {
        let gpu = Device::Cuda(0);
        if let Err(error) = gpu.open() {
            return made_up_gpu::again(error);
        }
        let formats = [Format::Bf16, Format::Fp8 { block: 64 }, Format::Fp8 { block: 128 }];
        let sizes = [(16, 16), (128, 64), (144, 48), (272, 336), (2048, 1408)];
        // The last two would take long there.
        let sizes = if made_up_gpu::is_here() { &sizes[..3] } else { &sizes[..] };
        for &(hidden, inner) in sizes {
            for format in formats {
                let (right, ours) =
                    (experts(4, hidden, inner, format, Device::Cpu), experts(4, hidden, inner, format, gpu));
                assert_eq!(ours[0].kernels().map(|(_, format)| format), Some(format), "kernels are there");
                for rows in [1, 2, 8, 9, 17, 33, 100] {
                    let batch = batch(hidden, rows, 4);
                    let compute = |experts: &[Expert], batch: &ExpertBatch| {
                        let mut each = run(&[batch], &|id| experts.get(id as usize)).expect("all are here");
                        each.swap_remove(0).into_f32()
                    };
                    let (right, all) = (compute(&right, &batch), compute(&ours, &batch));
                    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
                    let off = square(&mut all.iter().zip(&right).map(|(a, b)| a - b));
                    let off = (off / square(&mut right.iter().copied())).sqrt();
                    let what = format!("{hidden} x {inner}, {format:?}, {rows} rows");
                    assert!(off < 1e-2, "{what}: off by {off}");
                    for row in [0, rows / 2, rows - 1] {
                        let alone = ExpertBatch {
                            rows: 1,
                            hidden: batch.hidden[row * hidden..][..hidden].to_vec(),
                            expert_ids: batch.expert_ids[2 * row..][..2].to_vec(),
                            row_ids: vec![0, 0],
                            ..batch.clone()
                        };
                        let same = compute(&ours, &alone)
                            .iter()
                            .zip(&all[2 * row * hidden..])
                            .all(|(alone, here)| alone.to_bits() == here.to_bits());
                        assert!(same, "{what}: row {row} has other bits alone");
                    }
                }
            }
        }
    }
}
