//! The router's half of the model: everything but the routed experts.
//!
//! In: a checkpoint; then token ids and positions. Out: the residual stream between its layers, and logits.
//! Never here: routed experts' weights, sampling.

use tch::{Device, Tensor};

use crate::{
    batch::{Batch, Segment},
    checkpoint::{self, Checkpoint, Stored, Weight},
    config::ModelConfig,
    device::Compute,
    head::{Greatest, Head},
    hidden::Hidden,
    kernels::tensor,
    linear::Linear,
    norm::RmsNorm,
    rope::Rope,
    transfer::placed,
};

pub use crate::block::{Block, Dense, FeedForward, Moe};

/// Embedding, layers, last norm and head.
#[derive(Debug)]
pub struct Transformer {
    config: ModelConfig,
    compute: Compute,
    embed: Weight,
    rope: Rope,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: Head,
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
            head: Head::new(Linear::new(Stored::Plain(checkpoint.load(head, &[vocab, hidden])?), None, compute)),
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
        Hidden(lookup(&self.embed, tokens))
    }

    /// Prepares a pass over the rows of `segments`, one after the other.
    pub fn batch(&self, segments: &[Segment]) -> Batch {
        Batch::new(segments, &self.rope, self.compute.torch_device(), self.compute.numerics)
    }

    /// The residual stream after the last layer, normed: what the head sees, and multi-token prediction.
    pub fn final_norm(&self, x: &Hidden) -> Hidden {
        Hidden(self.norm.forward(&x.0))
    }

    /// Logits `[indices, vocab_size]` of the rows at `indices`, f32.
    pub fn logits(&self, x: &Hidden, indices: &[usize]) -> Vec<f32> {
        self.head.logits(&self.final_norm(&x.at(indices)).0)
    }

    /// The greatest logit of each of the rows at `indices`, which costs less than all of them.
    pub fn greatest(&self, x: &Hidden, indices: &[usize]) -> Vec<Greatest> {
        self.head.greatest(&self.final_norm(&x.at(indices)).0)
    }

    /// The embedding `[vocab_size, D]` and the head, in the same memory.
    pub(crate) fn share_ends(&self) -> (Weight, Head) {
        (self.embed.share(), self.head.share())
    }
}

/// The rows `[T, D]` of `tokens` in `embed` `[vocab_size, D]`.
pub(crate) fn lookup(embed: &Weight, tokens: &[u32]) -> Tensor {
    if embed.device() == Device::Cpu {
        return tensor::gathered(embed, tokens);
    }
    let ids: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    embed.index_select(0, &placed(&ids, embed.device()))
}
