//! Strips of FP8 weights: decoded to BF16 stretch by stretch, one ahead of what is multiplied. In: codes and scales. Out:
//! f32. Never here: more decoded than two stretches of 32 outputs.

use std::{arch::x86_64::*, ops::Range};

use super::{
    super::{
        e4m3::Tables,
        matrix::Matrix,
        operand::{STEP, TILE_ROWS, View},
    },
    STRIP, SUMS, Scratch, fetch, layout, sum_one, sum_two,
};

/// Stretch by stretch: decodes 32 outputs' codes to BF16, which is exact, multiplies, and adds the products by the block's
/// scale to the sums.
///
/// # Safety
/// As [`super::strip`]'s, with tiles configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
pub(super) unsafe fn strip(
    codes: &[u8],
    matrix: &Matrix<'_>,
    (first, outs): (usize, usize),
    x: &View<'_>,
    y: &mut [f32],
    scratch: &mut Scratch,
    next: *const u8,
) {
    let (columns, groups) = (x.columns(), x.rows.div_ceil(x.columns()));
    let sums = scratch.sums(groups);
    // SAFETY: as many sums are there.
    unsafe { std::ptr::write_bytes(sums, 0, groups * 2 * SUMS) };
    let room = STRIP * matrix.stretches().next().map_or(0, |stretch| stretch.len().next_multiple_of(2 * STEP));
    let weights = scratch.weights(2 * room);
    let mut decoder = Decoder { tables: Tables::new(), codes: codes.as_ptr(), inner: matrix.inner, first, outs, next };
    let mut products = [0.0f32; 4 * SUMS];
    let mut stretches = matrix.stretches().peekable();
    let mut here = weights;
    if let Some(stretch) = stretches.peek() {
        // SAFETY: there is room for the first stretch, which is as wide as any.
        unsafe { decoder.decode(stretch, here) };
    }
    while let Some(stretch) = stretches.next() {
        // One stretch ahead: a tile that was just written must reach the cache before it can be loaded.
        let ahead = if here == weights { weights.wrapping_add(room) } else { weights };
        if let Some(following) = stretches.peek() {
            // SAFETY: as above; nobody reads this half.
            unsafe { decoder.decode(following, ahead) };
        }
        // A strip lies within one row of blocks: those are whole multiples of it.
        let scale = matrix.scale(first, stretch.start);
        let width = stretch.len().next_multiple_of(2 * STEP);
        let (steps, start) = (stretch.len().div_ceil(STEP), stretch.start / STEP);
        for group in (0..groups).step_by(2) {
            let both = group + 1 < groups;
            // SAFETY: this half holds 32 lines of whole steps; the groups and their sums are there.
            unsafe {
                if both {
                    let rows = (x.tile(group, start), x.tile(group + 1, start), columns);
                    sum_two((here, width), rows, steps, products.as_mut_ptr(), false);
                } else {
                    let rows = (x.tile(group, start), columns);
                    sum_one((here, width), rows, steps, products.as_mut_ptr(), false, std::ptr::null());
                }
                if group == 0 {
                    decoder.fetch(outs * stretch.len().div_ceil(128));
                }
                for tile in 0..2 + 2 * usize::from(both) {
                    let sums = sums.wrapping_add((group * 2 + tile) * SUMS);
                    add_scaled(sums, products.as_ptr().add(tile * SUMS), columns, scale);
                }
            }
        }
        here = ahead;
    }
    // SAFETY: all groups' sums are there, and `y` has a line for every row.
    unsafe { layout::turn_all(sums, x, y) };
}

/// A strip's codes, decoded stretch by stretch, while what comes after the strip is fetched.
struct Decoder {
    tables: Tables,
    codes: *const u8,
    inner: usize,
    first: usize,
    outs: usize,
    next: *const u8,
}

impl Decoder {
    /// To 32 lines of BF16, zeros where there is no output.
    ///
    /// # Safety
    /// As [`super::strip`]'s; the stretch is of the strip's rows, and `to` has room for it.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    unsafe fn decode(&mut self, stretch: &Range<usize>, to: *mut u16) {
        let width = stretch.len().next_multiple_of(2 * STEP);
        for out in 0..STRIP {
            let line = to.wrapping_add(out * width);
            if out >= self.outs {
                // SAFETY: line `out`.
                unsafe { std::ptr::write_bytes(line, 0, width) };
                continue;
            }
            let row = self.codes.wrapping_add((self.first + out) * self.inner + stretch.start);
            // What is decoded next comes nearest now.
            fetch::<_MM_HINT_T0>(row.wrapping_add(width), stretch.len().div_ceil(64));
            // Half of what comes after the strip is fetched here, half while tiles are multiplied: the memory is never idle.
            self.fetch(stretch.len().div_ceil(128));
            // SAFETY: the stretch of row `first + out`; line `out`.
            unsafe { self.tables.decode(row, stretch.len(), line) };
        }
    }

    #[inline]
    fn fetch(&mut self, lines: usize) {
        if !self.next.is_null() {
            fetch::<_MM_HINT_T1>(self.next, lines);
            self.next = self.next.wrapping_add(lines * 64);
        }
    }
}

/// `sums += products * scale`, both `[16, columns]`.
///
/// # Safety
/// Both hold a tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn add_scaled(sums: *mut f32, products: *const f32, columns: usize, scale: f32) {
    let scale = _mm512_set1_ps(scale);
    for sixteen in 0..columns {
        // SAFETY: a tile has 16 times `columns` values.
        unsafe {
            let (sums, products) = (sums.add(sixteen * TILE_ROWS), products.add(sixteen * TILE_ROWS));
            _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_loadu_ps(products), scale, _mm512_loadu_ps(sums)));
        }
    }
}
