//! Root-mean-square normalisation.
//!
//! In: rows. Out: rows of the same shape and format. Never here: a mean subtracted, a bias added.

use tch::{Kind, Tensor};

use crate::{
    checkpoint::{self, Checkpoint, Weight},
    device::Compute,
};

/// `x / sqrt(mean(x^2) + eps) * w`, computed in f32 and cast back before the weight is applied, as DeepSeek's and
/// transformers' implementations do.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Weight,
    eps: f64,
}

impl RmsNorm {
    /// Reads `<name>.weight` `[size]`.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        size: usize,
        eps: f64,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let weight = checkpoint.load(&format!("{name}.weight"), &[size])?.to(compute.kind(), compute.torch_device());
        Ok(Self::of(weight, eps))
    }

    pub(crate) fn of(weight: Weight, eps: f64) -> Self {
        Self { weight, eps }
    }

    /// Any shape whose last dimension is the weight's size.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let kind = x.kind();
        let x = x.to_kind(Kind::Float);
        let mean_square = x.square().mean_dim([-1i64].as_slice(), true, Kind::Float);
        let normed = &x * (mean_square + self.eps).rsqrt();
        normed.to_kind(kind) * &*self.weight
    }
}
