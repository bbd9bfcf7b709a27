//! Products on AMX: 16 outputs' weights, as they lie in memory, times up to 16 rows, 32 values of the inner dimension at a
//! time. In: a strip of outputs and an operand in tiles. Out: f32. Never here: weights laid out anew; for a row alone the
//! reading of the weights is the whole cost, and for many rows the multiplying is.
//!
//! `TDPBF16PS` adds 16 products of the even and 16 of the odd places one after the other, then both sums to the
//! accumulator (Intel SDM, volume 2). An output's sum sees nothing of other rows or outputs.

use std::arch::{asm, x86_64::*};

use half::bf16;

use super::{
    matrix::{Matrix, Values},
    operand::{Memory, Operand, STEP, TILE_ROWS},
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
    /// A tile of sums.
    sums: Box<[[f32; 16 * TILE_ROWS]; 4]>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self { weights: Memory::zeroed(0), weights_len: 0, sums: Box::new([[0.0; 256]; 4]) }
    }

    fn weights(&mut self, values: usize) -> *mut u16 {
        if self.weights_len < values {
            self.weights = Memory::zeroed(values * 2);
            self.weights_len = values;
        }
        self.weights.start().cast()
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
    x: &Operand,
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
    x: &Operand,
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
                std::ptr::copy_nonoverlapping(values.as_ptr().add((first + out.min(outs - 1)) * inner).cast(), line, filled);
                std::ptr::write_bytes(line.add(filled), 0, padded - filled);
            }
        }
        (copy.cast_const(), padded)
    } else {
        (values[first * inner..].as_ptr().cast::<u16>(), inner)
    };
    let steps = inner.div_ceil(STEP);
    let columns = x.columns();
    let groups = x.rows.div_ceil(columns);
    let mut group = 0;
    while group < groups {
        let both = group + 1 < groups;
        // The first rows fetch what comes next; the others find it there.
        let ahead = if group == 0 { next } else { std::ptr::null() };
        // SAFETY: `weights` are 32 lines of `steps` whole steps; groups `group` and, where `both`, the next are there.
        unsafe {
            if both {
                sum_two((weights, stride), (x.tile(group, 0), x.tile(group + 1, 0)), columns, steps, &mut scratch.sums);
            } else {
                sum_one((weights, stride), x.tile(group, 0), columns, steps, &mut scratch.sums, ahead);
            }
            for part in 0..=usize::from(both) {
                let rows = columns.min(x.rows - (group + part) * columns);
                for half in 0..2 {
                    let to = y.as_mut_ptr().add((group + part) * columns * STRIP + half * TILE_ROWS);
                    turn(&scratch.sums[2 * half + part], columns, rows, to);
                }
            }
        }
        group += 1 + usize::from(both);
    }
}

/// Zeroes the sums and adds `steps` steps of 32 outputs by one group of rows.
///
/// # Safety
/// As [`bf16_strip`]'s.
#[inline(always)]
unsafe fn sum_one(
    (weights, stride): (*const u16, usize),
    rows: *const u8,
    columns: usize,
    steps: usize,
    sums: &mut [[f32; 256]; 4],
    next: *const u8,
) {
    let (line, tile) = (columns * 4, columns * STEP * 2);
    // SAFETY: the caller's; prefetches may point anywhere.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm2", options(nostack, nomem));
        let mut step = 0;
        while step < steps {
            if !next.is_null() {
                let lines = next.wrapping_add(step * 2048).cast::<i8>();
                for ahead in 0..32 {
                    _mm_prefetch::<_MM_HINT_T1>(lines.wrapping_add(ahead * 64));
                }
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
            a = in(reg) sums[0].as_mut_ptr(),
            b = in(reg) sums[2].as_mut_ptr(),
            line = in(reg) line,
            options(nostack),
        );
    }
}

