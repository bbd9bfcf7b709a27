//! One expert by libtorch's own products alone: what our own way through it is measured against, and nothing else.
//!
//! In: an expert of a checkpoint, rows. Out: rows. Never here: on the way of a token.

use tch::{Device, Kind, Tensor};

use crate::checkpoint::{self, Checkpoint, Weight};

/// `down(silu(gate(x)) * up(x))` in bf16 on the processor. FP8 weights are expanded to bf16, since libtorch has no product
/// with block scales there; bf16 ones are the file's own pages.
#[derive(Debug)]
pub struct PlainExpert {
    gate: Weight,
    up: Weight,
    down: Weight,
}

/// Rows in bf16, `[n, D]`.
#[derive(Debug)]
pub struct PlainRows(Tensor);

impl PlainRows {
    /// f32 values `[n, hidden]`. Panics where `values` is no whole number of rows.
    pub fn new(values: &[f32], hidden: usize) -> Self {
        Self(Tensor::from_slice(values).view([-1, hidden as i64]).to_kind(Kind::BFloat16))
    }
}

impl PlainExpert {
    /// Expert `expert` of layer `layer`.
    pub fn load(checkpoint: &Checkpoint, layer: u32, expert: u32) -> Result<Self, checkpoint::Error> {
        let (hidden, inner) = (checkpoint.config().hidden_size, checkpoint.config().moe_intermediate_size);
        let load = |part: &str, shape: [usize; 2]| {
            let name = format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight");
            checkpoint.load(&name, &shape).map(|weight| weight.to(Kind::BFloat16, Device::Cpu))
        };
        Ok(Self {
            gate: load("gate_proj", [inner, hidden])?,
            up: load("up_proj", [inner, hidden])?,
            down: load("down_proj", [hidden, inner])?,
        })
    }

    /// The rows' outputs, unweighted.
    pub fn forward(&self, rows: &PlainRows) -> PlainRows {
        let product = |x: &Tensor, weight: &Tensor| x.linear(weight, None::<&Tensor>);
        let activated = product(&rows.0, &self.gate).silu() * product(&rows.0, &self.up);
        PlainRows(product(&activated, &self.down))
    }
}
