//! Loops of the screen. In: lines of a head, whole numbers of lines and rows. Out: whole numbers, their products,
//! bounds. Never here: which line may win.
//!
//! Written and compiled as the wire's loops are, but for the products, which want instructions that compilers do not
//! find.

use super::screen::{Drawn, Line, Row, Worth};
use crate::kernels::{Isa, isa::by_isa};

/// Values that share a step.
pub(super) const BLOCK: usize = 64;
/// Lines of a part, whose sizes lie block by block.
pub(super) const PART: usize = 128;
/// Bytes of a block's numbers: the first half of it in lower halves of bytes, the second in upper.
pub(super) const BYTES: usize = BLOCK / 2;

by_isa! {
    /// Whole blocks `x`, each value by its sign and each block by a Hadamard matrix over 8, which is orthogonal.
    fn turn(x: &mut [f32], signs: &[f32]);
    /// A turned line in numbers of 4 bits, and the steps of its blocks, one in every part's lines of `sizes`. Its
    /// norm is not finite where the line is not.
    fn line_in_steps(
        line: &[f32],
        drawn: &crate::head::screen::Drawn,
        codes: &mut [u8],
        sizes: &mut [u8]
    ) -> crate::head::screen::Line;
    /// A turned row in numbers of 8 bits, and of each block what the lines' draws take off and the square of its
    /// norm, in steps.
    fn row_in_steps(
        x: &[f32],
        drawn: &crate::head::screen::Drawn,
        codes: &mut [i8],
        offsets: &mut [f32],
        squares: &mut [f32]
    ) -> crate::head::screen::Worth;
    /// From the products of lines with a row to what logits are at most, into `most`; and where the greatest probably
    /// is, and what.
    fn bounds(
        lines: &[crate::head::screen::Line],
        sizes: &[u8],
        row: &crate::head::screen::Row,
        dots: &[f32],
        most: &mut [f32]
    ) -> (usize, f32);
}

/// Of a line's numbers and those of each row: the sum of their products, a block's times its size. It is off by what
/// sums of f32 are. `sizes` begins with the line's first, and a part further lies its next.
pub(super) fn dots<const R: usize>(codes: &[u8], sizes: &[u8], rows: [&[i8]; R]) -> [f32; R] {
    let blocks = codes.len() / BYTES;
    assert!(rows.iter().all(|row| row.len() == blocks * BLOCK) && sizes.chunks(PART).len() >= blocks);
    match Isa::best() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: all of these have AVX2, and the lengths are checked.
        #[allow(unsafe_code)]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { dots_avx2(codes, sizes, rows) },
        _ => plain_dots(codes, sizes, rows),
    }
}

fn plain_dots<const R: usize>(codes: &[u8], sizes: &[u8], rows: [&[i8]; R]) -> [f32; R] {
    let of_block = |bytes: &[u8], x: &[i8]| -> i32 {
        let (low, high) = x.split_at(BYTES);
        let of_byte = |(byte, (low, high)): (&u8, (&i8, &i8))| {
            i32::from(byte & 15) * i32::from(*low) + i32::from(byte >> 4) * i32::from(*high)
        };
        bytes.iter().zip(low.iter().zip(high)).map(of_byte).sum()
    };
    rows.map(|row| {
        let blocks = codes.chunks_exact(BYTES).zip(sizes.iter().step_by(PART)).zip(row.chunks_exact(BLOCK));
        blocks.map(|((bytes, size), x)| i64::from(of_block(bytes, x) * i32::from(*size))).sum::<i64>() as f32
    })
}

/// Two products of a number below 16 and one within 127 fit into 16 bits, and so do four; times a size, two of those
/// into 32 bits, and so does the sum of some hundred blocks.
///
/// # Safety
/// The processor has AVX2; of B blocks there are 32 bytes of codes each, one of sizes a part apart, and 64 of each row.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[allow(unsafe_code)]
unsafe fn dots_avx2<const R: usize>(codes: &[u8], sizes: &[u8], rows: [&[i8]; R]) -> [f32; R] {
    use std::arch::x86_64::*;
    /// Bytes that lines are fetched ahead.
    const AHEAD: usize = 8 << 10;
    let low = _mm256_set1_epi8(15);
    let mut sums = [_mm256_setzero_si256(); R];
    for (block, codes) in codes.as_chunks::<BYTES>().0.iter().enumerate() {
        // What comes next is of other lines.
        _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(AHEAD).cast());
        // SAFETY: 32 bytes; one size per block is there.
        let (both, size) = unsafe { (_mm256_loadu_si256(codes.as_ptr().cast()), *sizes.as_ptr().add(block * PART)) };
        let (first, second) = (_mm256_and_si256(both, low), _mm256_and_si256(_mm256_srli_epi16::<4>(both), low));
        let size = _mm256_set1_epi16(i16::from(size));
        for (sum, row) in sums.iter_mut().zip(&rows) {
            // SAFETY: 64 bytes per block are there.
            let (x, rest) = unsafe {
                let x = row.as_ptr().add(block * BLOCK).cast::<__m256i>();
                (_mm256_loadu_si256(x), _mm256_loadu_si256(x.add(1)))
            };
            let products = _mm256_add_epi16(_mm256_maddubs_epi16(first, x), _mm256_maddubs_epi16(second, rest));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(products, size));
        }
    }
    sums.map(|sum| {
        let eight = _mm256_cvtepi32_ps(sum);
        let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    })
}

