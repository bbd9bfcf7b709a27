//! Loops over a row's values: f32 slices and wire bytes come in, the other goes out. Lengths are the caller's business:
//! what has no partner is not looked at. Never here: rows, scales of a whole message, what came over the network.
//!
//! Each loop is written once, without a branch a value, so that the compiler makes vectors of it; and it is compiled three times,
//! for AVX-512, for AVX2 and for any machine, of which the best is taken at run time. Rust never contracts or reorders
//! float operations, so the three agree bit for bit by construction, and the tests hold them to `reference` beside them.

use super::FP8_MAX;
use crate::kernels::{Isa, isa::by_isa};

by_isa! {
    /// f32 to bf16, ties to even; a NaN stays one.
    fn bf16_encode(values: &[f32], out: &mut [[u8; 2]]);
    /// bf16 to f32.
    fn bf16_decode(bytes: &[[u8; 2]], out: &mut [f32]);
    /// One block of values that share a scale to e4m3; returns the scale, `max(amax, 1e-4) / 448`.
    fn fp8_encode_block(values: &[f32], out: &mut [u8]) -> f32;
    /// One block of e4m3 bytes times its scale to f32.
    fn fp8_decode_block(bytes: &[u8], scale: f32, out: &mut [f32]);
    /// `sums += weight * row`, a product and a sum each.
    fn bf16_add_weighted(sums: &mut [f32], weight: f32, row: &[[u8; 2]]);
    /// As `bf16_add_weighted`.
    fn f32_add_weighted(sums: &mut [f32], weight: f32, row: &[[u8; 4]]);
    /// Whether every value is a number.
    fn all_finite(values: &[f32]) -> bool;
    /// As `all_finite`.
    fn bf16_all_finite(bytes: &[[u8; 2]]) -> bool;
    /// As `all_finite`.
    fn f32_all_finite(bytes: &[[u8; 4]]) -> bool;
}

mod portable {
    use super::FP8_MAX;
    use crate::kernels::operand::round;

    const INFINITE: u32 = f32::INFINITY.to_bits();
    /// The least magnitude that e4m3 has as a normal number, 2^-6.
    const FP8_NORMAL: u32 = 121 << 23;

    #[inline(always)]
    fn from_bf16(bytes: [u8; 2]) -> f32 {
        let bits = u32::from(u16::from_le_bytes(bytes));
        // As everywhere, a signalling NaN comes out quiet.
        let quiet = if bits & 0x7fff > 0x7f80 { 0x40 } else { 0 };
        f32::from_bits((bits | quiet) << 16)
    }

    #[inline(always)]
    fn to_e4m3(value: f32) -> u8 {
        let bits = value.to_bits();
        let (sign, magnitude) = ((bits >> 24) & 0x80, bits & 0x7fff_ffff);
        // Rounds the mantissa to 3 bits; a carry runs into the exponent, whose bias is 120 less.
        let rounded = magnitude.wrapping_add(0x7_ffff).wrapping_add((magnitude >> 20) & 1) >> 20;
        let normal = rounded.wrapping_sub(120 << 3).min(0x7e);
        // Adding 2^23 leaves the number of steps of 2^-9 in the mantissa, ties to even.
        let steps = (f32::from_bits(magnitude) * 512.0 + 8_388_608.0).to_bits() & 0xff;
        let finite = if magnitude < FP8_NORMAL { steps } else { normal };
        (sign | if magnitude >= INFINITE { 0x7f } else { finite }) as u8
    }

    #[inline(always)]
    fn from_e4m3(byte: u8) -> f32 {
        let (sign, magnitude) = ((u32::from(byte) & 0x80) << 24, u32::from(byte) & 0x7f);
        // The same digits as an f32 of a bias that is 120 greater; that is exact for subnormals too.
        let value = f32::from_bits(magnitude << 20) * f32::from_bits((127 + 120) << 23);
        let bits = if magnitude == 0x7f { f32::NAN.to_bits() } else { value.to_bits() };
        f32::from_bits(sign | bits)
    }

    /// Bits without their signs.
    #[inline(always)]
    fn magnitudes(values: &[f32]) -> impl Iterator<Item = u32> {
        values.iter().map(|value| value.to_bits() & 0x7fff_ffff)
    }

    #[inline(always)]
    pub(super) fn bf16_encode(values: &[f32], out: &mut [[u8; 2]]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = round(*value).to_le_bytes();
        }
    }

    #[inline(always)]
    pub(super) fn bf16_decode(bytes: &[[u8; 2]], out: &mut [f32]) {
        for (out, bytes) in out.iter_mut().zip(bytes) {
            *out = from_bf16(*bytes);
        }
    }

    #[inline(always)]
    pub(super) fn fp8_encode_block(values: &[f32], out: &mut [u8]) -> f32 {
        // Bits of positive floats are in the order of the floats, and those of a NaN after all of them. It does not count:
        // where there is one, the numbers are looked at again, for a loop that asks of each is no loop of vectors.
        let greatest = magnitudes(values).fold(0, u32::max);
        let amax = match greatest > INFINITE {
            true => magnitudes(values).filter(|magnitude| *magnitude <= INFINITE).fold(0, u32::max),
            false => greatest,
        };
        let scale = f32::from_bits(amax).max(1e-4) / FP8_MAX;
        for (out, value) in out.iter_mut().zip(values) {
            *out = to_e4m3(value / scale);
        }
        scale
    }

    #[inline(always)]
    pub(super) fn fp8_decode_block(bytes: &[u8], scale: f32, out: &mut [f32]) {
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = from_e4m3(*byte) * scale;
        }
    }

    #[inline(always)]
    pub(super) fn bf16_add_weighted(sums: &mut [f32], weight: f32, row: &[[u8; 2]]) {
        for (sum, bytes) in sums.iter_mut().zip(row) {
            *sum += weight * from_bf16(*bytes);
        }
    }

    #[inline(always)]
    pub(super) fn f32_add_weighted(sums: &mut [f32], weight: f32, row: &[[u8; 4]]) {
        for (sum, bytes) in sums.iter_mut().zip(row) {
            *sum += weight * f32::from_le_bytes(*bytes);
        }
    }

    #[inline(always)]
    pub(super) fn all_finite(values: &[f32]) -> bool {
        magnitudes(values).fold(0, u32::max) < INFINITE
    }

    #[inline(always)]
    pub(super) fn bf16_all_finite(bytes: &[[u8; 2]]) -> bool {
        bytes.iter().fold(0, |greatest, bytes| greatest.max(u16::from_le_bytes(*bytes) & 0x7fff)) < 0x7f80
    }

    #[inline(always)]
    pub(super) fn f32_all_finite(bytes: &[[u8; 4]]) -> bool {
        bytes.iter().fold(0, |greatest, bytes| greatest.max(u32::from_le_bytes(*bytes) & 0x7fff_ffff)) < INFINITE
    }
}

