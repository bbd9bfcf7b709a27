//! The router's half of the model: everything but the routed experts.
//!
//! In: a checkpoint; then token ids and positions. Out: the residual stream between its layers, and logits.
//! Never here: routed experts' weights, sampling.

use tch::Tensor;

use crate::{
    checkpoint::{self, Checkpoint, Weight},
    config::ModelConfig,
    device::Compute,
    hidden::Hidden,
    linear::Linear,
    norm::RmsNorm,
    rope::Rope,
};

pub use crate::{
    block::{Block, Dense, FeedForward, Moe},
    mla::Segment,
    rope::Positions,
};

/// Embedding, layers, last norm and head.
#[derive(Debug)]
pub struct Transformer {
    config: ModelConfig,
    compute: Compute,
    embed: Weight,
    rope: Rope,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Linear,
}

impl Transformer {
    /// Maps what a router needs. `loaded(n)` is called after each of the layers.
    pub fn load(
        checkpoint: &Checkpoint,
        compute: Compute,
        mut loaded: impl FnMut(usize),
    ) -> Result<Self, checkpoint::Error> {
        let config = checkpoint.config().clone();
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let place = |weight: Weight| weight.to(compute.kind(), compute.torch_device());
        let embed = "model.embed_tokens.weight";
        let head = if config.tie_word_embeddings { embed } else { "lm_head.weight" };
        let mut blocks = Vec::with_capacity(config.num_hidden_layers);
        for layer in 0..config.num_hidden_layers {
            blocks.push(Block::load(checkpoint, layer, &config, compute)?);
            loaded(layer + 1);
        }
        Ok(Self {
            embed: place(checkpoint.load(embed, &[vocab, hidden])?),
            rope: Rope::new(&config.rope, config.qk_rope_head_dim, compute.torch_device()),
            blocks,
            norm: RmsNorm::load(checkpoint, "model.norm", hidden, config.rms_norm_eps, compute)?,
            head: Linear::new(place(checkpoint.load(head, &[vocab, hidden])?), None, compute),
            config,
            compute,
        })
    }

    /// The model's sizes and rules.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// How it computes.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// The layers in order.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The rows of `tokens`, each below the vocabulary's size.
    pub fn embed(&self, tokens: &[u32]) -> Hidden {
        let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids).to_device(self.compute.torch_device());
        Hidden(self.embed.index_select(0, &ids))
    }

    /// Prepares rotary angles for rows at `positions`.
    pub fn positions(&self, positions: &[i64]) -> Positions<'_> {
        Positions { rope: &self.rope, angles: self.rope.angles(positions) }
    }

    /// Logits `[indices, vocab_size]` of the rows at `indices`, f32.
    pub fn logits(&self, x: &Hidden, indices: &[usize]) -> Vec<f32> {
        let indices: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
        Hidden(self.head.forward(&self.norm.forward(&x.select(&indices).0))).to_rows()
    }
}
