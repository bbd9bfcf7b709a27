//! What became of one batch. In: values, or rows as a device left them. Out: the same, in whatever form somebody wants. Never
//! here: a row changed from BF16 and back on its way to the wire.

use crate::{
    hidden::Hidden,
    kernels::{Isa, Rows, tensor},
    wire::{self, Encoding},
};

/// Rows `[n, D]`, one after the other.
#[derive(Debug)]
pub struct Computed(Form);

#[derive(Debug)]
enum Form {
    Values(Vec<f32>),
    /// On the processor.
    Rows(Hidden),
}

impl From<Vec<f32>> for Computed {
    fn from(values: Vec<f32>) -> Self {
        Self(Form::Values(values))
    }
}

/// The same values, in whatever form.
impl PartialEq for Computed {
    fn eq(&self, other: &Self) -> bool {
        self.to_f32() == other.to_f32()
    }
}

impl Computed {
    /// Contiguous `rows` on the processor.
    pub(super) fn rows(rows: Hidden) -> Self {
        Self(Form::Rows(rows))
    }

    fn as_rows(&self) -> Rows<'_> {
        match &self.0 {
            Form::Values(values) => Rows::F32(values),
            Form::Rows(rows) => tensor::rows(&rows.0),
        }
    }

    /// As f32.
    pub fn into_f32(self) -> Vec<f32> {
        match self.0 {
            Form::Values(values) => values,
            Form::Rows(_) => self.to_f32(),
        }
    }

    /// The same, a copy.
    pub fn to_f32(&self) -> Vec<f32> {
        self.as_rows().to_f32(Isa::best())
    }

    /// n * D.
    pub fn values(&self) -> usize {
        match self.as_rows() {
            Rows::F32(values) => values.len(),
            Rows::Bf16(values) => values.len(),
        }
    }

    /// Whether all of them are numbers.
    pub fn all_finite(&self) -> bool {
        match self.as_rows() {
            Rows::F32(values) => wire::all_finite(values),
            Rows::Bf16(values) => wire::bf16_all_finite(tensor::bytes_of_each(values)),
        }
    }

    /// Rows of `hidden` values as they travel in `encoding`, F32 or BF16, into `out`, which is as long as they are.
    pub fn encode(&self, hidden: usize, encoding: Encoding, out: &mut [u8]) {
        match (self.as_rows(), encoding) {
            (Rows::Bf16(values), Encoding::Bf16) => {
                out.copy_from_slice(tensor::bytes_of_each(values).as_flattened());
            }
            (Rows::Bf16(_), _) => {
                wire::encode_rows(self.to_f32().chunks_exact(hidden.max(1)), hidden, encoding, out, &mut []);
            }
            (Rows::F32(values), _) => {
                wire::encode_rows(values.chunks_exact(hidden.max(1)), hidden, encoding, out, &mut []);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;

    fn both(values: &[f32]) -> [Computed; 2] {
        let rows = Tensor::from_slice(values).view([-1, 4]).to_kind(Kind::BFloat16);
        [Computed::from(values.to_vec()), Computed::rows(Hidden(rows))]
    }

    #[test]
    fn rows_of_either_form_are_encoded_alike() {
        // BF16 holds all of them.
        let values: Vec<f32> = (0..24).map(|nth| nth as f32 / 8.0 - 1.0).collect();
        for encoding in [Encoding::F32, Encoding::Bf16] {
            let (right, _) = wire::encode(&values, 4, encoding);
            for computed in both(&values) {
                assert!(computed.all_finite() && computed.values() == values.len());
                let mut bytes = vec![0; right.len()];
                computed.encode(4, encoding, &mut bytes);
                assert_eq!((bytes, computed.into_f32()), (right.to_vec(), values.clone()), "{encoding:?}");
            }
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(both(&[0.0, 1.0, bad, f32::MIN_POSITIVE]).iter().all(|computed| !computed.all_finite()), "{bad}");
        }
    }
}
