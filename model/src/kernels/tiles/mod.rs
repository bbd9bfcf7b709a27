//! Products on AMX: 16 outputs' weights, as they lie in memory, times up to 16 rows, 32 values of the inner dimension at a
//! time. In: a strip of outputs and an operand in tiles. Out: f32. Never here: weights laid out anew; for a row alone the
//! reading of the weights is the whole cost, and for many rows the multiplying is.
//!
//! [`fp8`] decodes codes on the way, [`layout`] turns rows into tiles and sums into rows, [`values`] weighs a cache block.
//!
//! `TDPBF16PS` adds 16 products of the even and 16 of the odd places one after the other, then both sums to the
//! accumulator (Intel SDM, volume 2). An output's sum sees nothing of other rows or outputs.

mod fp8;
mod layout;
mod values;

pub(super) use layout::{lay_out_bf16, lay_out_f32};
pub(super) use values::{pair_rows, weigh};

use std::arch::{asm, x86_64::*};

use half::bf16;

use super::{
    grown,
    matrix::{Matrix, Values},
    operand::{Memory, STEP, TILE_ROWS, View},
};

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
        grown(&mut self.sums, groups * 2 * SUMS).as_mut_ptr()
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
            Values::Fp8 { codes, .. } => fp8::strip(codes, matrix, (first, outs), x, y, scratch, next),
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
    unsafe { layout::turn_all(sums, x, y) };
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
