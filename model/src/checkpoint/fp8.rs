//! FP8 in its e4m3 form (OCP 8-bit floating point, finite only: no infinities, 0x7f and 0xff are NaN, largest 448), and
//! DeepSeek's block-scaled weights. In: bytes and scales. Out: f32 values, or bytes. Never here: tensors, files.

/// The largest finite e4m3 value.
pub const E4M3_MAX: f32 = 448.0;

static E4M3: [f32; 256] = table();

const fn table() -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = ((code as u32 >> 3) & 15, code as u32 & 7);
        let magnitude = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            // Subnormal: mantissa × 2^-9.
            (0, _) => mantissa as f32 / 512.0,
            // Bias 7 here, 127 in f32.
            _ => f32::from_bits(((exponent + 120) << 23) | (mantissa << 20)),
        };
        values[code] = if code < 128 { magnitude } else { -magnitude };
        code += 1;
    }
    values
}

/// The value of an e4m3 byte.
pub fn decode_e4m3(code: u8) -> f32 {
    E4M3[usize::from(code)]
}

/// The nearest e4m3 byte, ties to even; beyond ±448 it is ±448. NaN and infinities become NaN, so that a broken value is
/// never passed off as a large one.
pub fn encode_e4m3(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = ((bits >> 24) & 0x80) as u8;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude >= f32::INFINITY.to_bits() {
        return sign | 0x7f;
    }
    // Below 2^-6 the grid is the subnormals' own, of step 2^-9; rounding up to 8 steps is the smallest normal's code.
    if magnitude < (121 << 23) {
        return sign | (f32::from_bits(magnitude) * 512.0).round_ties_even() as u8;
    }
    // Round the f32 mantissa to its upper 3 bits; a carry runs into the exponent, as it should.
    let rounded = (magnitude + 0x7_ffff + ((magnitude >> 20) & 1)) >> 20;
    sign | (rounded - (120 << 3)).min(0x7e) as u8
}

/// Multiplies each block of a weight by its scale: `w[i][j] * scales[i / block][j / block]`, in f32 as DeepSeek's
/// `weight_dequant` does (`inference/kernel.py`).
///
/// `codes` is [rows, cols] row-major, `scales` is [ceil(rows/block), ceil(cols/block)]; the caller has checked both sizes
/// and that none is 0. Blocks at the right and lower edge may be partial.
pub(super) fn dequantise(codes: &[u8], scales: &[f32], cols: usize, block: usize) -> Vec<f32> {
    let scale_cols = cols.div_ceil(block);
    let mut values = Vec::with_capacity(codes.len());
    for (row, codes) in codes.chunks_exact(cols).enumerate() {
        let scales = &scales[row / block * scale_cols..][..scale_cols];
        for (codes, scale) in codes.chunks(block).zip(scales) {
            values.extend(codes.iter().map(|&code| decode_e4m3(code) * scale));
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tch::Kind;

    use super::*;

    /// libtorch's own conversion, there and back.
    fn by_torch(value: f32) -> f32 {
        f32::try_from(tch::Tensor::from_slice(&[value]).to_kind(Kind::Float8e4m3fn).to_kind(Kind::Float).view(()))
            .unwrap()
    }

    #[test]
    fn every_code_decodes_as_libtorch_decodes_it() {
        let codes: Vec<u8> = (0..=255).collect();
        let theirs = tch::Tensor::from_slice(&codes).view_dtype(Kind::Float8e4m3fn).to_kind(Kind::Float);
        let theirs = Vec::<f32>::try_from(theirs).unwrap();
        for code in codes {
            let (ours, theirs) = (decode_e4m3(code), theirs[usize::from(code)]);
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{code:#x}");
        }
    }

    #[test]
    fn every_code_survives_decoding_and_encoding() {
        for code in 0..=255u8 {
            assert_eq!(encode_e4m3(decode_e4m3(code)), code, "{code:#x}");
        }
    }

    #[test]
    fn what_is_too_large_saturates_and_what_is_not_finite_is_nan() {
        assert_eq!(decode_e4m3(encode_e4m3(449.0)), 448.0);
        assert_eq!(decode_e4m3(encode_e4m3(-f32::MAX)), -448.0);
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(decode_e4m3(encode_e4m3(broken)).is_nan());
        }
    }

    proptest! {
        #[test]
        fn encoding_rounds_as_libtorch_rounds(value in -448.0f32..=448.0, exponent in -20i32..=0) {
            let value = value * 2f32.powi(exponent);
            prop_assert_eq!(decode_e4m3(encode_e4m3(value)).to_bits(), by_torch(value).to_bits());
        }

        #[test]
        fn encoding_any_bits_never_panics(bits: u32) {
            let decoded = decode_e4m3(encode_e4m3(f32::from_bits(bits)));
            prop_assert!(decoded.is_nan() || decoded.abs() <= E4M3_MAX);
        }

        #[test]
        fn partial_blocks_take_their_own_scale(rows in 1usize..300, cols in 1usize..300, seed: u8) {
            let codes: Vec<u8> = (0..rows * cols).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) & 0x7b).collect();
            let (scale_rows, scale_cols) = (rows.div_ceil(128), cols.div_ceil(128));
            let scales: Vec<f32> = (0..scale_rows * scale_cols).map(|i| 0.5 + i as f32).collect();
            let values = dequantise(&codes, &scales, cols, 128);
            prop_assert_eq!(values.len(), rows * cols);
            for (row, col) in [(0, 0), (rows - 1, 0), (0, cols - 1), (rows - 1, cols - 1), (rows / 2, cols / 2)] {
                let scale = scales[row / 128 * scale_cols + col / 128];
                prop_assert_eq!(values[row * cols + col], decode_e4m3(codes[row * cols + col]) * scale);
            }
        }
    }
}
