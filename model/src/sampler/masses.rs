//! Exponentials of a whole row of logits. In: logits, and the greatest of them. Out: masses, probabilities that are not yet divided
//! by their sum. Never here: what is kept or drawn.
//!
//! Written and compiled as the wire's loops are: the forms agree bit for bit, so any router draws what any other would.

use crate::kernels::{Isa, isa::by_isa};

by_isa! {
    /// `exp((logit - most) / temperature)` of each of `logits`, none of which is above `most`, into `out`; 0 where that is below
    /// `floor`, or below e^-87.
    fn of(logits: &[f32], most: f32, temperature: f32, floor: f32, out: &mut [f32]);
    /// The sum of `exp(logit - most)`.
    fn sum_of(logits: &[f32], most: f32) -> f64;
    /// The sum of `values`.
    fn sum(values: &[f32]) -> f64;
    /// The greatest of `values`, -inf where none is a number.
    fn greatest(values: &[f32]) -> f32;
    /// The greatest of each [`LINE`] of `values`, one after the other.
    fn greatest_of_lines(values: &[f32], out: &mut [f32]);
}

/// Values at a time: lanes that do not wait for each other become vectors.
pub(super) const LINE: usize = 32;

mod portable {
    use super::LINE;

    /// Below this, e^x is as good as nothing, and soon no normal number.
    const LEAST: f32 = -87.0;
    /// Added to a small number, it leaves the nearest whole one in the lowest bits.
    const ROUNDS: f32 = 12_582_912.0;
    /// ln 2 in two parts, of which the first has few bits: its products with whole numbers are exact.
    const LN_2: (f32, f32) = (0.693_359_4, -2.121_944_4e-4);
    /// e^r on [-ln 2 / 2, ln 2 / 2], less its first two terms: the coefficients of Cephes' `expf` (Moshier).
    const TERMS: [f32; 6] = [1.987_569_2e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5];

    /// e^x for x up to 0, to about the last bit; 0 below [`LEAST`].
    #[inline(always)]
    fn exp(x: f32) -> f32 {
        let clamped = if x > LEAST { x } else { LEAST };
        let shifted = clamped * std::f32::consts::LOG2_E + ROUNDS;
        let whole = shifted - ROUNDS;
        let r = clamped - whole * LN_2.0 - whole * LN_2.1;
        let high = TERMS.into_iter().fold(0.0, |sum, term| sum * r + term);
        let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
        let value = (high * r * r + r + 1.0) * scale;
        if x > LEAST { value } else { 0.0 }
    }

    #[inline(always)]
    fn greater(most: f32, value: f32) -> f32 {
        if value > most { value } else { most }
    }

    #[inline(always)]
    pub(super) fn of(logits: &[f32], most: f32, temperature: f32, floor: f32, out: &mut [f32]) {
        for (logit, out) in logits.iter().zip(out) {
            let mass = exp((logit - most) / temperature);
            *out = if mass >= floor { mass } else { 0.0 };
        }
    }

    #[inline(always)]
    fn sum_by_lanes(values: &[f32], each: impl Fn(f32) -> f32) -> f64 {
        let (lines, rest) = values.as_chunks::<LINE>();
        let mut sums = [0.0f64; LINE];
        for line in lines {
            sums.iter_mut().zip(line).for_each(|(sum, value)| *sum += f64::from(each(*value)));
        }
        sums.iter_mut().zip(rest).for_each(|(sum, value)| *sum += f64::from(each(*value)));
        sums.iter().sum()
    }

    #[inline(always)]
    pub(super) fn sum_of(logits: &[f32], most: f32) -> f64 {
        sum_by_lanes(logits, |logit| exp(logit - most))
    }

    #[inline(always)]
    pub(super) fn sum(values: &[f32]) -> f64 {
        sum_by_lanes(values, |value| value)
    }

    #[inline(always)]
    pub(super) fn greatest(values: &[f32]) -> f32 {
        let (lines, rest) = values.as_chunks::<LINE>();
        let mut most = [f32::NEG_INFINITY; LINE];
        for line in lines {
            most.iter_mut().zip(line).for_each(|(most, value)| *most = greater(*most, *value));
        }
        most.iter().chain(rest).copied().fold(f32::NEG_INFINITY, greater)
    }

    #[inline(always)]
    pub(super) fn greatest_of_lines(values: &[f32], out: &mut [f32]) {
        for (line, out) in values.chunks(LINE).zip(out) {
            *out = line.iter().copied().fold(f32::NEG_INFINITY, greater);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn masses_are_exponentials_on_every_processor(
            logits in prop::collection::vec(-120.0f32..20.0, 1..200),
            temperature in 0.05f32..4.0,
            floor in prop::sample::select(vec![0.0f32, 1e-3]),
        ) {
            let most = greatest(&logits);
            prop_assert_eq!(most, logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let masses = |isa| {
                let mut out = vec![f32::NAN; logits.len()];
                at::of(isa, &logits, most, temperature, floor, &mut out);
                out
            };
            let here = masses(Isa::best());
            for (logit, mass) in logits.iter().zip(&here) {
                let right = f64::from((logit - most) / temperature).exp();
                let near = (f64::from(*mass) - right).abs() <= 3e-7 * right;
                let nothing = *mass == 0.0 && (right < f64::from(floor) * 1.000_001 || right < 2e-38);
                prop_assert!(near || nothing, "{} {}", mass, right);
            }
            prop_assert_eq!(&masses(Isa::Portable), &here);
            let right: f64 = here.iter().map(|mass| f64::from(*mass)).sum();
            prop_assert!((sum(&here) - right).abs() <= 1e-12 * right);
            prop_assert_eq!(sum(&here), at::sum(Isa::Portable, &here));
            prop_assert_eq!(sum_of(&logits, most), at::sum_of(Isa::Portable, &logits, most));
            let mut lines = vec![0.0; logits.len().div_ceil(LINE)];
            greatest_of_lines(&logits, &mut lines);
            let right: Vec<f32> = logits.chunks(LINE).map(greatest).collect();
            prop_assert_eq!(lines, right);
        }
    }
}
