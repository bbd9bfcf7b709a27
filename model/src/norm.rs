//! Root-mean-square normalisation.
//!
//! In: rows. Out: rows of the same shape and format. Never here: a mean subtracted, a bias added.

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{self, Checkpoint, Weight},
    device::Compute,
    kernels::{Isa, Rows, product::Out, rowwise, team, tensor},
};

/// From this many values on, the team norms.
const VALUES_FOR_TEAM: usize = 1 << 16;

/// `x / sqrt(mean(x^2) + eps) * w`, computed in f32 and, on the processor, cast back before the weight is applied, as
/// DeepSeek's and transformers' implementations do.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Weight,
    /// The same as f32, for kernels; empty on a GPU.
    values: Vec<f32>,
    eps: f64,
}

impl RmsNorm {
    /// Reads `<name>.weight` `[size]`.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        size: usize,
        eps: f64,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let weight = checkpoint.load(&format!("{name}.weight"), &[size])?.to(compute.kind(), compute.torch_device());
        Ok(Self::of(weight, eps))
    }

    pub(crate) fn of(weight: Weight, eps: f64) -> Self {
        let on_cpu = weight.device() == Device::Cpu;
        let values = if on_cpu { tensor::f32s(&weight.to_kind(Kind::Float).contiguous()).to_vec() } else { Vec::new() };
        Self { weight, values, eps }
    }

    /// `[size]`, and epsilon.
    pub(crate) fn parts(&self) -> (&Tensor, f32) {
        (&self.weight, self.eps as f32)
    }

    /// Any shape whose last dimension is the weight's size.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        if x.device() == Device::Cpu { self.by_kernels(x) } else { self.by_libtorch(x) }
    }

    /// What norms a row of f32 values, on the processor.
    pub(crate) fn by_rows(&self) -> RowNorm<'_> {
        RowNorm { weight: &self.values, eps: self.eps as f32 }
    }

    fn by_kernels(&self, x: &Tensor) -> Tensor {
        let (size, x) = (self.values.len(), x.contiguous());
        let y = Tensor::empty(x.size().as_slice(), (x.kind(), Device::Cpu));
        let (rows, out) = (tensor::rows(&x), tensor::out(&y));
        let norm = self.by_rows();
        let row = |row: usize| {
            // SAFETY: row `row` of `y`, which is as large as `x` and nobody else's yet.
            #[allow(unsafe_code)]
            unsafe {
                norm.write(rows.part(row * size, size), out, row * size);
            }
        };
        let count = x.numel() / size;
        if x.numel() < VALUES_FOR_TEAM {
            (0..count).for_each(row);
        } else {
            team::run(count, &row);
        }
        y
    }

    /// The same in one launch of libtorch's, which rounds once, after the weight.
    fn by_libtorch(&self, x: &Tensor) -> Tensor {
        x.rms_norm(self.weight.size(), Some(&*self.weight), self.eps)
    }
}

/// The weight as f32, and epsilon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowNorm<'a> {
    weight: &'a [f32],
    eps: f32,
}

impl RowNorm<'_> {
    /// In place; `rounded` to BF16 as rows of that format are.
    pub(crate) fn apply(self, row: &mut [f32], rounded: bool) {
        rowwise::rms_norm(Isa::best(), row, self.weight, self.eps, rounded);
    }

    /// Of one row, into `out` from `at` on.
    ///
    /// # Safety
    /// There is room for it, which nobody else touches meanwhile.
    #[allow(unsafe_code)]
    unsafe fn write(self, row: Rows<'_>, out: Out<'_>, at: usize) {
        let mut values = row.to_f32(Isa::best());
        self.apply(&mut values, matches!(row, Rows::Bf16(_)));
        // SAFETY: the caller's.
        unsafe { out.write(at, &values) };
    }
}
