//! Products on vectors of f32. Weights are read as 32-bit words, one of f32, two of BF16 or four codes of FP8 each, and taken
//! apart there, by shifts and masks; rows lie in the order that this gives ([`Order`](super::operand::Order)). Every output has sixteen
//! running sums, one per word of a vector, added up at the end; with FP8 sixteen per block, which then are multiplied by its
//! scale. In: a strip of outputs and an operand in lanes. Out: f32. Never here: a sum whose order depends on the vectors'
//! length, so that AVX-512 and AVX2 agree to the bit.

mod words;
mod vectors;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_MM_HINT_T0;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use vectors::{Avx2, Avx512};
use vectors::{Lanes, Portable};
use words::{Code, Element};

#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{
    isa::Isa,
    matrix::{Matrix, Values},
    operand::{FOR_CODES, LANES, View},
};
use crate::checkpoint::fp8::decode_e4m3;

/// Outputs of one strip.
pub(super) const STRIP: usize = 32;
/// Values of a line that are gone through at once, where what comes next is fetched or scaled. FP8's blocks are of whole
/// chunks, or are made f32 first, scales and all.
pub(super) const CHUNK: usize = 128;
/// For up to so many rows BF16 weights are made f32 on their way into each sum, and once for all above.
const BF16_IN_PLACE: usize = 16;
/// Values of sixteen words, at most.
const MOST_OF_GROUP: usize = 4 * LANES;
/// Bytes that weights are fetched ahead, at least: what is computed meanwhile takes as long as memory.
pub(super) const AHEAD: usize = 8 << 10;
/// Outputs whose weights are made f32 together, where rows are many: they stay in the core's second cache, and the rows of a
/// block in its first.
const WIDENED: usize = 8;

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
#[target_feature(enable = "avx2,fma")]
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

impl<'a> Scales<'a> {
    /// Those of the lines from `first` on; none where there are none, or where lines were made f32 with them.
    fn of(matrix: &Matrix<'a>, first: usize) -> Self {
        match matrix.values {
            Values::Fp8 { scales, block, .. } if block.is_multiple_of(CHUNK) => {
                Self { values: scales, block, first, per_line: matrix.inner.div_ceil(block) }
            }
            _ => Self { values: &[], block: 1, first: 0, per_line: 0 },
        }
    }

    /// Of the lines' `nth`, one per block.
    fn of_line(&self, nth: usize) -> &'a [f32] {
        &self.values[(self.first + nth) / self.block * self.per_line..][..self.per_line]
    }
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
    let (inner, scales) = (matrix.inner, Scales::of(matrix, first));
    let y = y.as_mut_ptr();
    // SAFETY: the caller's, here and below: rows `first..first + outs` are there, and so is what is widened.
    unsafe {
        match matrix.values {
            Values::F32(values) => {
                let start = values.as_ptr().wrapping_add(first * inner);
                rows_by::<L, f32>(Lines { start, inner, scales, fetch: true }, outs, x, y);
            }
            Values::Bf16(values) if x.rows <= BF16_IN_PLACE => {
                let start = values.as_ptr().wrapping_add(first * inner);
                rows_by::<L, bf16>(Lines { start, inner, scales, fetch: true }, outs, x, y);
            }
            Values::Fp8 { codes, block, .. } if x.rows <= L::CODES_IN_PLACE && block.is_multiple_of(CHUNK) => {
                let start = codes.as_ptr().wrapping_add(first * inner);
                rows_by::<L, u8>(Lines { start, inner, scales, fetch: true }, outs, x, y);
            }
            _ => {
                let inner = x.padded();
                wide.resize(WIDENED * inner, 0.0);
                for out in (0..outs).step_by(WIDENED) {
                    let (outs, y) = (WIDENED.min(outs - out), y.wrapping_add(out));
                    for (line, to) in (first + out..).zip(wide.chunks_exact_mut(inner)).take(outs) {
                        widen_line::<L>(matrix, line, to);
                    }
                    let (start, scales) = (wide.as_ptr(), Scales::of(matrix, first + out));
                    if scales.values.is_empty() {
                        rows_by::<L, f32>(Lines { start, inner, scales, fetch: false }, outs, x, y);
                    } else {
                        rows_by::<L, Code>(Lines { start: start.cast(), inner, scales, fetch: false }, outs, x, y);
                    }
                }
            }
        }
    }
}

