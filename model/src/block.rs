//! One decoder layer, in the pieces between which a row travels.
//!
//! In: the residual stream `[T, D]`. Out: the same, one layer further.
//! Never here: routed experts. Their outputs are brought by the caller, who alone knows where they were computed.

use tch::Device;

use crate::{
    batch::Batch,
    cache::KvCache,
    checkpoint::{self, Checkpoint},
    config::ModelConfig,
    device::Compute,
    expert::Mlp,
    gate::{Gate, Routing},
    hidden::Hidden,
    kernels::team,
    mla::Mla,
    norm::RmsNorm,
};

/// One decoder layer.
#[derive(Debug)]
pub struct Block {
    layer: usize,
    input_norm: RmsNorm,
    attention: Mla,
    post_attention_norm: RmsNorm,
    feed_forward: FeedForward,
}

/// What follows attention.
#[derive(Debug)]
pub enum FeedForward {
    /// One network for every row: the first layers.
    Dense(Dense),
    /// Routed experts, and a shared one.
    Moe(Moe),
}

/// The feed-forward network of a layer without experts.
#[derive(Debug)]
pub struct Dense(Mlp);

/// The router's part of a layer with experts.
#[derive(Debug)]
pub struct Moe {
    gate: Gate,
    shared: Option<Mlp>,
}

impl Block {
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        config: &ModelConfig,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let name = format!("model.layers.{layer}");
        let hidden = config.hidden_size;
        let norm =
            |part: &str| RmsNorm::load(checkpoint, &format!("{name}.{part}"), hidden, config.rms_norm_eps, compute);
        let mlp = format!("{name}.mlp");
        let feed_forward = if config.is_moe(layer) {
            let inner = config.n_shared_experts * config.moe_intermediate_size;
            let shared = format!("{mlp}.shared_experts");
            let load = || Mlp::load(checkpoint, &shared, hidden, inner, compute);
            FeedForward::Moe(Moe {
                gate: Gate::load(checkpoint, layer, config, compute)?,
                shared: if inner > 0 { Some(load()?) } else { None },
            })
        } else {
            FeedForward::Dense(Dense(Mlp::load(checkpoint, &mlp, hidden, config.intermediate_size, compute)?))
        };
        Ok(Self {
            layer,
            input_norm: norm("input_layernorm")?,
            attention: Mla::load(checkpoint, layer, config, compute)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward,
        })
    }

    /// Which layer this is.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// What follows attention here.
    pub fn feed_forward(&self) -> &FeedForward {
        &self.feed_forward
    }

    /// `x + attention(norm(x))`; the rows' latents join their sequences' blocks.
    pub fn attend(&self, x: &Hidden, batch: &Batch, cache: &KvCache) -> Hidden {
        let normed = self.input_norm.forward(&x.0);
        x.plus(&self.attention.forward(self.layer, &normed, batch, cache))
    }

    /// What the gate and the experts see of the residual stream.
    pub fn normed(&self, x: &Hidden) -> Hidden {
        Hidden(self.post_attention_norm.forward(&x.0))
    }
}

impl Dense {
    /// `x + mlp(normed)`.
    pub fn forward(&self, x: &Hidden, normed: &Hidden) -> Hidden {
        x.plus(&self.0.forward(&normed.0))
    }
}

impl Moe {
    /// Chooses experts for normed rows `[T, D]`; with them the rows as they go there, f32.
    pub fn route(&self, normed: &Hidden) -> (Routing, Vec<f32>) {
        self.gate.route(&normed.0)
    }

    /// The shared expert's rows, where the model has one.
    pub fn shared(&self, normed: &Hidden) -> Option<Hidden> {
        self.shared.as_ref().map(|mlp| Hidden(mlp.forward(&normed.0)))
    }

    /// `x + (routed + shared)`, where `routed` is the whole weighted sum over each row's experts, f32 `[T, D]`.
    pub fn finish(&self, x: &Hidden, routed: &[f32], shared: Option<Hidden>) -> Hidden {
        if x.0.device() == Device::Cpu {
            // The next layer's attention is next.
            team::rouse();
            return x.plus_values(routed, shared.as_ref().map(|shared| &shared.0));
        }
        let routed = Hidden::like(x, routed).0;
        let sum = match shared {
            Some(shared) => routed + shared.0,
            None => routed,
        };
        Hidden(&x.0 + sum)
    }
}
