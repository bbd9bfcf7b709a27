//! What happens to each row or value by itself. In: values. Out: values. Never here: an instruction that takes some places
//! of a row and not others; every value goes through the same roundings wherever it stands, so that its bits depend on
//! nothing else.

use std::ops::Range;

use half::bf16;

use super::{
    isa::Isa,
    lanes::add_up,
    operand::{round, widen},
};

/// Columns that are weighed at once: of a block's keys they stay in the nearest cache, of a sum in registers.
pub(super) const COLUMNS: usize = 64;
/// So many columns of a block's keys.
pub(super) type Columns = [[f32; COLUMNS]; 64];

/// The same loop, compiled for each instruction set: no operation in it may be contracted or reordered, and Rust does
/// neither, so all give the same bits.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($argument:ident: $kind:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $visibility fn $name(isa: Isa, $($argument: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2")]
                unsafe fn wide($($argument: $kind),*) {
                    $body($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                unsafe fn middle($($argument: $kind),*) {
                    $body($($argument),*)
                }
                // SAFETY: an `Isa` is only ever one that this processor has.
                unsafe {
                    match isa {
                        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => return wide($($argument),*),
                        Isa::Avx2 => return middle($($argument),*),
                        Isa::Portable => {}
                    }
                }
            }
            let _ = isa;
            $body($($argument),*)
        }
    };
}

for_each_isa! {
    /// `gate = silu(gate) * up`, value by value.
    pub(super) fn silu_times(gate: &mut [f32], up: &[f32]) = silu_times_loop
}

for_each_isa! {
    /// `values = e^(values - largest)`.
    pub(super) fn exp_less(values: &mut [f32], largest: f32) = exp_less_loop
}

for_each_isa! {
    /// `sum += by * values`.
    pub(crate) fn add_times(sum: &mut [f32], by: f32, values: &[f32]) = add_times_loop
}

for_each_isa! {
    /// `sum += values`.
    pub(crate) fn add_bf16(sum: &mut [f32], values: &[bf16]) = add_bf16_loop
}

for_each_isa! {
    /// `values *= by`.
    pub(super) fn scale(values: &mut [f32], by: f32) = scale_loop
}

for_each_isa! {
    /// One more block of 64 scores, of which the first `seen` count, in a running softmax: `state` is the largest so far,
    /// the total so far, and (out) what sums so far are to be multiplied by. Scores, times `by`, become weights.
    pub(super) fn softmax_on(scores: &mut [f32; 64], seen: usize, by: f32, state: &mut [f32; 3]) = softmax_loop
}

for_each_isa! {
    /// `sums[q][columns] += weights[q][k] * keys[k]`, key after key; sums are `width` long.
    pub(super) fn weigh(
        sums: &mut [f32],
        width: usize,
        columns: Range<usize>,
        weights: &[[f32; 64]],
        keys: &Columns,
    ) = weigh_loop
}

for_each_isa! {
    /// BF16 to f32.
    pub(crate) fn widen_all(from: &[bf16], to: &mut [f32]) = widen_loop
}

for_each_isa! {
    /// These columns of a block's keys, whose rows are `width` long, to f32.
    pub(super) fn widen_columns(rows: &[bf16], width: usize, columns: Range<usize>, to: &mut Columns) = widen_columns_loop
}

for_each_isa! {
    /// `x / sqrt(mean(x^2) + eps) * w`, in place: normed in f32, rounded to BF16 where `rounded` before and after the
    /// weight is applied, as DeepSeek's and transformers' implementations do.
    pub(crate) fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32, rounded: bool) = rms_norm_loop
}

#[inline(always)]
fn silu_times_loop(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

#[inline(always)]
fn exp_less_loop(values: &mut [f32], largest: f32) {
    for value in values {
        *value = exp(*value - largest);
    }
}

#[inline(always)]
fn add_times_loop(sum: &mut [f32], by: f32, values: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += by * value;
    }
}

#[inline(always)]
fn add_bf16_loop(sum: &mut [f32], values: &[bf16]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += widen(value.to_bits());
    }
}

#[inline(always)]
fn scale_loop(values: &mut [f32], by: f32) {
    for value in values {
        *value *= by;
    }
}

#[inline(always)]
fn softmax_loop(scores: &mut [f32; 64], seen: usize, by: f32, state: &mut [f32; 3]) {
    let [largest, total, correction] = state;
    *correction = 1.0;
    if seen == 0 {
        scores.fill(0.0);
        return;
    }
    let mut most = *largest;
    for (key, score) in scores.iter_mut().enumerate() {
        *score = if key < seen { *score * by } else { f32::NEG_INFINITY };
        most = if *score > most { *score } else { most };
    }
    for score in scores.iter_mut() {
        *score = exp(*score - most);
    }
    scores[seen..].fill(0.0);
    *correction = exp(*largest - most);
    *total = *total * *correction + sum(scores);
    *largest = most;
}