/// Line `line` of the matrix as f32 in the order that rows have. Codes are without their scales, where blocks are of whole chunks.
///
/// # Safety
/// The processor has what `L` needs.
#[inline(always)]
unsafe fn widen_line<L: Lanes>(matrix: &Matrix<'_>, line: usize, to: &mut [f32]) {
    let places = line * matrix.inner..(line + 1) * matrix.inner;
    match matrix.values {
        Values::F32(_) => unreachable!("f32 is as wide as it can be"),
        // SAFETY: the caller's; so below.
        Values::Bf16(values) => unsafe { widen::<L, bf16>(&values[places], to) },
        Values::Fp8 { codes, block, .. } if block.is_multiple_of(CHUNK) => {
            // SAFETY: as above.
            unsafe { widen::<L, u8>(&codes[places], to) }
        }
        Values::Fp8 { .. } => scale_line(matrix, line, to),
    }
}

/// A line as f32, and zeros up to the end of `to`, which is of whole groups. The next line is fetched meanwhile.
///
/// # Safety
/// The processor has what `L` needs.
#[inline(always)]
unsafe fn widen<L: Lanes, W: Element>(line: &[W], to: &mut [f32]) {
    let group = LANES * W::PER_WORD;
    fetch_line(line.as_ptr().wrapping_add(line.len()), line.len());
    let mut seen = L::Seen::default();
    let (whole, rest) = to.split_at_mut(line.len() / group * group);
    for (to, from) in whole.chunks_exact_mut(group).zip(line.chunks_exact(group)) {
        // SAFETY: a whole group each.
        unsafe { L::put_words(from.as_ptr(), to.as_mut_ptr(), &mut seen) };
    }
    let left = &line[whole.len()..];
    rest.fill(0.0);
    if !left.is_empty() {
        let mut last = [W::default(); MOST_OF_GROUP];
        last[..left.len()].copy_from_slice(left);
        // SAFETY: as above.
        unsafe { L::put_words(last.as_ptr(), rest[..group].as_mut_ptr(), &mut seen) };
    }
    if L::none_among(seen) {
        // A sum with one is none.
        to.fill(f32::NAN);
    }
}

