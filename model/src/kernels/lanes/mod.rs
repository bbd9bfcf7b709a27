//! Products on vectors of f32: sixteen running sums per output, places 0, 16, 32, ... of the inner dimension in the first,
//! 1, 17, 33, ... in the second, added up at the end. A code of FP8 is the f32 number next to its value times its block's
//! scale. In: a strip of outputs and an operand in lanes. Out: f32. Never here: a sum whose order depends on the vectors'
//! length, so that AVX-512 and AVX2 agree to the bit.

mod vectors;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_MM_HINT_T0;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use vectors::{Avx2, Avx512};
use vectors::{Lanes, Portable};

#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{
    isa::Isa,
    matrix::{Matrix, Values},
    operand::{View, widen},
};
use crate::checkpoint::fp8::decode_e4m3;

/// Outputs of one strip.
pub(super) const STRIP: usize = 32;
/// Running sums of one output.
const LANES: usize = 16;
/// For up to so many rows BF16 weights are made f32 on their way into each sum, and once for all above.
const IN_PLACE_ROWS: usize = 16;
/// Values of a line that are gone through at once, where what comes next is fetched or scaled. FP8's blocks are of whole
/// chunks, or are made f32 first.
const CHUNK: usize = 128;
/// Bytes that weights are fetched ahead, at least: what is computed meanwhile takes as long as memory.
pub(super) const AHEAD: usize = 8 << 10;
/// Outputs whose weights are made f32 together, where rows are many: they stay in the core's second cache, and the rows of a
/// block in its first.
const WIDENED: usize = 8;

/// A stored format.
trait Element: Copy + Default {
    /// Whether it has scales.
    const SCALED: bool;
    /// # Safety
    /// `len` of them are there.
    unsafe fn is_none_among(_from: *const Self, _len: usize) -> bool {
        false
    }
    /// # Safety
    /// 16 of them are there.
    unsafe fn load<L: Lanes>(from: *const Self, factor: L, seen: &mut L::Seen) -> L;
}

impl Element for f32 {
    const SCALED: bool = false;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self, _: L, _: &mut L::Seen) -> L {
        // SAFETY: the caller's.
        unsafe { L::f32(from) }
    }
}

impl Element for bf16 {
    const SCALED: bool = false;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self, _: L, _: &mut L::Seen) -> L {
        // SAFETY: the caller's.
        unsafe { L::bf16(from) }
    }
}

impl Element for u8 {
    const SCALED: bool = true;

    unsafe fn is_none_among(from: *const Self, len: usize) -> bool {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(from, len) }.iter().any(|code| code | 0x80 == 0xff)
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self, factor: L, seen: &mut L::Seen) -> L {
        // SAFETY: the caller's.
        unsafe { L::e4m3(from, factor, seen) }
    }
}

/// Outputs `first..first + outs` of `x W^T`, at most 32 of them, into `y` `[T, 32]`. `wide` is room for
/// what is made f32.
pub(super) fn strip(
    isa: Isa,
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    wide: &mut Vec<f32>,
) {
    assert!(outs <= STRIP && first + outs <= matrix.out && x.inner() == matrix.inner && y.len() >= x.rows * STRIP);
    // SAFETY: an `Isa` is only ever one that this processor has; the sizes were checked above.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => strip_avx512(matrix, first, outs, x, y, wide),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => strip_avx2(matrix, first, outs, x, y, wide),
            _ => strip_of::<Portable>(matrix, first, outs, x, y, wide),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2")]
unsafe fn strip_avx512(
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    wide: &mut Vec<f32>,
) {
    // SAFETY: the caller's.
    unsafe { strip_of::<Avx512>(matrix, first, outs, x, y, wide) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strip_avx2(matrix: &Matrix<'_>, first: usize, outs: usize, x: &View<'_>, y: &mut [f32], wide: &mut Vec<f32>) {
    // SAFETY: the caller's.
    unsafe { strip_of::<Avx2>(matrix, first, outs, x, y, wide) }
}

/// Some rows of a matrix, one after the other.
#[derive(Clone, Copy)]
struct Lines<'a, W> {
    start: *const W,
    inner: usize,
    scales: Scales<'a>,
    /// Whether what comes next is to be fetched: it comes from memory.
    fetch: bool,
}

/// Scales of the lines' blocks: of which line of the matrix the first is, and how many blocks it has.
#[derive(Clone, Copy)]
struct Scales<'a> {
    values: &'a [f32],
    block: usize,
    first: usize,
    per_line: usize,
}

impl Scales<'_> {
    const NONE: Self = Self { values: &[], block: 1, first: 0, per_line: 0 };
}

