//! Products on AMX: 16 outputs' weights, as they lie in memory, times up to 16 rows, 32 values of the inner dimension at a
//! time. In: a strip of outputs and an operand in tiles. Out: f32. Never here: weights laid out anew; for a row alone the
//! reading of the weights is the whole cost, and for many rows the multiplying is.
//!
//! `TDPBF16PS` adds 16 products of the even and 16 of the odd places one after the other, then both sums to the
//! accumulator (Intel SDM, volume 2). An output's sum sees nothing of other rows or outputs.

use std::{
    arch::{asm, x86_64::*},
    ops::Range,
};

use half::bf16;

use super::{
    matrix::{Matrix, Values},
    operand::{Memory, STEP, TILE_ROWS, View},
};
use crate::checkpoint::fp8::decode_e4m3;

/// Outputs of one strip: two tiles of them share each load of rows.
pub(super) const STRIP: usize = 32;
const TILE: usize = TILE_ROWS * STEP;

/// Registers: 0 to 3 gather sums (outputs first or second half, by rows first or second half), 4 and 5 hold weights, 6 and
/// 7 rows.
#[repr(C, align(64))]
struct Shapes([u8; 64]);

impl Shapes {
    fn of(columns: usize) -> Self {
        let mut shapes = [0; 64];
        shapes[0] = 1;
        for register in 0..8 {
            let weights = matches!(register, 4 | 5);
            shapes[16 + 2 * register] = if weights { 64 } else { 4 * columns as u8 };
            shapes[48 + register] = TILE_ROWS as u8;
        }
        Self(shapes)
    }
}

/// What one thread needs beside the operands.
pub(super) struct Scratch {
    /// Weights of a strip that do not lie as tiles want them: BF16 `[32, inner padded]` or, decoded, of one stretch.
    weights: Memory,
    weights_len: usize,
    /// `[groups, 2, 16, columns]`: by group of rows, two tiles of outputs.
    sums: Vec<f32>,
}

/// Steps in which a strip's weights stay in the nearest cache while many groups of rows pass.
const STEPS_AT_ONCE: usize = 16;
/// A tile of sums, at most.
const SUMS: usize = TILE_ROWS * TILE_ROWS;

impl Scratch {
    pub(super) fn new() -> Self {
        Self { weights: Memory::zeroed(0), weights_len: 0, sums: Vec::new() }
    }

    fn weights(&mut self, values: usize) -> *mut u16 {
        if self.weights_len < values {
            self.weights = Memory::zeroed(values * 2);
            self.weights_len = values;
        }
        self.weights.start().cast()
    }

    /// Those of `groups` groups, whatever they were.
    fn sums(&mut self, groups: usize) -> *mut f32 {
        if self.sums.len() < groups * 2 * SUMS {
            self.sums.resize(groups * 2 * SUMS, 0.0);
        }
        self.sums.as_mut_ptr()
    }
}

