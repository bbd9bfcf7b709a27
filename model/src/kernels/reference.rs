//! What a product is, in as few words as it takes: what every kernel is compared with, in f64.

use super::matrix::{Matrix, Values};
use crate::checkpoint::fp8::decode_e4m3;

/// `W[out][inner]`, its scale applied.
pub(super) fn value(matrix: &Matrix<'_>, out: usize, inner: usize) -> f64 {
    let at = out * matrix.inner + inner;
    match matrix.values {
        Values::F32(values) => f64::from(values[at]),
        Values::Bf16(values) => f64::from(values[at].to_f32()),
        Values::Fp8 { codes, .. } => f64::from(decode_e4m3(codes[at])) * f64::from(matrix.scale(out, inner)),
    }
}

/// `y = x W^T`: rows `[rows, inner]` to rows `[rows, out]`.
pub(super) fn product(x: &[f32], matrix: &Matrix<'_>) -> Vec<f64> {
    let row = |x: &[f32]| -> Vec<f64> {
        let dot = |out| x.iter().enumerate().map(|(inner, x)| f64::from(*x) * value(matrix, out, inner)).sum();
        (0..matrix.out).map(dot).collect()
    };
    x.chunks_exact(matrix.inner).flat_map(row).collect()
}

/// The same of absolute values: how large an error rounding may make is a share of this.
pub(super) fn magnitude(x: &[f32], matrix: &Matrix<'_>) -> Vec<f64> {
    let row = |x: &[f32]| -> Vec<f64> {
        let dot = |out| x.iter().enumerate().map(|(inner, x)| (f64::from(*x) * value(matrix, out, inner)).abs()).sum();
        (0..matrix.out).map(dot).collect()
    };
    x.chunks_exact(matrix.inner).flat_map(row).collect()
}