/// # Safety
/// The processor has what `L` needs, and sizes are as [`strip`] checks them.
#[inline(always)]
unsafe fn strip_of<L: Lanes>(
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    wide: &mut Vec<f32>,
) {
    let inner = matrix.inner;
    let few = x.rows <= L::ROWS;
    let y = y.as_mut_ptr();
    // SAFETY: the caller's, here and below: rows `first..first + outs` are there, and so is what is widened.
    unsafe {
        match matrix.values {
            Values::F32(values) => {
                let start = values.as_ptr().wrapping_add(first * inner);
                rows_by::<L, f32>(Lines { start, inner, scales: Scales::NONE, fetch: true }, outs, x, y);
            }
            Values::Bf16(values) if x.rows <= IN_PLACE_ROWS => {
                let start = values.as_ptr().wrapping_add(first * inner);
                rows_by::<L, bf16>(Lines { start, inner, scales: Scales::NONE, fetch: true }, outs, x, y);
            }
            Values::Fp8 { codes, scales, block } if few && block.is_multiple_of(CHUNK) => {
                let start = codes.as_ptr().wrapping_add(first * inner);
                let scales = Scales { values: scales, block, first, per_line: inner.div_ceil(block) };
                rows_by::<L, u8>(Lines { start, inner, scales, fetch: true }, outs, x, y);
            }
            _ => {
                wide.resize(WIDENED * inner, 0.0);
                for out in (0..outs).step_by(WIDENED) {
                    let outs = WIDENED.min(outs - out);
                    for (line, wide) in wide.chunks_exact_mut(inner).take(outs).enumerate() {
                        widen_line::<L>(matrix, first + out + line, wide);
                    }
                    let lines = Lines { start: wide.as_ptr(), inner, scales: Scales::NONE, fetch: false };
                    rows_by::<L, f32>(lines, outs, x, y.wrapping_add(out));
                }
            }
        }
    }
}

/// Row `out` of the matrix as f32, and the next one fetched meanwhile.
///
/// # Safety
/// The processor has what `L` needs.
#[inline(always)]
unsafe fn widen_line<L: Lanes>(matrix: &Matrix<'_>, out: usize, to: &mut [f32]) {
    let inner = matrix.inner;
    match matrix.values {
        Values::F32(values) => to.copy_from_slice(&values[out * inner..][..inner]),
        Values::Bf16(values) => {
            let values = &values[out * inner..][..inner];
            fetch_line(values.as_ptr().wrapping_add(inner), inner);
            let (whole, rest) = values.as_chunks::<LANES>();
            for (to, values) in to.chunks_exact_mut(LANES).zip(whole) {
                // SAFETY: 16 values, and room for them.
                unsafe { L::bf16(values.as_ptr()).put(to.as_mut_ptr()) };
            }
            to[whole.len() * LANES..].iter_mut().zip(rest).for_each(|(to, value)| *to = widen(value.to_bits()));
        }
        Values::Fp8 { codes, .. } => {
            for part in matrix.stretches() {
                let scale = matrix.scale(out, part.start);
                let (codes, to) = (&codes[out * inner..][part.clone()], &mut to[part]);
                fetch_line(codes.as_ptr().wrapping_add(inner), codes.len());
                let (factor, mut seen) = (L::factor(scale), L::Seen::default());
                let (whole, _) = codes.as_chunks::<LANES>();
                for (to, codes) in to.chunks_exact_mut(LANES).zip(whole) {
                    // SAFETY: as above.
                    unsafe { L::e4m3(codes.as_ptr(), factor, &mut seen).put(to.as_mut_ptr()) };
                }
                let done = if L::none_among(seen) { 0 } else { whole.len() * LANES };
                to[done..].iter_mut().zip(&codes[done..]).for_each(|(to, code)| *to = decode_e4m3(*code) * scale);
            }
        }
    }
}

/// All rows by `outs` outputs, into `y` `[T, 32]`.
///
/// # Safety
/// The processor has what `L` needs; lines and room are there.
#[inline(always)]
unsafe fn rows_by<L: Lanes, W: Element>(lines: Lines<'_, W>, outs: usize, x: &View<'_>, y: *mut f32) {
    let mut row = 0;
    while row < x.rows {
        let left = x.rows - row;
        // One that would be left alone costs as much as two.
        let rows = if left == L::ROWS + 1 { left / 2 } else { left.min(L::ROWS) };
        let y = y.wrapping_add(row * STRIP);
        // SAFETY: the caller's.
        unsafe {
            match rows {
                4 => outs_by::<L, W, 4, 4>(lines, outs, x, row, y),
                3 if L::ROWS > 3 => outs_by::<L, W, 4, 3>(lines, outs, x, row, y),
                3 => outs_by::<L, W, 2, 3>(lines, outs, x, row, y),
                2 if L::ROWS > 3 => outs_by::<L, W, 4, 2>(lines, outs, x, row, y),
                2 => outs_by::<L, W, 2, 2>(lines, outs, x, row, y),
                1 if L::ROWS < 4 => outs_by::<L, W, 2, 1>(lines, outs, x, row, y),
                _ => outs_by::<L, W, 4, 1>(lines, outs, x, row, y),
            }
        }
        row += rows;
    }
}

