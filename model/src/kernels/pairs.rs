//! Products on AVX-512's dot products of BF16 pairs: sixteen running sums per output, of two places of the inner dimension
//! each. In: a strip of outputs and an operand in pairs. Out: f32. Never here: f32 weights, or more than 32 decoded codes at
//! a time.

use std::arch::x86_64::*;

use half::bf16;

use super::{
    e4m3::Tables,
    lanes::add_up,
    matrix::{Matrix, Values},
    operand::{STEP, View},
};

/// Outputs of one strip.
pub(super) const STRIP: usize = 32;
/// Outputs and rows whose sums run at once.
const OUTS: usize = 4;
const ROWS: usize = 4;

/// Outputs `first..first + outs` of `x W^T`, at most 32 of them, into `y` `[T, 32]`. `decoded` is room for the codes of one
/// strip.
///
/// # Safety
/// The processor has AVX-512 with BF16 and VBMI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
pub(super) unsafe fn strip(
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    decoded: &mut Vec<u16>,
) {
    assert!(outs <= STRIP && first + outs <= matrix.out && x.inner() == matrix.inner && y.len() >= x.rows * STRIP);
    y[..x.rows * STRIP].fill(0.0);
    let inner = matrix.inner;
    match matrix.values {
        Values::Bf16(values) => {
            let weights = values.as_ptr().wrapping_add(first * inner).cast::<u16>();
            // SAFETY: rows `first..first + outs` are there.
            unsafe { stretch((weights, inner), 0..inner, outs, x, y, 1.0) };
        }
        Values::Fp8 { codes, .. } => {
            let tables = Tables::new();
            for part in matrix.stretches() {
                let width = part.len().next_multiple_of(2 * STEP);
                decoded.resize(STRIP * width, 0);
                for out in 0..outs {
                    let line = decoded[out * width..][..width].as_mut_ptr();
                    let row = codes[(first + out) * inner + part.start..][..part.len()].as_ptr();
                    // SAFETY: a line of the codes' number, rounded up.
                    unsafe { tables.decode(row, part.len(), line) };
                }
                // A strip lies within one row of blocks: those are whole multiples of it.
                let scale = matrix.scale(first, part.start);
                // SAFETY: `outs` lines are decoded.
                unsafe { stretch((decoded.as_ptr(), width), part, outs, x, y, scale) };
            }
        }
        Values::F32(_) => unreachable!("f32 weights are not multiplied in pairs"),
    }
}

/// Adds the products of one stretch of the inner dimension, scaled, to `y`.
///
/// # Safety
/// As [`strip`]'s; `weights` has `outs` lines of the stretch's values.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
unsafe fn stretch(
    (weights, stride): (*const u16, usize),
    part: std::ops::Range<usize>,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    scale: f32,
) {
    let mut row = 0;
    while row < x.rows {
        let rows = ROWS.min(x.rows - row);
        let mut out = 0;
        while out < outs {
            let lines = weights.wrapping_add(out * stride);
            let y = y.as_mut_ptr().wrapping_add(row * STRIP + out);
            if out + OUTS <= outs {
                // SAFETY: the block lies within the strip and the operand; so below.
                unsafe {
                    match rows {
                        ROWS => block::<OUTS, ROWS>((lines, stride), &part, x, row, y, scale),
                        3 => block::<OUTS, 3>((lines, stride), &part, x, row, y, scale),
                        2 => block::<OUTS, 2>((lines, stride), &part, x, row, y, scale),
                        _ => block::<OUTS, 1>((lines, stride), &part, x, row, y, scale),
                    }
                }
                out += OUTS;
            } else {
                for here in 0..rows {
                    let y = y.wrapping_add(here * STRIP);
                    // SAFETY: as above.
                    unsafe { block::<1, 1>((lines, stride), &part, x, row + here, y, scale) };
                }
                out += 1;
            }
        }
        row += rows;
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
unsafe fn block<const O: usize, const R: usize>(
    (weights, stride): (*const u16, usize),
    part: &std::ops::Range<usize>,
    x: &View<'_>,
    row: usize,
    y: *mut f32,
    scale: f32,
) {
    let rows: [*const bf16; R] = std::array::from_fn(|r| x.pairs(row + r).wrapping_add(part.start));
    let mut sums = [[_mm512_setzero_ps(); R]; O];
    let len = part.len();
    let mut at = 0;
    while at < len {
        let mask = if len - at >= STEP { u32::MAX } else { (1 << (len - at)) - 1 };
        for (o, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the mask keeps the load within the line.
            let w = unsafe { _mm512_maskz_loadu_epi16(mask, weights.wrapping_add(o * stride + at).cast()) };
            for r in 0..R {
                // SAFETY: rows are padded to whole steps.
                unsafe {
                    let v = _mm512_loadu_si512(rows[r].wrapping_add(at).cast());
                    sums[r] = _mm512_dpbf16_ps(
                        sums[r],
                        std::mem::transmute::<__m512i, __m512bh>(v),
                        std::mem::transmute::<__m512i, __m512bh>(w),
                    );
                }
            }
        }
        at += STEP;
    }
    for (o, sums) in sums.into_iter().enumerate() {
        for (r, sum) in sums.into_iter().enumerate() {
            let mut values = [0.0; 16];
            // SAFETY: 16 values; the block lies within `y`.
            unsafe {
                _mm512_storeu_ps(values.as_mut_ptr(), sum);
                *y.add(r * STRIP + o) += add_up(values) * scale;
            }
        }
    }
}
