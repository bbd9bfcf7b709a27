//! Loops of the screen. In: lines of a head, whole numbers of lines and rows. Out: whole numbers, their products, bounds. Never
//! here: which line may win.
//!
//! Written and compiled as the wire's loops are.

use crate::kernels::{Isa, isa::by_isa};

by_isa! {
    /// `line` in whole steps, of which its largest value has 127, and what that loses. Not finite where `line` is not.
    fn line_in_steps(line: &[f32], codes: &mut [i8]) -> crate::head::screen::Worth;
    /// The same of a row, whose largest value has `most_steps`.
    fn row_in_steps(x: &[f32], most_steps: f32, steps: &mut [i16]) -> crate::head::screen::Worth;
    /// The sum of the products of both, which fits.
    fn dot(line: &[i8], x: &[i16]) -> i32;
    /// The same of four rows.
    fn four_dots(line: &[i8], x: [&[i16]; 4]) -> [i32; 4];
    /// From the products of lines with a row to what logits are at most, into `most`, and what is known of them together.
    fn bounds(
        lines: &[crate::head::screen::Worth],
        row: crate::head::screen::Worth,
        dots: &[i32],
        most: &mut [f32]
    ) -> crate::head::screen::Known;
}

mod portable {
    use crate::head::screen::{Known, ROUNDING, Worth};

    /// Values at a time: lanes that do not wait for each other become vectors.
    const LANES: usize = 32;

    #[inline(always)]
    pub(super) fn line_in_steps(line: &[f32], codes: &mut [i8]) -> Worth {
        in_steps(line, 127.0, codes, |whole| whole as i8)
    }

    #[inline(always)]
    pub(super) fn row_in_steps(x: &[f32], most_steps: f32, steps: &mut [i16]) -> Worth {
        in_steps(x, most_steps, steps, |whole| whole as i16)
    }

    #[inline(always)]
    fn in_steps<T: Default>(line: &[f32], most_steps: f32, codes: &mut [T], code_of: impl Fn(f32) -> T) -> Worth {
        let mut most = [0f32; LANES];
        for values in line.chunks(LANES) {
            for (most, value) in most.iter_mut().zip(values) {
                *most = if value.abs() > *most { value.abs() } else { *most };
            }
        }
        let most = most.into_iter().fold(0.0, f32::max);
        let step = most / most_steps;
        if step < f32::MIN_POSITIVE {
            // Zeros, or what is next to them; or no numbers.
            codes.fill_with(T::default);
            let left =
                if line.iter().any(|value| value.is_nan()) { f32::NAN } else { most * (line.len() as f32).sqrt() };
            return Worth { step, left, norm: 0.0 };
        }
        // In steps, so that squares are neither too small nor too large.
        let (mut left, mut norm) = ([0f32; LANES], [0f32; LANES]);
        for (values, codes) in line.chunks(LANES).zip(codes.chunks_mut(LANES)) {
            for (((value, code), left), norm) in values.iter().zip(codes).zip(&mut left).zip(&mut norm) {
                let steps = value / step;
                let whole = steps.round_ties_even();
                *code = code_of(whole);
                *left += (steps - whole) * (steps - whole);
                *norm += whole * whole;
            }
        }
        let length = |squares: [f32; LANES]| step * squares.iter().sum::<f32>().sqrt();
        Worth { step, left: length(left), norm: length(norm) }
    }

    #[inline(always)]
    pub(super) fn dot(line: &[i8], x: &[i16]) -> i32 {
        line.iter().zip(x).map(|(code, x)| i32::from(*code) * i32::from(*x)).sum()
    }

    #[inline(always)]
    pub(super) fn four_dots(line: &[i8], x: [&[i16]; 4]) -> [i32; 4] {
        let [a, b, c, d] = x.map(|x| &x[..line.len()]);
        let mut sums = [0; 4];
        for (at, code) in line.iter().enumerate() {
            let code = i32::from(*code);
            sums[0] += code * i32::from(a[at]);
            sums[1] += code * i32::from(b[at]);
            sums[2] += code * i32::from(c[at]);
            sums[3] += code * i32::from(d[at]);
        }
        sums
    }

    #[inline(always)]
    pub(super) fn bounds(lines: &[Worth], row: Worth, dots: &[i32], most: &mut [f32]) -> Known {
        let mut known = Known { least: f32::NEG_INFINITY, most: f32::NEG_INFINITY };
        for ((line, dot), most) in lines.iter().zip(dots).zip(most) {
            // e x + s q d, at most; and what was rounded.
            let off = line.left * (row.norm + row.left) + line.norm * row.left;
            let rounded = (line.left + line.norm) * (row.norm + row.left) * ROUNDING;
            let (logit, off) = (line.step * *dot as f32 * row.step, off + rounded + f32::MIN_POSITIVE);
            // What overflows may win.
            *most = if (logit + off).is_nan() { f32::INFINITY } else { logit + off };
            known.least = known.least.max(logit - off);
            known.most = known.most.max(*most);
        }
        known
    }
}