/// `R` rows by `outs` outputs.
///
/// # Safety
/// As [`rows_by`]'s.
#[inline(always)]
unsafe fn outs_by<L: Lanes, W: Element, const O: usize, const R: usize>(
    lines: Lines<'_, W>,
    outs: usize,
    x: &View<'_>,
    row: usize,
    y: *mut f32,
) {
    let mut out = 0;
    while out + O <= outs {
        // SAFETY: the caller's; so below.
        unsafe { block::<L, W, O, R>(lines, out, x, row, y.wrapping_add(out)) };
        out += O;
    }
    // Of what is left, one output at a time: the sums are the same.
    while out < outs {
        // SAFETY: as above.
        unsafe { block::<L, W, 1, R>(lines, out, x, row, y.wrapping_add(out)) };
        out += 1;
    }
}

/// `O` outputs by `R` rows.
///
/// # Safety
/// As [`rows_by`]'s.
#[inline(always)]
unsafe fn block<L: Lanes, W: Element, const O: usize, const R: usize>(
    lines: Lines<'_, W>,
    out: usize,
    x: &View<'_>,
    row: usize,
    y: *mut f32,
) {
    let Lines { start, inner, scales, fetch } = lines;
    let weights: [*const W; O] = std::array::from_fn(|o| start.wrapping_add((out + o) * inner));
    let rows: [*const f32; R] = std::array::from_fn(|r| x.lanes(row + r));
    let scale_lines: [usize; O] = std::array::from_fn(|o| (scales.first + out + o) / scales.block * scales.per_line);
    let mut sums = [[L::zero(); R]; O];
    let mut factors = [L::zero(); O];
    // Whole blocks of outputs, as many as it takes.
    let ahead = O * inner * (AHEAD / size_of::<W>()).div_ceil(O * inner);
    let (mut at, mut stretch, mut seen) = (0, 0, L::Seen::default());
    while at < inner {
        let end = if W::SCALED || fetch { inner.min(at + CHUNK) } else { inner };
        if W::SCALED {
            // Dividing takes long, and blocks are of one size as a rule.
            stretch = if scales.block == CHUNK { at / CHUNK } else { at / scales.block };
        }
        if fetch && row == 0 {
            // In the order of memory, whatever the order of use: that is what memory is quick at.
            fetch_line(weights[0].wrapping_add(ahead + at * O), (end - at) * O);
        }
        if W::SCALED {
            for o in 0..O {
                factors[o] = L::factor(scales.values[scale_lines[o] + stretch]);
            }
        }
        while at + LANES <= end {
            for o in 0..O {
                // SAFETY: 16 values from `at` on lie within the row.
                let w: L = unsafe { W::load(weights[o].wrapping_add(at), factors[o], &mut seen) };
                for r in 0..R {
                    // SAFETY: as above.
                    sums[o][r] = unsafe { L::f32(rows[r].wrapping_add(at)) }.times_plus(w, sums[o][r]);
                }
            }
            at += LANES;
        }
        if at < end {
            let left = end - at;
            for o in 0..O {
                let (mut w, mut v) = ([W::default(); LANES], [0f32; LANES]);
                // SAFETY: the values that are left, and whole vectors of our own.
                unsafe {
                    std::ptr::copy_nonoverlapping(weights[o].wrapping_add(at), w.as_mut_ptr(), left);
                    let w: L = W::load(w.as_ptr(), factors[o], &mut seen);
                    for r in 0..R {
                        std::ptr::copy_nonoverlapping(rows[r].wrapping_add(at), v.as_mut_ptr(), left);
                        sums[o][r] = L::f32(v.as_ptr()).times_plus(w, sums[o][r]);
                    }
                }
            }
            at = end;
        }
    }
    if W::SCALED && L::none_among(seen) {
        for o in 0..O {
            // SAFETY: the line is there.
            if unsafe { W::is_none_among(weights[o], inner) } {
                sums[o] = [L::factor(f32::NAN); R];
            }
        }
    }
    for (o, sums) in sums.into_iter().enumerate() {
        for (r, sum) in sums.into_iter().enumerate() {
            let mut values = [0.0; LANES];
            // SAFETY: 16 values; the block lies within `y`.
            unsafe {
                sum.put(values.as_mut_ptr());
                y.add(r * STRIP + o).write(add_up(values));
            }
        }
    }
}

/// Has `values` of a line brought nearer; it may lie past the end.
#[inline(always)]
fn fetch_line<W>(line: *const W, values: usize) {
    #[cfg(target_arch = "x86_64")]
    tiles::fetch::<_MM_HINT_T0>(line.cast(), (values * size_of::<W>()).div_ceil(64));
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (line, values);
}

/// Halves onto each other, until one is left.
#[inline(always)]
pub(super) fn add_up(mut values: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            values[lane] += values[lane + half];
        }
        half /= 2;
    }
    values[0]
}