#[inline(always)]
fn weigh_loop(sums: &mut [f32], width: usize, columns: Range<usize>, weights: &[[f32; 64]], keys: &Columns) {
    for (sums, weights) in sums.chunks_exact_mut(width).zip(weights) {
        let sums = &mut sums[columns.clone()];
        match <&mut [f32; COLUMNS]>::try_from(&mut *sums) {
            Ok(sums) => weigh_columns(sums, weights, keys),
            Err(_) => {
                let mut all = [0.0; COLUMNS];
                all[..sums.len()].copy_from_slice(sums);
                weigh_columns(&mut all, weights, keys);
                sums.copy_from_slice(&all[..sums.len()]);
            }
        }
    }
}

#[inline(always)]
fn weigh_columns(sums: &mut [f32; COLUMNS], weights: &[f32; 64], keys: &Columns) {
    // They stay in registers from key to key.
    let mut running = *sums;
    for (weight, key) in weights.iter().zip(keys) {
        // Keys that a row does not see weigh nothing, whatever is there.
        if *weight != 0.0 {
            add_times_loop(&mut running, *weight, key);
        }
    }
    *sums = running;
}

#[inline(always)]
fn widen_loop(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = widen(from.to_bits());
    }
}

#[inline(always)]
fn widen_columns_loop(rows: &[bf16], width: usize, columns: Range<usize>, to: &mut Columns) {
    for (to, row) in to.iter_mut().zip(rows.chunks_exact(width)) {
        let row = &row[columns.clone()];
        // Of a length that is known before, the loop is none.
        match <&[bf16; COLUMNS]>::try_from(row) {
            Ok(row) => widen_loop(row, to),
            Err(_) => widen_loop(row, to),
        }
    }
}

#[inline(always)]
fn rms_norm_loop(x: &mut [f32], weight: &[f32], eps: f32, rounded: bool) {
    let factor = 1.0 / (sum_of_squares(x) / x.len() as f32 + eps).sqrt();
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = if rounded { widen(round(widen(round(*x * factor)) * weight)) } else { *x * factor * weight };
    }
}

/// Sixteen running sums, as products have them.
#[inline(always)]
fn sum_of_squares(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (whole, rest) = x.as_chunks::<16>();
    for values in whole {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value * value;
        }
    }
    for (sum, value) in sums.iter_mut().zip(rest) {
        *sum += value * value;
    }
    add_up(sums)
}

/// The sum of 64 values.
#[inline(always)]
fn sum(values: &[f32; 64]) -> f32 {
    let mut sums = [0.0f32; 16];
    for values in values.as_chunks::<16>().0 {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += value;
        }
    }
    add_up(sums)
}

/// e^x to within two units in the last place, for x from -87 to 88; beyond, what it is there.
///
/// `x = n ln 2 + r`, a polynomial for e^r, and n into the exponent (Cephes, `expf`). Adding and taking away 1.5 * 2^23
/// rounds to whole numbers, and leaves n in the lowest bits.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const TO_WHOLE: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + TO_WHOLE;
    let n = shifted - TO_WHOLE;
    let r = x - n * 0.693_359_4;
    let r = r - n * -2.121_944_4e-4;
    let mut p = 1.987_569_2e-4;
    for term in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + term;
    }
    let p = p * (r * r) + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    p * power
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_exponential_is_one() {
        for step in -8700..=8800 {
            let x = step as f32 / 100.0;
            let (ours, right) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((ours / right - 1.0).abs() < 2.5e-7, "e^{x}: {ours} {right}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1000.0) < 2e-38 && exp(1000.0) > 1e38);
    }

    proptest! {
        #[test]
        fn a_value_is_the_same_wherever_it_stands_and_whatever_computes_it(
            values in prop::collection::vec(-30.0f32..30.0, 1..100),
            by in -3.0f32..3.0,
        ) {
            let all = |isa| {
                let (mut a, mut b, mut c) = (values.clone(), values.clone(), values.clone());
                silu_times(isa, &mut a, &values);
                exp_less(isa, &mut b, by);
                add_times(isa, &mut c, by, &values);
                let mut d = values.clone();
                rms_norm(isa, &mut d, &values, 1e-6, true);
                [a, b, c, d]
            };
            let portable = all(Isa::Portable);
            for isa in Isa::available() {
                prop_assert_eq!(&all(isa), &portable);
            }
            for (at, value) in values.iter().enumerate() {
                let (mut silu, mut less) = ([*value], [*value]);
                silu_times(Isa::best(), &mut silu, &[*value]);
                exp_less(Isa::best(), &mut less, by);
                prop_assert_eq!((silu[0], less[0]), (portable[0][at], portable[1][at]));
                let right = f64::from(*value) / (1.0 + (-f64::from(*value)).exp()) * f64::from(*value);
                prop_assert!((f64::from(silu[0]) - right).abs() <= 1e-6 * right.abs() + 1e-30);
            }
        }

        #[test]
        fn rounding_is_to_nearest_and_back_is_exact(bits: u32) {
            let value = f32::from_bits(bits);
            let rounded = [bf16::from_bits(round(value))];
            let right = bf16::from_f32(value);
            prop_assert!(rounded[0] == right || (rounded[0].is_nan() && right.is_nan()));
            let mut back = [0.0];
            widen_all(Isa::best(), &rounded, &mut back);
            prop_assert!(back[0] == right.to_f32() || right.is_nan());
        }
    }
}
