//! A stored weight as the kernels see it. In: memory that somebody else keeps. Out: its rows. Never here: a copy.

use std::ops::Range;

use half::bf16;

/// `W: [out, inner]`, row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    pub(crate) values: Values<'a>,
    pub(crate) out: usize,
    pub(crate) inner: usize,
}

/// The values of it, `[out, inner]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    /// E4M3 codes, and a scale per block of `block` by `block`: `[ceil(out / block), ceil(inner / block)]`. As
    /// DeepSeek-V3 stores its weights (`weight_scale_inv`; `inference/kernel.py`, `weight_dequant`).
    Fp8 {
        codes: &'a [u8],
        scales: &'a [f32],
        block: usize,
    },
}

impl<'a> Matrix<'a> {
    /// Panics where the values are not as many as the shape says, which whoever read them has checked.
    pub(crate) fn new(values: Values<'a>, out: usize, inner: usize) -> Self {
        let (len, scales) = match values {
            Values::F32(values) => (values.len(), true),
            Values::Bf16(values) => (values.len(), true),
            Values::Fp8 { codes, scales, block } => {
                (codes.len(), block > 0 && scales.len() == out.div_ceil(block) * inner.div_ceil(block))
            }
        };
        assert!(len == out * inner && scales, "{len} values are no [{out}, {inner}]");
        Self { values, out, inner }
    }

    /// Bytes of one row's values.
    pub(crate) fn row_bytes(&self) -> usize {
        self.inner
            * match self.values {
                Values::F32(_) => 4,
                Values::Bf16(_) => 2,
                Values::Fp8 { .. } => 1,
            }
    }

    /// Where row `out` begins; for fetching only, it may lie past the end.
    pub(crate) fn row(&self, out: usize) -> *const u8 {
        let start = match self.values {
            Values::F32(values) => values.as_ptr().cast::<u8>(),
            Values::Bf16(values) => values.as_ptr().cast(),
            Values::Fp8 { codes, .. } => codes.as_ptr(),
        };
        start.wrapping_add(out * self.row_bytes())
    }

    /// Where the sum over the inner dimension stops to be scaled: one stretch without scales, one per block with them.
    pub(crate) fn stretches(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let (inner, step) = match self.values {
            Values::Fp8 { block, .. } => (self.inner, block),
            _ => (self.inner, self.inner.max(1)),
        };
        (0..inner).step_by(step).map(move |start| start..(start + step).min(inner))
    }

    /// What the products of row `out` in the stretch that `start` begins are multiplied by.
    pub(crate) fn scale(&self, out: usize, start: usize) -> f32 {
        match self.values {
            Values::Fp8 { scales, block, .. } => scales[out / block * self.inner.div_ceil(block) + start / block],
            _ => 1.0,
        }
    }
}
