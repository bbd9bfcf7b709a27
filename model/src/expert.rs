//! SwiGLU networks: a dense layer's, the shared expert's, and a routed expert's are the same shape of thing.
//!
//! In: rows `[n, D]`. Out: rows `[n, D]`, unweighted. Never here: which rows, whose rows, what they weigh.

use tch::{Kind, Tensor};

use crate::{
    checkpoint::{self, Checkpoint},
    config::ModelConfig,
    device::{Compute, Numerics},
    hidden::Hidden,
    linear::Linear,
};

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug)]
pub(crate) struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    numerics: Numerics,
}

impl Mlp {
    /// Reads `<name>.{gate,up,down}_proj`, `[I, D]`, `[I, D]` and `[D, I]`.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        name: &str,
        hidden: usize,
        inner: usize,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let load = |part: &str, size| Linear::load(checkpoint, &format!("{name}.{part}"), size, false, compute);
        Ok(Self {
            gate: load("gate_proj", [inner, hidden])?,
            up: load("up_proj", [inner, hidden])?,
            down: load("down_proj", [hidden, inner])?,
            numerics: compute.numerics,
        })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let gate = self.gate.forward(x);
        let activated = match self.numerics {
            Numerics::Fast => gate.silu(),
            Numerics::Reproducible => silu_one_by_one(&gate),
        };
        self.down.forward(&(activated * self.up.forward(x)))
    }
}

/// `x / (1 + e^-x)`, each value by the same instructions. libtorch's kernel takes whole vectors by one exponential and
/// the values left over by another, so its last bits depend on how many values there are.
fn silu_one_by_one(x: &Tensor) -> Tensor {
    if x.device().is_cuda() {
        return x.silu();
    }
    let flat = x.to_kind(Kind::Float).contiguous();
    let mut values = vec![0.0f32; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values.iter_mut().for_each(|value| *value /= 1.0 + (-*value).exp());
    Tensor::from_slice(&values).view(x.size().as_slice()).to_kind(x.kind())
}

/// One routed expert: the unit of placement, of failure and of scaling.
#[derive(Debug)]
pub struct Expert {
    mlp: Mlp,
    compute: Compute,
    hidden: usize,
}

impl Expert {
    /// Maps expert `expert` of layer `layer`, and nothing else of the checkpoint.
    pub fn load(checkpoint: &Checkpoint, layer: u32, expert: u32, compute: Compute) -> Result<Self, checkpoint::Error> {
        let config: &ModelConfig = checkpoint.config();
        let name = format!("model.layers.{layer}.mlp.experts.{expert}");
        let (hidden, inner) = (config.hidden_size, config.moe_intermediate_size);
        Ok(Self { mlp: Mlp::load(checkpoint, &name, hidden, inner, compute)?, compute, hidden })
    }

    /// D.
    pub fn hidden_size(&self) -> usize {
        self.hidden
    }

    /// How it computes.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Rows `[n, D]` to rows `[n, D]`.
    pub fn forward(&self, rows: &Hidden) -> Hidden {
        Hidden(self.mlp.forward(&rows.0))
    }
}