/// Line `line` of a matrix with blocks of other sizes as f32, scales and all.
fn scale_line(matrix: &Matrix<'_>, line: usize, to: &mut [f32]) {
    let Values::Fp8 { codes, .. } = matrix.values else { unreachable!("only FP8 has blocks") };
    for part in matrix.stretches() {
        let scale = matrix.scale(line, part.start);
        let codes = &codes[line * matrix.inner..][part.clone()];
        to[part].iter_mut().zip(codes).for_each(|(to, code)| *to = decode_e4m3(*code) * scale);
    }
    to[matrix.inner..].fill(0.0);
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
        // In parts of about one size: one that would be left alone costs as much as two.
        let rows = left.div_ceil(left.div_ceil(L::ROWS));
        let y = y.wrapping_add(row * STRIP);
        // SAFETY: the caller's.
        unsafe {
            match (rows, L::FOUR, W::CODES) {
                // What takes codes apart needs registers of its own.
                (3, false, true) => outs_by::<L, W, 1, 3>(lines, outs, x, row, y),
                (2, false, true) => outs_by::<L, W, 1, 2>(lines, outs, x, row, y),
                (_, false, true) => outs_by::<L, W, 1, 1>(lines, outs, x, row, y),
                (3, false, false) => outs_by::<L, W, 2, 3>(lines, outs, x, row, y),
                (2, false, false) => outs_by::<L, W, 2, 2>(lines, outs, x, row, y),
                (_, false, false) => outs_by::<L, W, 2, 1>(lines, outs, x, row, y),
                (4, true, _) => outs_by::<L, W, 4, 4>(lines, outs, x, row, y),
                (3, true, _) => outs_by::<L, W, 4, 3>(lines, outs, x, row, y),
                (2, true, _) => outs_by::<L, W, 4, 2>(lines, outs, x, row, y),
                (_, true, _) => outs_by::<L, W, 4, 1>(lines, outs, x, row, y),
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
    let scales_of: [&[f32]; O] = std::array::from_fn(|o| scales.of_line(out + o));
    // Whole blocks of outputs, as many as it takes.
    let ahead = O * inner * (AHEAD / size_of::<W>()).div_ceil(O * inner);
    let fetch = fetch && row == 0;
    let mut sums = [[L::all(0.0); R]; O];
    let (mut at, mut seen) = (0, L::Seen::default());
    while at < inner {
        let lines = weights.map(|line| line.wrapping_add(at));
        let values = rows.map(|row| row.wrapping_add(at));
        let mut factors = [1.0; O];
        if W::SCALED {
            // Dividing takes long, and blocks are of one size as a rule.
            let stretch = if scales.block == CHUNK { at / CHUNK } else { at / scales.block };
            for o in 0..O {
                factors[o] = scales_of[o][stretch] * (L::CODES / FOR_CODES);
            }
        }
        // In the order of memory, whatever the order of use: that is what memory is quick at.
        let following = weights[0].wrapping_add(ahead + at * O);
        let places = inner - at;
        if !W::SCALED && !fetch {
            // SAFETY: lines and rows have these places; so below.
            unsafe { along(lines, values, places, &mut sums, &mut seen) };
            break;
        }
        // SAFETY: as above.
        unsafe {
            // Of a length that is known beforehand, loops are unrolled.
            if places >= CHUNK {
                if fetch {
                    fetch_line(following, CHUNK * O);
                }
                chunk(lines, values, CHUNK, factors, &mut sums, &mut seen);
            } else {
                if fetch {
                    fetch_line(following, places * O);
                }
                chunk(lines, values, places, factors, &mut sums, &mut seen);
            }
        }
        at += CHUNK;
    }
    if W::SCALED && L::none_among(seen) {
        for o in 0..O {
            // SAFETY: the line is there.
            if unsafe { W::is_none_among(weights[o], inner) } {
                sums[o] = [L::all(f32::NAN); R];
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

/// `places` places of `O` lines, no more than a chunk, by `R` rows: times the lines' factors where they have scales, onto `sums`.
///
/// # Safety
/// The processor has what `L` needs. Lines have these places, and rows too, up to whole groups of words.
#[inline(always)]
unsafe fn chunk<L: Lanes, W: Element, const O: usize, const R: usize>(
    lines: [*const W; O],
    rows: [*const f32; R],
    places: usize,
    factors: [f32; O],
    sums: &mut [[L; R]; O],
    seen: &mut L::Seen,
) {
    // SAFETY: the caller's.
    unsafe {
        if W::SCALED {
            let mut of_block = [[L::all(0.0); R]; O];
            along(lines, rows, places, &mut of_block, seen);
            for o in 0..O {
                for r in 0..R {
                    sums[o][r] = of_block[o][r].times_plus(L::all(factors[o]), sums[o][r]);
                }
            }
        } else {
            along(lines, rows, places, sums, seen);
        }
    }
}

/// The same, without factors.
///
/// # Safety
/// As [`chunk`]'s.
#[inline(always)]
unsafe fn along<L: Lanes, W: Element, const O: usize, const R: usize>(
    lines: [*const W; O],
    rows: [*const f32; R],
    places: usize,
    sums: &mut [[L; R]; O],
    seen: &mut L::Seen,
) {
    let group = LANES * W::PER_WORD;
    for at in (0..places / group).map(|nth| nth * group) {
        let words = lines.map(|line| line.wrapping_add(at));
        // SAFETY: sixteen words from there on are in the line, and their values in each row.
        unsafe { L::add_words(sums, words, rows.map(|row| row.wrapping_add(at)), seen) };
    }
    let at = places / group * group;
    if at < places {
        let mut last = [[W::default(); MOST_OF_GROUP]; O];
        for o in 0..O {
            // SAFETY: the values that are left, fewer than a group.
            unsafe { std::ptr::copy_nonoverlapping(lines[o].wrapping_add(at), last[o].as_mut_ptr(), places - at) };
        }
        let words = last.each_ref().map(|last| last.as_ptr());
        // SAFETY: sixteen words of our own, and rows that are padded.
        unsafe { L::add_words(sums, words, rows.map(|row| row.wrapping_add(at)), seen) };
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