/// The same by two groups of rows.
///
/// # Safety
/// As [`bf16_strip`]'s.
#[inline(always)]
unsafe fn sum_two(
    (weights, stride): (*const u16, usize),
    (left, right): (*const u8, *const u8),
    columns: usize,
    steps: usize,
    sums: &mut [[f32; 256]; 4],
) {
    let (line, tile) = (columns * 4, columns * STEP * 2);
    // SAFETY: the caller's.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
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
            a = in(reg) sums[0].as_mut_ptr(),
            b = in(reg) sums[1].as_mut_ptr(),
            c = in(reg) sums[2].as_mut_ptr(),
            d = in(reg) sums[3].as_mut_ptr(),
            line = in(reg) line,
            options(nostack),
        );
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
/// scale to `y`.
///
/// # Safety
/// As [`strip`]'s, with tiles configured.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16,f16c,fma,avx2")]
unsafe fn fp8_strip(
    codes: &[u8],
    matrix: &Matrix<'_>,
    (first, outs): (usize, usize),
    x: &Operand,
    y: &mut [f32],
    scratch: &mut Scratch,
    next: *const u8,
) {
    let inner = matrix.inner;
    let columns = x.columns();
    let groups = x.rows.div_ceil(columns);
    y[..x.rows * STRIP].fill(0.0);
    let tables = Tables::new();
    let mut fetched = 0;
    for stretch in matrix.stretches() {
        let width = stretch.len().next_multiple_of(2 * STEP);
        let weights = scratch.weights(STRIP * width);
        for out in 0..STRIP {
            let line = weights.wrapping_add(out * width);
            // SAFETY: line `out` of the scratch; the stretch of row `first + out` where there is one.
            unsafe {
                if !next.is_null() {
                    for ahead in 0..stretch.len().div_ceil(64) {
                        _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add((fetched + ahead) * 64).cast());
                    }
                    fetched += stretch.len().div_ceil(64);
                }
                if out < outs {
                    let row = codes.as_ptr().add((first + out) * inner + stretch.start);
                    tables.decode(row, stretch.len(), line);
                } else {
                    std::ptr::write_bytes(line, 0, width);
                }
            }
        }
        let scales: [f32; STRIP] =
            std::array::from_fn(|out| if out < outs { matrix.scale(first + out, stretch.start) } else { 0.0 });
        let steps = stretch.len().div_ceil(STEP);
        let start = stretch.start / STEP;
        let mut group = 0;
        while group < groups {
            let both = group + 1 < groups;
            // SAFETY: the scratch holds 32 lines of whole steps; the groups are there.
            unsafe {
                if both {
                    let rows = (x.tile(group, start), x.tile(group + 1, start));
                    sum_two((weights, width), rows, columns, steps, &mut scratch.sums);
                } else {
                    sum_one((weights, width), x.tile(group, start), columns, steps, &mut scratch.sums, std::ptr::null());
                }
                for part in 0..=usize::from(both) {
                    let rows = columns.min(x.rows - (group + part) * columns);
                    for half in 0..2 {
                        let mut turned = [0.0; 16 * TILE_ROWS];
                        turn_to(&scratch.sums[2 * half + part], columns, rows, turned.as_mut_ptr(), TILE_ROWS);
                        let scales = _mm512_loadu_ps(scales.as_ptr().add(half * TILE_ROWS));
                        for row in 0..rows {
                            let to =
                                y.as_mut_ptr().add(((group + part) * columns + row) * STRIP + half * TILE_ROWS);
                            let products = _mm512_loadu_ps(turned.as_ptr().add(row * TILE_ROWS));
                            _mm512_storeu_ps(to, _mm512_fmadd_ps(products, scales, _mm512_loadu_ps(to)));
                        }
                    }
                }
            }
            group += 1 + usize::from(both);
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

/// Sums `[16, columns]` of 16 outputs to `rows` lines of 16, one under the other in a strip.
///
/// # Safety
/// As [`turn_to`]'s.
#[inline(always)]
unsafe fn turn(sums: &[f32; 256], columns: usize, rows: usize, to: *mut f32) {
    // SAFETY: the caller's.
    unsafe { turn_to(sums, columns, rows, to, STRIP) }
}

/// # Safety
/// `to` has `rows` lines of 16 values, `stride` apart; `rows` is at most `columns`, and that at most 16.
#[inline(always)]
unsafe fn turn_to(sums: &[f32; 256], columns: usize, rows: usize, to: *mut f32, stride: usize) {
    if columns == TILE_ROWS {
        let mut turned = [[0.0f32; 16]; 16];
        for (out, line) in sums.chunks_exact(TILE_ROWS).enumerate() {
            for (row, value) in line.iter().enumerate() {
                turned[row][out] = *value;
            }
        }
        for (row, line) in turned.iter().enumerate().take(rows) {
            // SAFETY: line `row` is there.
            unsafe { std::ptr::copy_nonoverlapping(line.as_ptr(), to.add(row * stride), TILE_ROWS) };
        }
        return;
    }
    for row in 0..rows {
        for out in 0..TILE_ROWS {
            // SAFETY: line `row` has 16 values.
            unsafe { to.add(row * stride + out).write(sums[out * columns + row]) };
        }
    }
}

const _: () = assert!(TILE * 2 == 1024);
