//! Products on vectors of f32. Weights are read as 32-bit words, one of f32, two of BF16 or four codes of FP8 each, and taken
//! apart there, by shifts and masks; rows lie in the order that this gives ([`Order`](super::operand::Order)). Every output has sixteen
//! running sums, one per word of a vector, added up at the end. A strip's outputs share the scales of FP8, one per block of the
//! inner dimension, so it is the rows that are multiplied by them. In: a strip of outputs and an operand in lanes. Out: f32.
//! Never here: a sum whose order depends on the vectors' length, so that AVX-512 and AVX2 agree to the bit.

mod words;
mod vectors;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::_MM_HINT_T0;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use vectors::{Avx2, Avx512};
use vectors::{Lanes, Portable};
use words::Element;

#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{
    grown,
    isa::Isa,
    matrix::{Matrix, Values},
    operand::{FOR_CODES, LANES, Order, View},
};
use crate::checkpoint::fp8::decode_e4m3;

/// Outputs of one strip.
pub(super) const STRIP: usize = 32;
/// Values of a line that are gone through at once, where what comes next is fetched or scaled. FP8's blocks are of whole
/// chunks, or are made f32 first, scales and all.
pub(super) const CHUNK: usize = 128;
/// So a strip has outputs of one block.
const _: () = assert!(CHUNK.is_multiple_of(STRIP));
/// For up to so many rows BF16 weights are made f32 on their way into each sum, and once for all above.
const BF16_IN_PLACE: usize = 16;
/// Values of sixteen words, at most.
const MOST_OF_GROUP: usize = 4 * LANES;
/// Bytes that weights are fetched ahead, at least: what is computed meanwhile takes as long as memory.
pub(super) const AHEAD: usize = 8 << 10;
/// Bytes of weights that are made f32 together, where rows are many: so much stays in the core's second cache.
const WIDENED: usize = 256 << 10;
/// Outputs that are, at least: rows are scaled anew for each such part.
const FEWEST_WIDENED: usize = 8;

