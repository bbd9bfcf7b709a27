//! Rows as bytes, little-endian and row-major.
//!
//! In: f32 rows, or bytes that came over the network. Out: the other, or a sum that was made straight from the bytes.
//! Never here: a length believed. What came over the network is checked against its counts first.

mod kernels;

use bytes::Bytes;

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
    let count = rows.len() / hidden.max(1);
    let mut values = vec![0; encoding.row_bytes(hidden) * count];
    let mut scales = vec![0; encoding.scale_bytes(hidden) * count];
    encode_rows(rows.chunks_exact(hidden.max(1)), hidden, encoding, &mut values, &mut scales);
    (values.into(), scales.into())
}

/// Rows as they travel, encoded once to whatever number of workers each goes. All of their values were numbers.
#[derive(Debug)]
pub struct Encoded {
    encoding: Encoding,
    values: Vec<u8>,
    scales: Vec<u8>,
    /// Bytes of a row's.
    value_bytes: usize,
    scale_bytes: usize,
}

/// A value to be sent is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a value is no number")]
pub struct NotFinite;

impl Encoded {
    /// Of f32 `[n, hidden]`; each row is looked at and encoded while it is in the nearest cache.
    pub fn new(rows: &[f32], hidden: usize, encoding: Encoding) -> Result<Self, NotFinite> {
        let (value_bytes, scale_bytes) = (encoding.row_bytes(hidden), encoding.scale_bytes(hidden));
        let rows = rows.chunks(hidden.max(1));
        let (mut values, mut scales) = (vec![0; value_bytes * rows.len()], vec![0; scale_bytes * rows.len()]);
        let places = values.chunks_mut(value_bytes.max(1)).enumerate();
        for (row, (nth, values)) in rows.zip(places) {
            if !all_finite(row) {
                return Err(NotFinite);
            }
            encode_row(row, encoding, values, &mut scales[nth * scale_bytes..][..scale_bytes]);
        }
        Ok(Self { encoding, values, scales, value_bytes, scale_bytes })
    }

    /// How.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// n.
    pub fn count(&self) -> usize {
        self.values.len() / self.value_bytes.max(1)
    }

    /// Bytes of each row's values, and of its scales.
    pub fn row_bytes(&self) -> [usize; 2] {
        [self.value_bytes, self.scale_bytes]
    }

    /// The bytes of row `nth` below n.
    pub fn values(&self, nth: u32) -> &[u8] {
        &self.values[nth as usize * self.value_bytes..][..self.value_bytes]
    }

    /// The bytes of its scales.
    pub fn scales(&self, nth: u32) -> &[u8] {
        &self.scales[nth as usize * self.scale_bytes..][..self.scale_bytes]
    }
}

/// As [`encode`], rows from wherever they are into where they shall be: `values` and `scales` hold exactly as many.
pub fn encode_rows<'a>(
    rows: impl Iterator<Item = &'a [f32]>,
    hidden: usize,
    encoding: Encoding,
    values: &mut [u8],
    scales: &mut [u8],
) {
    let (width, scale_width) = (encoding.row_bytes(hidden).max(1), encoding.scale_bytes(hidden));
    for (nth, (row, values)) in rows.zip(values.chunks_exact_mut(width)).enumerate() {
        encode_row(row, encoding, values, &mut scales[nth * scale_width..][..scale_width]);
    }
}

/// One row, into exactly as many bytes as it takes.
fn encode_row(row: &[f32], encoding: Encoding, values: &mut [u8], scales: &mut [u8]) {
    match encoding {
        Encoding::F32 => {
            values.as_chunks_mut().0.iter_mut().zip(row).for_each(|(bytes, value)| *bytes = value.to_le_bytes());
        }
        Encoding::Bf16 => kernels::bf16_encode(row, values.as_chunks_mut().0),
        // As DeepSeek's activation quantisation.
        Encoding::Fp8Block128 => {
            let scales = scales.as_chunks_mut().0.iter_mut();
            for ((block, codes), scale) in row.chunks(FP8_BLOCK).zip(values.chunks_mut(FP8_BLOCK)).zip(scales) {
                *scale = kernels::fp8_encode_block(block, codes).to_le_bytes();
            }
        }
    }
}

