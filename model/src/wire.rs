//! Rows as bytes, little-endian and row-major.
//!
//! In: f32 rows, or bytes that came over the network. Out: the other.
//! Never here: a length believed. What came over the network is checked against its counts first.

use bytes::Bytes;
use half::bf16;

use crate::checkpoint::fp8::{decode_e4m3, encode_e4m3};

/// Values that share one scale in the 8-bit encoding.
pub const FP8_BLOCK: usize = 128;
/// The greatest finite E4M3 value.
const FP8_MAX: f32 = 448.0;

/// How a row travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// 4 bytes a value, exact.
    F32,
    /// 2 bytes a value.
    Bf16,
    /// 1 byte a value (E4M3) and an f32 scale per block of 128; the last block of a row may be shorter.
    Fp8Block128,
}

/// Why bytes are no rows.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Too many or too few.
    #[error("{what} is {actual} bytes long, {rows} rows of {hidden} values as {encoding:?} take {expected}")]
    Length {
        /// Which field.
        what: &'static str,
        /// Rows announced.
        rows: usize,
        /// Values a row.
        hidden: usize,
        /// How.
        encoding: Encoding,
        /// Bytes that makes.
        expected: usize,
        /// Bytes that came.
        actual: usize,
    },
}

impl Encoding {
    /// Bytes of one row's values.
    pub fn row_bytes(self, hidden: usize) -> usize {
        match self {
            Self::F32 => hidden * 4,
            Self::Bf16 => hidden * 2,
            Self::Fp8Block128 => hidden,
        }
    }

    /// Bytes of one row's scales.
    pub fn scale_bytes(self, hidden: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Fp8Block128 => hidden.div_ceil(FP8_BLOCK) * 4,
        }
    }
}

/// Rows `[n, hidden]` to values and scales (empty but for the 8-bit encoding).
pub fn encode(rows: &[f32], hidden: usize, encoding: Encoding) -> (Bytes, Bytes) {
    match encoding {
        // Into a buffer of the right size, one fixed-size chunk a value: the compiler makes vectors of these loops.
        Encoding::F32 => {
            let mut out = vec![0; rows.len() * 4];
            out.as_chunks_mut().0.iter_mut().zip(rows).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
            (out.into(), Bytes::new())
        }
        Encoding::Bf16 => {
            let mut out = vec![0; rows.len() * 2];
            let pairs = out.as_chunks_mut().0.iter_mut().zip(rows);
            pairs.for_each(|(bytes, value)| *bytes = bf16::from_f32(*value).to_le_bytes());
            (out.into(), Bytes::new())
        }
        Encoding::Fp8Block128 => encode_fp8(rows, hidden),
    }
}

/// Per block `scale = max(amax, 1e-4) / 448`, as DeepSeek's activation quantisation.
fn encode_fp8(rows: &[f32], hidden: usize) -> (Bytes, Bytes) {
    let mut values = Vec::with_capacity(rows.len());
    let mut scales = Vec::with_capacity(rows.len().div_ceil(FP8_BLOCK) * 4);
    for row in rows.chunks(hidden.max(1)) {
        for block in row.chunks(FP8_BLOCK) {
            let amax = block.iter().fold(0.0f32, |amax, value| amax.max(value.abs()));
            let scale = amax.max(1e-4) / FP8_MAX;
            scales.extend_from_slice(&scale.to_le_bytes());
            values.extend(block.iter().map(|value| encode_e4m3(value / scale)));
        }
    }
    (values.into(), scales.into())
}

/// `rows` rows of `hidden` values back to f32 `[rows, hidden]`.
pub fn decode(encoding: Encoding, values: &[u8], scales: &[u8], rows: usize, hidden: usize) -> Result<Vec<f32>, Error> {
    let check = |what, expected: usize, actual: usize| {
        if expected == actual { Ok(()) } else { Err(Error::Length { what, rows, hidden, encoding, expected, actual }) }
    };
    check("rows", encoding.row_bytes(hidden).saturating_mul(rows), values.len())?;
    check("scales", encoding.scale_bytes(hidden).saturating_mul(rows), scales.len())?;
    Ok(match encoding {
        Encoding::F32 => values.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Encoding::Bf16 => values.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Encoding::Fp8Block128 => {
            let scales: Vec<f32> = scales.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            let blocks = values.chunks(hidden.max(1)).flat_map(|row| row.chunks(FP8_BLOCK));
            blocks
                .zip(scales)
                .flat_map(|(block, scale)| block.iter().map(move |&byte| decode_e4m3(byte) * scale))
                .collect()
        }
    })
}

/// Whether every value is a number. Compares bit patterns, which the compiler makes vectors of.
pub fn all_finite(rows: &[f32]) -> bool {
    const INFINITE: u32 = f32::INFINITY.to_bits();
    rows.iter().fold(0, |greatest, value| greatest.max(value.to_bits() & !(1 << 31))) < INFINITE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_number_is_found() {
        assert!(all_finite(&[]) && all_finite(&[0.0, -1.5, f32::MAX, f32::MIN]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            assert!(!all_finite(&[1.0, bad, 2.0]), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn rows_come_back_within_their_format(
            hidden in 1usize..300,
            values in prop::collection::vec(-1000.0f32..1000.0, 1..600),
        ) {
            let rows = values.len() / hidden;
            let values = &values[..rows * hidden];
            for (encoding, relative) in [(Encoding::F32, 0.0), (Encoding::Bf16, 1.0 / 256.0), (Encoding::Fp8Block128, 1.0 / 16.0)] {
                let (bytes, scales) = encode(values, hidden, encoding);
                prop_assert_eq!(bytes.len(), encoding.row_bytes(hidden) * rows);
                prop_assert_eq!(scales.len(), encoding.scale_bytes(hidden) * rows);
                let back = decode(encoding, &bytes, &scales, rows, hidden).expect("own encoding");
                for (value, back) in values.iter().zip(&back) {
                    // Below the least normal E4M3 number the step is absolute.
                    let step = if encoding == Encoding::Fp8Block128 { 1000.0 / 448.0 / 512.0 } else { 0.0 };
                    prop_assert!((value - back).abs() <= value.abs() * relative + step, "{value} {back} {encoding:?}");
                }
            }
        }

        #[test]
        fn wrong_lengths_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..64), rows in 0usize..9, hidden in 1usize..9) {
            for encoding in [Encoding::F32, Encoding::Bf16, Encoding::Fp8Block128] {
                let fits = encoding.row_bytes(hidden) * rows == bytes.len() && encoding.scale_bytes(hidden) * rows == 0;
                prop_assert_eq!(decode(encoding, &bytes, &[], rows, hidden).is_ok(), fits);
            }
        }
    }
}