mod portable {
    use super::{BLOCK, BYTES, Drawn, Line, PART, Row, Worth};
    use crate::head::screen::{DEVIATIONS, ROUNDING};

    /// Values at a time: lanes that do not wait for each other become vectors.
    const LANES: usize = 32;
    /// The largest value of a block in its steps, and what is added so that no number is below zero.
    const LARGEST: f32 = 7.0;
    const ZERO: f32 = 8.0;
    /// Of a step, the standard deviation of what is drawn from it.
    const UNIFORM: f32 = 0.288_675_13;

    /// Of whole blocks.
    #[inline(always)]
    fn largest(values: &[f32]) -> f32 {
        let mut most = [0f32; LANES];
        for values in values.as_chunks::<LANES>().0 {
            for (most, value) in most.iter_mut().zip(values) {
                *most = if value.abs() > *most { value.abs() } else { *most };
            }
        }
        most.into_iter().fold(0.0, f32::max)
    }

    /// Those of a whole number of a few bits, which 1.5 * 2^23 leaves there: what conversions do about what is none
    /// is no loop of vectors.
    #[inline(always)]
    fn lowest_bits(whole: f32) -> u32 {
        (whole + 12_582_912.0).to_bits()
    }

    #[inline(always)]
    pub(super) fn turn(x: &mut [f32], signs: &[f32]) {
        for (x, signs) in x.as_chunks_mut::<BLOCK>().0.iter_mut().zip(signs.as_chunks::<BLOCK>().0) {
            for (x, sign) in x.iter_mut().zip(signs) {
                *x *= sign * 0.125;
            }
            // Of eight by eight values: between rows, and, after both have changed places, between what were columns.
            between_rows(x);
            let was = *x;
            for (at, x) in x.iter_mut().enumerate() {
                *x = was[at % 8 * 8 + at / 8];
            }
            between_rows(x);
        }
    }