/// The same, value by value, by the functions that define each format.
#[cfg(test)]
mod reference {
    use half::bf16;

    use super::FP8_MAX;
    use crate::checkpoint::fp8::{decode_e4m3, encode_e4m3};

    pub(super) fn bf16_encode(values: &[f32]) -> Vec<[u8; 2]> {
        values.iter().map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
    }

    pub(super) fn bf16_decode(bytes: &[[u8; 2]]) -> Vec<f32> {
        bytes.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
    }

    pub(super) fn fp8_encode_block(values: &[f32]) -> (f32, Vec<u8>) {
        let amax = values.iter().fold(0.0f32, |amax, value| amax.max(value.abs()));
        let scale = amax.max(1e-4) / FP8_MAX;
        (scale, values.iter().map(|value| encode_e4m3(value / scale)).collect())
    }

    pub(super) fn fp8_decode_block(bytes: &[u8], scale: f32) -> Vec<f32> {
        bytes.iter().map(|byte| decode_e4m3(*byte) * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any bits at all, and, often, values as rows have them.
    fn values() -> impl Strategy<Value = Vec<f32>> {
        let special = prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, 1e-4]);
        let value = prop_oneof![
            6 => -1000.0f32..1000.0,
            2 => any::<u32>().prop_map(f32::from_bits),
            1 => special,
            2 => (-448i32..=448, -20i32..3).prop_map(|(number, exponent)| number as f32 * 2f32.powi(exponent)),
        ];
        prop::collection::vec(value, 0..300)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Bits, where it does not matter which NaN one is: an operation on two of them may return either.
    fn numbers(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }).collect()
    }

    #[test]
    fn every_byte_and_every_bf16_is_read_as_its_definition_reads_it() {
        let bytes: Vec<u8> = (0..=255).collect();
        let halves: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_le_bytes).collect();
        for isa in Isa::available() {
            let mut out = vec![0.0; bytes.len()];
            at::fp8_decode_block(isa, &bytes, 0.37, &mut out);
            assert_eq!(numbers(&out), numbers(&reference::fp8_decode_block(&bytes, 0.37)), "{isa:?}");
            at::fp8_decode_block(isa, &bytes, 1.0, &mut out);
            assert_eq!(numbers(&out), numbers(&reference::fp8_decode_block(&bytes, 1.0)), "{isa:?}");
            let mut out = vec![0.0; halves.len()];
            at::bf16_decode(isa, &halves, &mut out);
            assert_eq!(bits(&out), bits(&reference::bf16_decode(&halves)), "{isa:?}");
        }
    }

    proptest! {
        #[test]
        fn every_isa_is_the_reference_bit_for_bit(values in values(), weight in -2.0f32..2.0) {
            let halves = reference::bf16_encode(&values);
            let (scale, codes) = reference::fp8_encode_block(&values);
            for isa in Isa::available() {
                let mut out = vec![[0; 2]; values.len()];
                at::bf16_encode(isa, &values, &mut out);
                prop_assert_eq!(&out, &halves, "{:?}", isa);
                let mut out = vec![0; values.len()];
                let found = at::fp8_encode_block(isa, &values, &mut out);
                prop_assert_eq!(found.to_bits(), scale.to_bits());
                prop_assert_eq!(&out, &codes, "{:?}", isa);

                let mut sums = values.clone();
                at::bf16_add_weighted(isa, &mut sums, weight, &halves);
                let expected: Vec<f32> = values.iter().zip(reference::bf16_decode(&halves))
                    .map(|(sum, value)| sum + weight * value).collect();
                prop_assert_eq!(numbers(&sums), numbers(&expected));
                let wide: Vec<[u8; 4]> = values.iter().map(|value| value.to_le_bytes()).collect();
                let mut sums = values.clone();
                at::f32_add_weighted(isa, &mut sums, weight, &wide);
                let expected: Vec<f32> = values.iter().map(|value| value + weight * value).collect();
                prop_assert_eq!(numbers(&sums), numbers(&expected));
                let finite = values.iter().all(|value| value.is_finite());
                prop_assert_eq!(at::f32_all_finite(isa, &wide), finite);
                prop_assert_eq!(at::all_finite(isa, &values), finite);
                let finite = reference::bf16_decode(&halves).iter().all(|value| value.is_finite());
                prop_assert_eq!(at::bf16_all_finite(isa, &halves), finite);
            }
        }
    }
}
