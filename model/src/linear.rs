//! A matrix product with a stored weight.
//!
//! In: rows `[T, in]`. Out: rows `[T, out]`. Never here: a weight copied because of the batch it meets.

use tch::Tensor;

use crate::{
    checkpoint::{self, Checkpoint, Weight},
    device::{Compute, Dtype, Numerics},
};

/// `y = x W^T + b`, `W: [out, in]` as checkpoints store it.
#[derive(Debug)]
pub(crate) struct Linear {
    weight: Weight,
    bias: Option<Weight>,
    /// Columns of the result.
    out: i64,
    /// Rows of every product, where that is fixed.
    tile: Option<i64>,
}

/// The fixed shape that reproducible products run in.
///
/// libtorch picks another summation order for other row counts: f32 rows change their bits at 1, 16 and 512 rows, bf16
/// rows at more than 32 and, in some shapes, at 1. So every product has the same number of rows, padded with zeros.
/// In bf16 sixteen rows cost as one, since reading the weight is the cost; in f32 they do not, so tiles are smaller.
const TILE_ROWS: (i64, i64) = (8, 16);
/// A product of fewer columns depends on where in the tile a row stands, so weights are padded to this many.
const TILE_COLUMNS: i64 = 16;

impl Linear {
    /// Reads `<name>.weight` `[out, in]`, and `<name>.bias` `[out]` where `bias` says there is one.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        [out, inner]: [usize; 2],
        bias: bool,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let place = |weight: Weight| weight.to(compute.kind(), compute.torch_device());
        let weight = place(checkpoint.load(&format!("{name}.weight"), &[out, inner])?);
        let bias = if bias { Some(place(checkpoint.load(&format!("{name}.bias"), &[out])?)) } else { None };
        Ok(Self::new(weight, bias, compute))
    }

    pub(crate) fn new(weight: Weight, bias: Option<Weight>, compute: Compute) -> Self {
        let tile = match (compute.numerics, compute.dtype) {
            (Numerics::Fast, _) => None,
            (Numerics::Reproducible, Dtype::F32) => Some(TILE_ROWS.0),
            (Numerics::Reproducible, Dtype::Bf16) => Some(TILE_ROWS.1),
        };
        let out = weight.size()[0];
        let pad = |weight: Weight| match weight.dim() {
            1 => Weight::owned(weight.constant_pad_nd([0, TILE_COLUMNS - out])),
            _ => Weight::owned(weight.constant_pad_nd([0, 0, 0, TILE_COLUMNS - out])),
        };
        match tile {
            Some(_) if out < TILE_COLUMNS => Self { weight: pad(weight), bias: bias.map(pad), out, tile },
            _ => Self { weight, bias, out, tile },
        }
    }

    /// Another hold on the same weight.
    pub(crate) fn share(&self) -> Self {
        Self { weight: self.weight.share(), bias: self.bias.as_ref().map(Weight::share), ..*self }
    }

    /// `[T, in]` to `[T, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        match self.tile {
            None => self.product(x),
            Some(tile) => self.tiled(x, tile),
        }
    }

    fn product(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_deref())
    }

    fn tiled(&self, x: &Tensor, tile: i64) -> Tensor {
        let rows = x.size()[0];
        let part = |start| {
            let here = tile.min(rows - start);
            let padded = x.narrow(0, start, here).constant_pad_nd([0, 0, 0, tile - here]);
            self.product(&padded).narrow(0, 0, here).narrow(1, 0, self.out)
        };
        let parts: Vec<Tensor> = (0..rows).step_by(tile as usize).map(part).collect();
        Tensor::cat(&parts, 0)
    }
}