    #[inline(always)]
    fn between_rows(x: &mut [f32; BLOCK]) {
        for half in [8, 16, 32] {
            for both in x.chunks_exact_mut(2 * half) {
                let (low, high) = both.split_at_mut(half);
                for (low, high) in low.iter_mut().zip(high) {
                    (*low, *high) = (*low + *high, *low - *high);
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn line_in_steps(line: &[f32], drawn: &Drawn, codes: &mut [u8], sizes: &mut [u8]) -> Line {
        // Also of a line that is next to nothing, so that no step is nothing.
        let step = (largest(line) / (LARGEST * 255.0)).max(f32::MIN_POSITIVE);
        // In steps of the line, so that squares are neither too small nor too large.
        let (mut stored, mut kept, mut shift) = ([0f32; BLOCK], [0f32; BLOCK], [0f32; BLOCK]);
        let draws = drawn.for_lines.as_chunks::<BLOCK>().0.iter().zip(drawn.for_rows.as_chunks::<BLOCK>().0);
        let blocks = line
            .as_chunks::<BLOCK>()
            .0
            .iter()
            .zip(draws)
            .zip(codes.chunks_exact_mut(BYTES))
            .zip(sizes.iter_mut().step_by(PART));
        for (((values, (for_lines, for_rows)), codes), size) in blocks {
            let whole = (largest(values) / (LARGEST * step)).ceil().clamp(1.0, 255.0);
            *size = whole as u8;
            let of_block = step * whole;
            let mut numbers = [0u8; BLOCK];
            for at in 0..BLOCK {
                let steps = values[at] / of_block;
                let code = (steps + for_lines[at]).round_ties_even().clamp(-ZERO, LARGEST);
                numbers[at] = lowest_bits(code + ZERO) as u8;
                let (value, as_kept) = (steps * whole, (code - for_lines[at]) * whole);
                stored[at] += value * value;
                kept[at] += as_kept * as_kept;
                shift[at] += as_kept * for_rows[at];
            }
            let (low, high) = numbers.split_at(BYTES);
            for (code, (low, high)) in codes.iter_mut().zip(low.iter().zip(high)) {
                *code = low | high << 4;
            }
        }
        let length = |squares: [f32; BLOCK]| squares.iter().sum::<f32>().sqrt();
        let (stored, kept) = (length(stored), length(kept));
        // At least what sums here are measured by; and what is no number is told, which the larger of two does not.
        Line {
            step,
            norm: step * (stored.max(kept).max(LARGEST * 255.0) + stored * 0.0),
            shift: step * shift.iter().sum::<f32>(),
        }
    }

    #[inline(always)]
    pub(super) fn row_in_steps(
        x: &[f32],
        drawn: &Drawn,
        codes: &mut [i8],
        offsets: &mut [f32],
        squares: &mut [f32],
    ) -> Worth {
        let step = largest(x) / 126.0;
        let mut norm = 0.0;
        let draws = drawn.for_lines.as_chunks::<BLOCK>().0.iter().zip(drawn.for_rows.as_chunks::<BLOCK>().0);
        let places = codes.as_chunks_mut::<BLOCK>().0.iter_mut().zip(offsets).zip(squares);
        for ((values, (for_lines, for_rows)), ((codes, offset), square)) in
            x.as_chunks::<BLOCK>().0.iter().zip(draws).zip(places)
        {
            let (mut off, mut of_block) = ([0f32; BLOCK], [0f32; BLOCK]);
            for at in 0..BLOCK {
                let steps = values[at] / step;
                let whole = (steps + for_rows[at]).round_ties_even();
                codes[at] = lowest_bits(whole) as i8;
                off[at] = whole * (ZERO + for_lines[at]);
                of_block[at] = steps * steps;
            }
            (*offset, *square) = (off.iter().sum(), of_block.iter().sum());
            norm += *square;
        }
        Worth { step, norm: step * norm.sqrt() }
    }

    #[inline(always)]
    pub(super) fn bounds(lines: &[Line], sizes: &[u8], row: &Row, dots: &[f32], most: &mut [f32]) -> (usize, f32) {
        let Worth { step, norm } = row.worth;
        // Of each lane the greatest, and whose lines that was.
        let (mut greatest, mut at) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
        let chunks = lines.chunks(LANES).zip(dots.chunks(LANES)).zip(most.chunks_mut(LANES));
        for (chunk, ((lines, dots), most)) in chunks.enumerate() {
            let (mut off, mut squares) = ([0f32; LANES], [0f32; LANES]);
            for ((sizes, offset), square) in sizes.chunks_exact(PART).zip(&row.offsets).zip(&row.squares) {
                let sizes = &sizes[chunk * LANES..][..LANES];
                for lane in 0..LANES {
                    let size = f32::from(sizes[lane]);
                    off[lane] += size * offset;
                    squares[lane] += size * size * square;
                }
            }
            for (lane, ((line, dot), most)) in lines.iter().zip(dots).zip(most).enumerate() {
                let logit = (line.step * (dot - off[lane]) - line.shift) * step;
                let drawn = (line.step * squares[lane].sqrt() + line.norm) * step * (DEVIATIONS * UNIFORM);
                // Sums here are off by less than that, too: their parts are some times as large as |w| |x| at most.
                let beside = drawn + line.norm * norm * ROUNDING + f32::MIN_POSITIVE;
                // What overflows may win.
                *most = if (logit + beside).is_finite() { logit + beside } else { f32::INFINITY };
                let greater = logit > greatest[lane];
                greatest[lane] = if greater { logit } else { greatest[lane] };
                at[lane] = if greater { chunk as u32 } else { at[lane] };
            }
        }
        let mut likeliest = (0, f32::NEG_INFINITY);
        for lane in 0..LANES {
            if greatest[lane] > likeliest.1 {
                likeliest = (at[lane] as usize * LANES + lane, greatest[lane]);
            }
        }
        likeliest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn products_are_the_same_for_one_row_and_for_four(
            blocks in 1usize..20,
            codes in prop::collection::vec(any::<u8>(), 20 * BYTES),
            sizes in prop::collection::vec(any::<u8>(), 20 * PART),
            rows in prop::collection::vec(-127i8..=127, 4 * 20 * BLOCK),
        ) {
            let codes = &codes[..blocks * BYTES];
            let rows: [&[i8]; 4] = std::array::from_fn(|row| &rows[row * blocks * BLOCK..][..blocks * BLOCK]);
            let right = plain_dots(codes, &sizes, rows);
            let (four, alone) = (dots(codes, &sizes, rows), rows.map(|row| dots(codes, &sizes, [row])[0]));
            prop_assert_eq!(four, alone);
            for (dot, right) in four.into_iter().zip(right) {
                prop_assert!((dot - right).abs() <= 1e-6 * (15 * 127 * 255 * BLOCK * blocks) as f32, "{dot} {right}");
            }
        }

        #[test]
        fn what_is_turned_keeps_its_products(blocks in 1usize..4, seed in prop::collection::vec(-1f32..1.0, 3 * 4 * BLOCK)) {
            let [a, b, signs] = [0, 1, 2].map(|part| seed[part * 4 * BLOCK..][..blocks * BLOCK].to_vec());
            let signs: Vec<f32> = signs.iter().map(|sign| sign.signum()).collect();
            let product = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let right = product(&a, &b);
            let [a, b] = [a, b].map(|mut x| {
                turn(&mut x, &signs);
                x
            });
            prop_assert!((product(&a, &b) - right).abs() < 1e-4);
        }
    }

    #[test]
    fn the_largest_products_fit() {
        let (codes, sizes, row) = (vec![255; 512 * BYTES], vec![255; 512 * PART], vec![-127; 512 * BLOCK]);
        let right = (-127 * 15 * 255 * 512 * BLOCK as i64) as f32;
        assert_eq!(dots(&codes, &sizes, [&row]), [right]);
    }
}
