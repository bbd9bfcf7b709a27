//! Sixteen by sixteen, turned: rows into the columns of tiles, sums of outputs into rows. In: rows, or sums. Out: the other
//! way round. Never here: arithmetic, but for rounding to BF16.

use std::arch::x86_64::*;

use half::bf16;

use super::{
    super::operand::{TILE_ROWS, View},
    STRIP, SUMS,
};

/// All groups' sums `[2, 16, columns]` to lines of 32 outputs, one per row.
///
/// # Safety
/// The sums of all of `x`'s groups are there, and `y` has as many lines as `x` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn turn_all(sums: *const f32, x: &View<'_>, y: &mut [f32]) {
    let columns = x.columns();
    for (group, y) in y[..x.rows * STRIP].chunks_mut(columns * STRIP).enumerate() {
        for half in 0..2 {
            let sums = sums.wrapping_add((group * 2 + half) * SUMS);
            let rows = y.len() / STRIP;
            if columns == TILE_ROWS {
                // SAFETY: a whole tile of sums.
                let turned =
                    transpose(std::array::from_fn(|out| unsafe { _mm512_loadu_ps(sums.add(out * TILE_ROWS)) }));
                for (row, line) in turned.into_iter().enumerate().take(rows) {
                    // SAFETY: half a line of row `row`.
                    unsafe { _mm512_storeu_ps(y.as_mut_ptr().add(row * STRIP + half * TILE_ROWS), line) };
                }
            } else {
                for row in 0..rows {
                    for out in 0..TILE_ROWS {
                        // SAFETY: output `out` of row `row`, in a tile `columns` wide.
                        y[row * STRIP + half * TILE_ROWS + out] = unsafe { *sums.add(out * columns + row) };
                    }
                }
            }
        }
    }
}

/// 16 rows of 32 f32 values to one tile of an operand: rounded to BF16, in pairs, one row a column. What is too small for a
/// normal number becomes zero, as tiles take it anyway.
///
/// # Safety
/// As [`super::strip`]'s; every line has 32 values, `to` room for 1 KiB.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(in crate::kernels) unsafe fn lay_out_f32(lines: [*const f32; TILE_ROWS], to: *mut u8) {
    let pairs = lines.map(|line| {
        // SAFETY: 32 values; 32 BF16 numbers and 16 f32 have one layout.
        unsafe {
            let rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(line.add(16)), _mm512_loadu_ps(line));
            std::mem::transmute::<__m512bh, __m512>(rounded)
        }
    });
    // SAFETY: the caller's.
    unsafe { store_turned(pairs, to) };
}

/// The same of BF16 values.
///
/// # Safety
/// As [`lay_out_f32`]'s.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(in crate::kernels) unsafe fn lay_out_bf16(lines: [*const bf16; TILE_ROWS], to: *mut u8) {
    // SAFETY: 32 values are 64 bytes.
    let pairs = lines.map(|line| unsafe { _mm512_loadu_ps(line.cast()) });
    // SAFETY: the caller's.
    unsafe { store_turned(pairs, to) };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn store_turned(pairs: [__m512; TILE_ROWS], to: *mut u8) {
    for (pair, line) in transpose(pairs).into_iter().enumerate() {
        // SAFETY: line `pair` of the tile.
        unsafe { _mm512_storeu_ps(to.add(pair * 64).cast(), line) };
    }
}

/// 16 lines of 16 to 16 columns.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn transpose(r: [__m512; 16]) -> [__m512; 16] {
    // Pairs, fours, eights and all sixteen.
    let mut t = r;
    for i in (0..16).step_by(2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    let double = |a: __m512, b: __m512, high: bool| {
        let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
        _mm512_castpd_ps(if high { _mm512_unpackhi_pd(a, b) } else { _mm512_unpacklo_pd(a, b) })
    };
    let mut u = t;
    for i in (0..16).step_by(4) {
        u[i] = double(t[i], t[i + 2], false);
        u[i + 1] = double(t[i], t[i + 2], true);
        u[i + 2] = double(t[i + 1], t[i + 3], false);
        u[i + 3] = double(t[i + 1], t[i + 3], true);
    }
    let mut v = u;
    for i in 0..4 {
        v[i] = _mm512_shuffle_f32x4::<0x88>(u[i], u[i + 4]);
        v[i + 4] = _mm512_shuffle_f32x4::<0xdd>(u[i], u[i + 4]);
        v[i + 8] = _mm512_shuffle_f32x4::<0x88>(u[i + 8], u[i + 12]);
        v[i + 12] = _mm512_shuffle_f32x4::<0xdd>(u[i + 8], u[i + 12]);
    }
    let mut w = v;
    for i in 0..8 {
        w[i] = _mm512_shuffle_f32x4::<0x88>(v[i], v[i + 8]);
        w[i + 8] = _mm512_shuffle_f32x4::<0xdd>(v[i], v[i + 8]);
    }
    w
}
