//! What libtorch alone does: what our own way is measured against, and nothing else.
//!
//! In: an expert of a checkpoint and rows, or a GPU. Out: rows, or a rate. Never here: on the way of a token.

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::{
    checkpoint::{self, Checkpoint, Weight},
    device,
};

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

/// Values of 8 bytes that are copied.
const COPIED: i64 = 1 << 27;
const COPIES: usize = 20;

/// Bytes a second that the GPU `device` reads and writes while it copies within its memory, which is
/// [open](device::Device::open). Panics where it is no GPU.
pub fn copied_a_second(device: device::Device) -> f64 {
    let device::Device::Cuda(index) = device else { panic!("{device} is no GPU") };
    let place = (Kind::Int64, Device::Cuda(index));
    let (from, mut to) = (Tensor::ones([COPIED], place), Tensor::zeros([COPIED], place));
    let mut copy = |times: usize| {
        let began = Instant::now();
        (0..times).for_each(|_| to.copy_(&from));
        tch::Cuda::synchronize(index as i64);
        began.elapsed()
    };
    copy(1);
    (2 * 8 * COPIED as usize * COPIES) as f64 / copy(COPIES).as_secs_f64()
}