/// `rows` rows of `hidden` values back to f32 `[rows, hidden]`.
pub fn decode(encoding: Encoding, values: &[u8], scales: &[u8], rows: usize, hidden: usize) -> Result<Vec<f32>, Error> {
    check(encoding, values, scales, rows, hidden)?;
    let mut out = vec![0.0; rows * hidden];
    match encoding {
        Encoding::F32 => {
            out.iter_mut().zip(values.as_chunks().0).for_each(|(out, bytes)| *out = f32::from_le_bytes(*bytes));
        }
        Encoding::Bf16 => kernels::bf16_decode(values.as_chunks().0, &mut out),
        Encoding::Fp8Block128 => {
            let rows = values.chunks(hidden.max(1)).zip(out.chunks_mut(hidden.max(1)));
            let blocks = rows.flat_map(|(row, out)| row.chunks(FP8_BLOCK).zip(out.chunks_mut(FP8_BLOCK)));
            for ((block, out), scale) in blocks.zip(scales.as_chunks().0) {
                kernels::fp8_decode_block(block, f32::from_le_bytes(*scale), out);
            }
        }
    }
    Ok(out)
}

/// Whether `values` and `scales` hold exactly `rows` rows of `hidden` values.
pub fn check(encoding: Encoding, values: &[u8], scales: &[u8], rows: usize, hidden: usize) -> Result<(), Error> {
    let check = |what, expected: usize, actual: usize| {
        if expected == actual { Ok(()) } else { Err(Error::Length { what, rows, hidden, encoding, expected, actual }) }
    };
    check("rows", encoding.row_bytes(hidden).saturating_mul(rows), values.len())?;
    check("scales", encoding.scale_bytes(hidden).saturating_mul(rows), scales.len())
}

/// Rows that came back, as they came: checked once, read where they lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// F32 or BF16.
    wide: bool,
    bytes: Bytes,
    row_bytes: usize,
}

impl Rows {
    /// `rows` rows of `hidden` values in `bytes`. The 8-bit encoding is for the way out only and holds no rows here.
    pub fn new(encoding: Encoding, bytes: Bytes, rows: usize, hidden: usize) -> Result<Self, Error> {
        let scales: &[u8] = &[];
        check(encoding, &bytes, scales, rows, hidden)?;
        Ok(Self { wide: encoding == Encoding::F32, bytes, row_bytes: encoding.row_bytes(hidden) })
    }

    /// Whether every value is a number.
    pub fn all_finite(&self) -> bool {
        match self.wide {
            true => kernels::f32_all_finite(self.bytes.as_chunks().0),
            false => kernels::bf16_all_finite(self.bytes.as_chunks().0),
        }
    }

    /// Whether every value is 0.
    pub fn are_zero(&self) -> bool {
        // A sign alone is no value.
        let (width, sign) = if self.wide { (4, 0x80) } else { (2, 0x80) };
        self.bytes.chunks(width).all(|value| {
            value.iter().rev().enumerate().all(|(nth, byte)| match nth {
                0 => byte & !sign == 0,
                _ => *byte == 0,
            })
        })
    }

    /// Adds `weight` times row `nth` to `sums`, in f32, a product and a sum each.
    pub fn add_weighted(&self, nth: usize, weight: f32, sums: &mut [f32]) {
        let row = &self.bytes[nth * self.row_bytes..][..self.row_bytes];
        match self.wide {
            true => kernels::f32_add_weighted(sums, weight, row.as_chunks().0),
            false => kernels::bf16_add_weighted(sums, weight, row.as_chunks().0),
        }
    }
}

/// Whether every value is a number.
pub fn all_finite(rows: &[f32]) -> bool {
    kernels::all_finite(rows)
}

/// The same of BF16, as it travels.
pub(crate) fn bf16_all_finite(bytes: &[[u8; 2]]) -> bool {
    kernels::bf16_all_finite(bytes)
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

    #[test]
    fn rows_with_what_is_no_number_are_not_encoded_and_others_one_by_one() {
        for encoding in [Encoding::F32, Encoding::Bf16, Encoding::Fp8Block128] {
            let hidden = 130;
            let rows: Vec<f32> = (0..3 * hidden).map(|n| n as f32 - 77.0).collect();
            let (values, scales) = encode(&rows, hidden, encoding);
            let encoded = Encoded::new(&rows, hidden, encoding).expect("numbers");
            assert_eq!((encoded.count(), encoded.encoding()), (3, encoding));
            assert_eq!((0..3).flat_map(|row| encoded.values(row).to_vec()).collect::<Vec<_>>(), values);
            assert_eq!((0..3).flat_map(|row| encoded.scales(row).to_vec()).collect::<Vec<_>>(), scales);
            for (bad, at) in [(f32::NAN, 0), (f32::INFINITY, hidden), (f32::NEG_INFINITY, 3 * hidden - 1)] {
                let mut rows = rows.clone();
                rows[at] = bad;
                assert_eq!(Encoded::new(&rows, hidden, encoding).err(), Some(NotFinite), "{bad} at {at}");
            }
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
