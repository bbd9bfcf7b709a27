//! A weight of two dimensions as its file stores it. In: a tensor's place in a file. Out: memory that kernels multiply with
//! in place, on the processor or a GPU. Never here: a value decoded; only scales, one per 16,384 codes, are read.

use tch::{Device, Kind};

use super::Weight;
use crate::kernels::{
    Matrix,
    matrix::Values,
    tensor::{bf16s, bytes, f32s},
};

/// `[out, inner]`.
#[derive(Debug)]
pub(crate) enum Stored {
    /// Floating-point numbers.
    Plain(Weight),
    /// E4M3 codes, and f32 scales `[ceil(out / block), ceil(inner / block)]`.
    Fp8 { codes: Weight, scales: Weight, block: usize },
}

impl Stored {
    /// Reads its pages now, see [`Weight::fetch`].
    pub(crate) fn fetch(&self) -> std::io::Result<()> {
        match self {
            Self::Plain(weight) | Self::Fp8 { codes: weight, .. } => weight.fetch(),
        }
    }

    /// `[out, inner]`.
    pub(crate) fn size(&self) -> [i64; 2] {
        let (Self::Plain(weight) | Self::Fp8 { codes: weight, .. }) = self;
        let size = weight.size();
        [size[0], size[1]]
    }

    /// Another hold on the same memory.
    pub(crate) fn share(&self) -> Self {
        match self {
            Self::Plain(weight) => Self::Plain(weight.share()),
            Self::Fp8 { codes, scales, block } => {
                Self::Fp8 { codes: codes.share(), scales: scales.share(), block: *block }
            }
        }
    }

    /// The same numbers in the same format on `device`.
    pub(crate) fn on(self, device: Device) -> Self {
        let place = |weight: Weight| {
            let kind = weight.kind();
            weight.to(kind, device)
        };
        match self {
            Self::Plain(weight) => Self::Plain(place(weight)),
            Self::Fp8 { codes, scales, block } => Self::Fp8 { codes: place(codes), scales: place(scales), block },
        }
    }

    /// As kernels read it. Panics where it is not on the processor, or neither f32 nor BF16 nor FP8.
    pub(crate) fn matrix(&self) -> Matrix<'_> {
        let (weight, values) = match self {
            Self::Plain(weight) if weight.kind() == Kind::Float => (weight, Values::F32(f32s(weight))),
            Self::Plain(weight) => (weight, Values::Bf16(bf16s(weight))),
            Self::Fp8 { codes, scales, block } => {
                (codes, Values::Fp8 { codes: bytes(codes), scales: f32s(scales), block: *block })
            }
        };
        let size = weight.size();
        Matrix::new(values, size[0] as usize, size[1] as usize)
    }
}
