//! Rows of hidden values: the residual stream, and what experts see and return.
//!
//! In: f32 values, or tensors of this crate. Out: the same. Never here: what the rows mean.

use tch::{Device, Kind, Tensor};

use crate::{
    device::Compute,
    kernels::{Isa, Rows, rowwise, tensor},
    transfer::{Leaving, fetched, leaving, placed, sent},
};

/// Rows `[T, D]` in the format that the model computes in.
#[derive(Debug)]
pub struct Hidden(pub(crate) Tensor);

impl Hidden {
    /// f32 values `[n, hidden]` as rows for `compute`. Panics where `values` is no whole number of rows.
    pub fn from_rows(values: &[f32], hidden: usize, compute: Compute) -> Self {
        assert_eq!(values.len() % hidden, 0, "rows of {hidden}");
        let size = [(values.len() / hidden) as i64, hidden as i64];
        Self(sent(on_the_processor(values, &size, compute.kind()), compute.torch_device()))
    }

    /// `self + other`, both `[T, D]`.
    pub(crate) fn plus(&self, other: &Tensor) -> Self {
        if self.0.device() == Device::Cpu { self.sum(self.to_rows(), other) } else { Self(&self.0 + other) }
    }

    /// `self + (values + other)` in f32, rounded once; on the processor.
    pub(crate) fn plus_values(&self, values: &[f32], other: Option<&Tensor>) -> Self {
        let mut sum = values.to_vec();
        if let Some(other) = other {
            add(&mut sum, other);
        }
        self.sum(sum, &self.0)
    }

    /// `sum + other`, rounded to this one's format.
    fn sum(&self, mut sum: Vec<f32>, other: &Tensor) -> Self {
        add(&mut sum, other);
        Self(on_the_processor(&sum, &self.0.size(), self.0.kind()))
    }

    /// f32 values in the shape, format and place of `other`.
    pub(crate) fn like(other: &Self, values: &[f32]) -> Self {
        Self(sent(on_the_processor(values, &other.0.size(), other.0.kind()), other.0.device()))
    }

    /// T.
    pub fn rows(&self) -> usize {
        self.0.size()[0] as usize
    }

    /// The values as f32 `[T, D]`.
    pub fn to_rows(&self) -> Vec<f32> {
        tensor::rows(&self.here().0).to_f32(Isa::best())
    }

    /// The same, contiguous, on the processor.
    pub(crate) fn here(&self) -> Self {
        let [rows] = fetched([self.0.contiguous()]);
        Self(rows)
    }

    /// The same, not waited for so far.
    pub(crate) fn leaving(&self) -> Leaving<1> {
        leaving([self.0.contiguous()])
    }

    /// The rows numbered `rows`, in that order; each below T.
    pub fn at(&self, rows: &[usize]) -> Self {
        self.select(&rows.iter().map(|&row| row as i64).collect::<Vec<_>>())
    }

    /// `len` rows from `first` on, in the same memory.
    pub(crate) fn run(&self, first: usize, len: usize) -> Self {
        Self(self.0.narrow(0, first as i64, len as i64))
    }

    /// The rows of all of `parts`, which are some.
    pub(crate) fn one_after_the_other(parts: &[Self]) -> Self {
        Self(Tensor::cat(&parts.iter().map(|part| &part.0).collect::<Vec<_>>(), 0))
    }

    /// The rows at `indices`, in that order.
    pub(crate) fn select(&self, indices: &[i64]) -> Self {
        Self(self.0.index_select(0, &placed(indices, self.0.device())))
    }
}

/// `values` in the shape `size`, rounded to `kind`.
fn on_the_processor(values: &[f32], size: &[i64], kind: Kind) -> Tensor {
    let rows = Tensor::empty(size, (kind, Device::Cpu));
    assert_eq!(rows.numel(), values.len(), "as many values as places");
    // SAFETY: it is as large as what is written, and nobody else's yet.
    #[allow(unsafe_code)]
    unsafe {
        tensor::out(&rows).write(0, values);
    }
    rows
}

fn add(sum: &mut [f32], values: &Tensor) {
    match tensor::rows(&values.contiguous()) {
        Rows::F32(values) => rowwise::add_times(Isa::best(), sum, 1.0, values),
        Rows::Bf16(values) => rowwise::add_bf16(Isa::best(), sum, values),
    }
}