/// Outputs `first..first + outs` of `x W^T`, at most 32 of them, into `y` `[T, 32]`. `room` is for what is made f32, and for rows
/// times scales.
pub(super) fn strip(
    isa: Isa,
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    room: &mut Vec<f32>,
) {
    assert!(first.is_multiple_of(STRIP) && outs <= STRIP && first + outs <= matrix.out);
    assert!(x.inner() == matrix.inner && y.len() >= x.rows * STRIP);
    // SAFETY: an `Isa` is only ever one that this processor has; the sizes were checked above.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => strip_avx512(matrix, first, outs, x, y, room),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => strip_avx2(matrix, first, outs, x, y, room),
            _ => strip_of::<Portable>(matrix, first, outs, x, y, room),
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
    room: &mut Vec<f32>,
) {
    // SAFETY: the caller's.
    unsafe { strip_of::<Avx512>(matrix, first, outs, x, y, room) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn strip_avx2(matrix: &Matrix<'_>, first: usize, outs: usize, x: &View<'_>, y: &mut [f32], room: &mut Vec<f32>) {
    // SAFETY: the caller's.
    unsafe { strip_of::<Avx2>(matrix, first, outs, x, y, room) }
}

/// Some rows of a matrix, one after the other.
#[derive(Clone, Copy)]
struct Lines<W> {
    start: *const W,
    inner: usize,
    /// Whether what comes next is to be fetched: it comes from memory.
    fetch: bool,
}

/// The rows of a strip's product, times the scales of the strip that begins with output `first` where codes are without them.
struct Scaled<'a> {
    x: &'a View<'a>,
    matrix: &'a Matrix<'a>,
    first: usize,
    /// For [`Lanes::ROWS`] of them, where they are scaled.
    room: &'a mut [f32],
}

impl Scaled<'_> {
    fn are_scaled(&self) -> bool {
        Order::of(self.matrix) == Order::Quarters
    }

    /// `R` rows from `first` on. They take the place of those before.
    ///
    /// # Safety
    /// The operand has these rows.
    #[inline(always)]
    unsafe fn rows<const R: usize>(&mut self, first: usize) -> [*const f32; R] {
        let rows = std::array::from_fn(|r| self.x.lanes(first + r));
        if !self.are_scaled() {
            return rows;
        }
        let padded = self.x.padded();
        for part in self.matrix.stretches() {
            let scale = self.matrix.scale(self.first, part.start);
            // What pads a row goes with its last block.
            let end = if part.end == self.matrix.inner { padded } else { part.end };
            for (row, to) in rows.iter().zip(self.room.chunks_exact_mut(padded)) {
                // SAFETY: the caller's; a padded row is as long as that.
                let row = unsafe { std::slice::from_raw_parts(row.wrapping_add(part.start), end - part.start) };
                for (to, value) in to[part.start..end].iter_mut().zip(row) {
                    *to = value * scale;
                }
            }
        }
        std::array::from_fn(|r| self.room[r * padded..][..padded].as_ptr())
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
    room: &mut Vec<f32>,
) {
    let (inner, padded) = (matrix.inner, x.padded());
    let y = y.as_mut_ptr();
    // SAFETY: the caller's, here and below: rows `first..first + outs` are there, and so is what is widened.
    unsafe {
        match matrix.values {
            Values::F32(values) => {
                let start = values.as_ptr().wrapping_add(first * inner);
                let x = &mut Scaled { x, matrix, first, room: &mut [] };
                rows_by::<L, f32>(Lines { start, inner, fetch: true }, outs, x, y);
            }
            Values::Bf16(values) if x.rows <= BF16_IN_PLACE => {
                let start = values.as_ptr().wrapping_add(first * inner);
                let x = &mut Scaled { x, matrix, first, room: &mut [] };
                rows_by::<L, bf16>(Lines { start, inner, fetch: true }, outs, x, y);
            }
            Values::Fp8 { codes, .. } if x.rows <= L::CODES_IN_PLACE && Order::of(matrix) == Order::Quarters => {
                let start = codes.as_ptr().wrapping_add(first * inner);
                let x = &mut Scaled { x, matrix, first, room: grown(room, L::ROWS * padded) };
                rows_by::<L, u8>(Lines { start, inner, fetch: true }, outs, x, y);
            }
            _ => {
                // Whole blocks of outputs.
                let widened = (WIDENED / size_of::<f32>() / padded / 4 * 4).clamp(FEWEST_WIDENED, STRIP);
                let (wide, room) = grown(room, (widened + L::ROWS) * padded).split_at_mut(widened * padded);
                let x = &mut Scaled { x, matrix, first, room };
                for out in (0..outs).step_by(widened) {
                    let (outs, y) = (widened.min(outs - out), y.wrapping_add(out));
                    for (line, to) in (first + out..).zip(wide.chunks_exact_mut(padded)).take(outs) {
                        widen_line::<L>(matrix, line, to);
                    }
                    rows_by::<L, f32>(Lines { start: wide.as_ptr(), inner: padded, fetch: false }, outs, x, y);
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
        Values::Fp8 { codes, .. } if Order::of(matrix) == Order::Quarters => {
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
unsafe fn rows_by<L: Lanes, W: Element>(mut lines: Lines<W>, outs: usize, x: &mut Scaled<'_>, y: *mut f32) {
    let (mut row, all) = (0, x.x.rows);
    // A power of two.
    let factor = if x.are_scaled() { L::CODES / FOR_CODES } else { 1.0 };
    while row < all {
        let left = all - row;
        // In parts of about one size: one that would be left alone costs as much as two.
        let part = left.div_ceil(left.div_ceil(L::ROWS));
        let y = y.wrapping_add(row * STRIP);
        // SAFETY: the caller's.
        unsafe {
            match (part, L::FOUR, W::CODES) {
                // What takes codes apart needs registers of its own.
                (3, false, true) => outs_by::<L, W, 1, 3>(lines, outs, x.rows(row), factor, y),
                (2, false, true) => outs_by::<L, W, 1, 2>(lines, outs, x.rows(row), factor, y),
                (_, false, true) => outs_by::<L, W, 1, 1>(lines, outs, x.rows(row), factor, y),
                (3, false, false) => outs_by::<L, W, 2, 3>(lines, outs, x.rows(row), factor, y),
                (2, false, false) => outs_by::<L, W, 2, 2>(lines, outs, x.rows(row), factor, y),
                (_, false, false) => outs_by::<L, W, 2, 1>(lines, outs, x.rows(row), factor, y),
                (4, true, _) => outs_by::<L, W, 4, 4>(lines, outs, x.rows(row), factor, y),
                (3, true, _) => outs_by::<L, W, 4, 3>(lines, outs, x.rows(row), factor, y),
                (2, true, _) => outs_by::<L, W, 4, 2>(lines, outs, x.rows(row), factor, y),
                (_, true, _) => outs_by::<L, W, 4, 1>(lines, outs, x.rows(row), factor, y),
            }
        }
        row += part;
        // The lines have been fetched by now.
        lines.fetch = false;
    }
}

/// `R` rows by `outs` outputs, sums times `factor`.
///
/// # Safety
/// As [`rows_by`]'s.
#[inline(always)]
unsafe fn outs_by<L: Lanes, W: Element, const O: usize, const R: usize>(
    lines: Lines<W>,
    outs: usize,
    rows: [*const f32; R],
    factor: f32,
    y: *mut f32,
) {
    let mut out = 0;
    while out + O <= outs {
        // SAFETY: the caller's; so below.
        unsafe { block::<L, W, O, R>(lines, out, rows, factor, y.wrapping_add(out)) };
        out += O;
    }
    // Of what is left, one output at a time: the sums are the same.
    while out < outs {
        // SAFETY: as above.
        unsafe { block::<L, W, 1, R>(lines, out, rows, factor, y.wrapping_add(out)) };
        out += 1;
    }
}

/// `O` outputs by `R` rows, sums times `factor`.
///
/// # Safety
/// As [`rows_by`]'s.
#[inline(always)]
unsafe fn block<L: Lanes, W: Element, const O: usize, const R: usize>(
    lines: Lines<W>,
    out: usize,
    rows: [*const f32; R],
    factor: f32,
    y: *mut f32,
) {
    let Lines { start, inner, fetch } = lines;
    let weights: [*const W; O] = std::array::from_fn(|o| start.wrapping_add((out + o) * inner));
    let mut sums = [[L::all(0.0); R]; O];
    let (mut at, mut seen) = (0, L::Seen::default());
    if fetch {
        // Whole blocks of outputs, as many as it takes. In the order of memory, whatever the order of use: that is what
        // memory is quick at.
        let following = weights[0].wrapping_add(O * inner * (AHEAD / size_of::<W>()).div_ceil(O * inner));
        // Of a length that is known beforehand, loops are unrolled.
        while at + CHUNK <= inner {
            fetch_line(following.wrapping_add(at * O), CHUNK * O);
            // SAFETY: lines and rows have these places; so below.
            unsafe {
                along(
                    weights.map(|line| line.wrapping_add(at)),
                    rows.map(|row| row.wrapping_add(at)),
                    CHUNK,
                    &mut sums,
                    &mut seen,
                );
            }
            at += CHUNK;
        }
        fetch_line(following.wrapping_add(at * O), (inner - at) * O);
    }
    let (rest, values) = (weights.map(|line| line.wrapping_add(at)), rows.map(|row| row.wrapping_add(at)));
    // SAFETY: as above.
    unsafe { along(rest, values, inner - at, &mut sums, &mut seen) };
    if W::CODES && L::none_among(seen) {
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
                y.add(r * STRIP + o).write(add_up(values) * factor);
            }
        }
    }
}

/// `places` places of `O` lines by `R` rows, onto `sums`.
///
/// # Safety
/// The processor has what `L` needs. Lines have these places, and rows too, up to whole groups of words.
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
