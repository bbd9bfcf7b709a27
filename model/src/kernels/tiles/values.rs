//! What attention does with the latents of a cache block: their weighted sum. In: 64 rows of the cache and the weights of up
//! to 16 queries each. Out: sums, added to. Never here: scores.

use std::arch::{asm, x86_64::*};

use half::bf16;

use super::{super::operand::TILE_ROWS, Shapes, TILE};

/// Rows `[64, width]` of a cache block, of which the first `columns` (a multiple of 16) are wanted, two by two side by side:
/// `[2, columns / 16, 16, 16, 2]`, which is what AMX wants of a right-hand side.
///
/// # Safety
/// As [`super::strip`]'s; `rows` has 64 rows, `pairs` room for `64 * columns`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(in crate::kernels) unsafe fn pair_rows(rows: *const bf16, width: usize, columns: usize, pairs: *mut u16) {
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
/// As [`super::strip`]'s; the sizes are as said.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(in crate::kernels) unsafe fn weigh(weights: *const u16, pairs: *const u16, columns: usize, sums: *mut f32) {
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