/// Outputs `first..first + outs` of `x W^T`, at most 32 of them, into `y` `[T, 32]`.
///
/// `next` is what will be read after this: while this strip is multiplied, that is fetched, line after line as the memory
/// likes it.
///
/// # Safety
/// The processor has AMX, AVX-512 BF16 and VBMI; `x` is in tiles and of the matrix's inner size; `y` holds `T * 32`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
pub(super) unsafe fn strip(
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
    scratch: &mut Scratch,
    next: *const u8,
) {
    debug_assert!(outs <= STRIP && first + outs <= matrix.out && y.len() >= x.rows * STRIP);
    let shapes = Shapes::of(x.columns());
    // SAFETY: tile registers are nobody else's on this thread between here and the release; every pointer below stays
    // within the operand, the strip's rows or the scratch, as its place says.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly));
        match matrix.values {
            Values::Bf16(values) => bf16_strip(values, matrix.inner, (first, outs), x, y, scratch, next),
            Values::Fp8 { codes, .. } => fp8_strip(codes, matrix, (first, outs), x, y, scratch, next),
            Values::F32(_) => unreachable!("f32 weights are not multiplied in tiles"),
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// # Safety
/// As [`strip`]'s, with tiles configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
unsafe fn bf16_strip(
    values: &[bf16],
    inner: usize,
    (first, outs): (usize, usize),
    x: &View<'_>,
    y: &mut [f32],
    scratch: &mut Scratch,
    next: *const u8,
) {
    let ragged = outs < STRIP || !inner.is_multiple_of(STEP);
    let (weights, stride) = if ragged {
        let padded = x.padded();
        let copy = scratch.weights(STRIP * padded);
        for out in 0..STRIP {
            let line = copy.wrapping_add(out * padded);
            // SAFETY: line `out` of the scratch; row `first + out` of the weights where there is one.
            unsafe {
                let filled = if out < outs { inner } else { 0 };
                std::ptr::copy_nonoverlapping(
                    values.as_ptr().add((first + out.min(outs - 1)) * inner).cast(),
                    line,
                    filled,
                );
                std::ptr::write_bytes(line.add(filled), 0, padded - filled);
            }
        }
        (copy.cast_const(), padded)
    } else {
        (values[first * inner..].as_ptr().cast::<u16>(), inner)
    };
    let steps = inner.div_ceil(STEP);
    let (columns, groups) = (x.columns(), x.rows.div_ceil(x.columns()));
    let sums = scratch.sums(groups);
    let mut close = std::mem::MaybeUninit::<Close>::uninit();
    // Of few groups all steps at once: then the weights come from memory, and are met once.
    let at_once = if groups > 2 { STEPS_AT_ONCE } else { steps };
    for start in (0..steps).step_by(at_once) {
        let here = at_once.min(steps - start);
        let weights = (weights.wrapping_add(start * STEP), stride);
        // For many groups these steps are laid closer: rows a power of two apart would take each other's place in the cache.
        let weights = if groups > 2 {
            // SAFETY: 32 lines of `here` whole steps.
            (unsafe { close_up(weights, here, close.as_mut_ptr()) }, here * STEP)
        } else {
            weights
        };
        for group in (0..groups).step_by(2) {
            let rows = (x.tile(group, start), columns);
            let sums = sums.wrapping_add(group * 2 * SUMS);
            // SAFETY: `weights` are 32 lines of `here` whole steps; the groups are there, and so are their sums.
            unsafe {
                if group + 1 < groups {
                    sum_two(weights, (rows.0, x.tile(group + 1, start), columns), here, sums, start > 0);
                } else {
                    // The only rows there are fetch what comes next; among many it does not matter.
                    let ahead = if groups == 1 { next } else { std::ptr::null() };
                    sum_one(weights, rows, here, sums, start > 0, ahead);
                }
            }
        }
    }
    // SAFETY: all groups' sums are there, and `y` has a line for every row.
    unsafe { turn_all(sums, x, y) };
}

/// Room for a strip's weights of some steps.
#[repr(C, align(64))]
struct Close([u16; STRIP * STEPS_AT_ONCE * STEP]);

/// 32 lines of `steps` steps, one right after the other.
///
/// # Safety
/// So many are there, `stride` apart; `close` has room for them.
#[inline(always)]
unsafe fn close_up((weights, stride): (*const u16, usize), steps: usize, close: *mut Close) -> *const u16 {
    let close = close.cast::<u16>();
    for out in 0..STRIP {
        let from = weights.wrapping_add(out * stride);
        for step in 0..steps {
            // SAFETY: a step is 64 bytes; line `out`, step `step` on both sides.
            unsafe {
                let values = _mm512_loadu_si512(from.add(step * STEP).cast());
                _mm512_store_si512(close.add((out * steps + step) * STEP).cast(), values);
            }
        }
    }
    close
}

/// Sums of 32 outputs by one group of rows over `steps` steps, zero before or, to `go_on`, what they were.
///
/// # Safety
/// As [`bf16_strip`]'s.
#[inline(always)]
unsafe fn sum_one(
    (weights, stride): (*const u16, usize),
    (rows, columns): (*const u8, usize),
    steps: usize,
    sums: *mut f32,
    go_on: bool,
    next: *const u8,
) {
    let (line, tile) = (columns * 4, columns * STEP * 2);
    // SAFETY: the caller's; prefetches may point anywhere.
    unsafe {
        if go_on {
            asm!(
                "tileloadd tmm0, [{a} + {line} * 1]",
                "tileloadd tmm2, [{b} + {line} * 1]",
                a = in(reg) sums,
                b = in(reg) sums.wrapping_add(SUMS),
                line = in(reg) line,
                options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm2", options(nostack, nomem));
        }
        let mut step = 0;
        while step < steps {
            if !next.is_null() {
                fetch::<_MM_HINT_T1>(next.wrapping_add(step * 2048), 32);
            }
            let upper = weights.wrapping_add(step * STEP);
            asm!(
                "tileloadd tmm6, [{x} + {line} * 1]",
                "tileloadd tmm4, [{upper} + {stride} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {stride} * 1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                x = in(reg) rows.wrapping_add(step * tile),
                line = in(reg) line,
                upper = in(reg) upper,
                lower = in(reg) upper.wrapping_add(TILE_ROWS * stride),
                stride = in(reg) stride * 2,
                options(nostack, readonly),
            );
            step += 1;
        }
        asm!(
            "tilestored [{a} + {line} * 1], tmm0",
            "tilestored [{b} + {line} * 1], tmm2",
            a = in(reg) sums,
            b = in(reg) sums.wrapping_add(SUMS),
            line = in(reg) line,
            options(nostack),
        );
    }
}

/// The same by two groups of rows, whose sums follow each other.
///
/// # Safety
/// As [`bf16_strip`]'s.
#[inline(always)]
unsafe fn sum_two(
    (weights, stride): (*const u16, usize),
    (left, right, columns): (*const u8, *const u8, usize),
    steps: usize,
    sums: *mut f32,
    go_on: bool,
) {
    let (line, tile) = (columns * 4, columns * STEP * 2);
    let [a, b, c, d] = [0, 2, 1, 3].map(|tile| sums.wrapping_add(tile * SUMS));
    // SAFETY: the caller's.
    unsafe {
        if go_on {
            asm!(
                "tileloadd tmm0, [{a} + {line} * 1]",
                "tileloadd tmm1, [{b} + {line} * 1]",
                "tileloadd tmm2, [{c} + {line} * 1]",
                "tileloadd tmm3, [{d} + {line} * 1]",
                a = in(reg) a,
                b = in(reg) b,
                c = in(reg) c,
                d = in(reg) d,
                line = in(reg) line,
                options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        let mut step = 0;
        while step < steps {
            let upper = weights.wrapping_add(step * STEP);
            asm!(
                "tileloadd tmm4, [{upper} + {stride} * 1]",
                "tileloadd tmm6, [{left} + {line} * 1]",
                "tileloadd tmm7, [{right} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {stride} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                left = in(reg) left.wrapping_add(step * tile),
                right = in(reg) right.wrapping_add(step * tile),
                line = in(reg) line,
                upper = in(reg) upper,
                lower = in(reg) upper.wrapping_add(TILE_ROWS * stride),
                stride = in(reg) stride * 2,
                options(nostack, readonly),
            );
            step += 1;
        }
        asm!(
            "tilestored [{a} + {line} * 1], tmm0",
            "tilestored [{b} + {line} * 1], tmm1",
            "tilestored [{c} + {line} * 1], tmm2",
            "tilestored [{d} + {line} * 1], tmm3",
            a = in(reg) a,
            b = in(reg) b,
            c = in(reg) c,
            d = in(reg) d,
            line = in(reg) line,
            options(nostack),
        );
    }
}

/// Has `lines` cache lines brought nearer.
#[inline(always)]
pub(super) fn fetch<const HINT: i32>(from: *const u8, lines: usize) {
    for line in 0..lines {
        // SAFETY: a hint may point anywhere.
        unsafe { _mm_prefetch::<HINT>(from.wrapping_add(line * 64).cast()) };
    }
}

/// Rows `[64, width]` of a cache block, of which the first `columns` (a multiple of 16) are wanted, two by two side by side:
/// `[2, columns / 16, 16, 16, 2]`, which is what AMX wants of a right-hand side.
///
/// # Safety
/// As [`strip`]'s; `rows` has 64 rows, `pairs` room for `64 * columns`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn pair_rows(rows: *const bf16, width: usize, columns: usize, pairs: *mut u16) {
    for step in 0..2 {
        for tile in 0..columns / 16 {
            for pair in 0..16 {
                let upper = rows.wrapping_add((step * 32 + pair * 2) * width + tile * 16);
                let to = pairs.wrapping_add(((step * (columns / 16) + tile) * 16 + pair) * 32);
                // SAFETY: 16 columns of two of the rows; one line of the tile.
                unsafe {
                    let first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(upper.cast()));
                    let second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(upper.wrapping_add(width).cast()));
                    _mm512_storeu_si512(to.cast(), _mm512_or_si512(first, _mm512_slli_epi32::<16>(second)));
                }
            }
        }
    }
}

/// `sums += weights * pairs`: 16 lines of 64 BF16 weights, by rows laid out by [`pair_rows`], to `[16, columns]`.
///
/// # Safety
/// As [`strip`]'s; the sizes are as said.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn weigh(weights: *const u16, pairs: *const u16, columns: usize, sums: *mut f32) {
    let shapes = Shapes::of(TILE_ROWS);
    // SAFETY: tile registers are nobody else's on this thread between here and the release; the rest is the caller's.
    unsafe {
        asm!(
            "ldtilecfg [{shapes}]",
            "tileloadd tmm4, [{weights} + {stride} * 1]",
            "tileloadd tmm5, [{weights} + {stride} * 1 + 64]",
            shapes = in(reg) &raw const shapes,
            weights = in(reg) weights,
            stride = in(reg) 128usize,
            options(nostack, readonly),
        );
        for tile in 0..columns / 16 {
            let upper = pairs.wrapping_add(tile * TILE);
            asm!(
                "tileloadd tmm0, [{sums} + {stride} * 1]",
                "tileloadd tmm6, [{upper} + {line} * 1]",
                "tileloadd tmm7, [{lower} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm0, tmm5, tmm7",
                "tilestored [{sums} + {stride} * 1], tmm0",
                sums = in(reg) sums.wrapping_add(tile * 16),
                stride = in(reg) columns * 4,
                upper = in(reg) upper,
                lower = in(reg) upper.wrapping_add(columns / 16 * TILE),
                line = in(reg) 64usize,
                options(nostack),
            );
        }
        asm!("tilerelease", options(nostack, nomem));
    }
}

/// Stretch by stretch: decodes 32 outputs' codes to BF16, which is exact, multiplies, and adds the products by the block's
/// scale to the sums.
///
/// # Safety
/// As [`strip`]'s, with tiles configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
unsafe fn fp8_strip(
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
    unsafe { turn_all(sums, x, y) };
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
    /// As [`strip`]'s; the stretch is of the strip's rows, and `to` has room for it.
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

/// E4M3 to BF16 by two lookups in tables of 128 bytes, the sign apart.
pub(super) struct Tables {
    low: [__m512i; 2],
    high: [__m512i; 2],
    sign: __m512i,
    order: __m512i,
}

static BYTES: std::sync::LazyLock<[[u8; 128]; 2]> = std::sync::LazyLock::new(|| {
    let bits = |code: usize| (decode_e4m3(code as u8).to_bits() >> 16) as u16;
    [std::array::from_fn(|code| bits(code) as u8), std::array::from_fn(|code| (bits(code) >> 8) as u8)]
});

impl Tables {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    pub(super) fn new() -> Self {
        let [low, high] = &*BYTES;
        // SAFETY: both halves of 128 bytes.
        let load = |bytes: &[u8; 128]| unsafe {
            [_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bytes.as_ptr().add(64).cast())]
        };
        Self {
            low: load(low),
            high: load(high),
            sign: _mm512_set1_epi8(-128),
            // So that what is interleaved within each quarter comes out in order.
            order: _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
        }
    }

    /// `len` codes to BF16, and zeros up to a multiple of 64.
    ///
    /// # Safety
    /// `codes` has `len` bytes, `to` room for them and the zeros.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    #[inline]
    pub(super) unsafe fn decode(&self, codes: *const u8, len: usize, to: *mut u16) {
        let mut at = 0;
        while at < len {
            // SAFETY: the mask keeps the load within `len`; 64 values are written from a multiple of 64 below `len` on.
            unsafe {
                let here = if len - at >= 64 {
                    _mm512_loadu_si512(codes.add(at).cast())
                } else {
                    _mm512_maskz_loadu_epi8((1 << (len - at)) - 1, codes.add(at).cast())
                };
                let here = _mm512_permutexvar_epi64(self.order, here);
                let low = _mm512_permutex2var_epi8(self.low[0], here, self.low[1]);
                let high = _mm512_permutex2var_epi8(self.high[0], here, self.high[1]);
                // high | (here & sign)
                let high = _mm512_ternarylogic_epi64::<0xf8>(high, here, self.sign);
                _mm512_storeu_si512(to.add(at).cast(), _mm512_unpacklo_epi8(low, high));
                _mm512_storeu_si512(to.add(at + 32).cast(), _mm512_unpackhi_epi8(low, high));
            }
            at += 64;
        }
    }
}

/// All groups' sums `[2, 16, columns]` to lines of 32 outputs, one per row.
///
/// # Safety
/// The sums of all of `x`'s groups are there, and `y` has as many lines as `x` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn turn_all(sums: *const f32, x: &View<'_>, y: &mut [f32]) {
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
/// As [`strip`]'s; every line has 32 values, `to` room for 1 KiB.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn lay_out_f32(lines: [*const f32; TILE_ROWS], to: *mut u8) {
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
pub(super) unsafe fn lay_out_bf16(lines: [*const bf16; TILE_ROWS], to: *mut u8) {
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

const _: () = assert!(TILE * 2 == 1024);
