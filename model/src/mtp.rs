//! Multi-token prediction: one more block that guesses the token after the next.
//!
//! In: the main model's last hidden states, and the tokens that follow them. Out: logits of the tokens after those.
//! Never here: routed experts, as in `block`; what becomes of a guess.
//!
//! Source: DeepSeek-V3, arXiv 2412.19437, section 2.2. The details are those of the published weights: the embedding comes
//! first, and the hidden states are those after the model's final norm.

use tch::Tensor;

use crate::{
    block::Block,
    checkpoint::{self, Checkpoint, Weight},
    head::{Greatest, Head},
    hidden::Hidden,
    linear::Linear,
    norm::RmsNorm,
    transfer::placed,
    transformer::{Transformer, lookup},
};

/// The first multi-token-prediction module of a model. Embedding and head are the model's own.
#[derive(Debug)]
pub struct Mtp {
    embed: Weight,
    embedding_norm: RmsNorm,
    hidden_norm: RmsNorm,
    projection: Linear,
    block: Block,
    norm: RmsNorm,
    head: Head,
}

impl Mtp {
    /// Maps what a router needs of `transformer`'s module, to compute as that does; `None` for a checkpoint without one.
    ///
    /// # Errors
    /// A weight cannot be read. That one is missing was found when the checkpoint was opened.
    pub fn load(checkpoint: &Checkpoint, transformer: &Transformer) -> Result<Option<Self>, checkpoint::Error> {
        let (config, compute) = (checkpoint.config(), transformer.compute());
        let Some(layer) = config.mtp_layer() else { return Ok(None) };
        let (name, hidden) = (format!("model.layers.{layer}"), config.hidden_size);
        let norm =
            |part: &str| RmsNorm::load(checkpoint, &format!("{name}.{part}"), hidden, config.rms_norm_eps, compute);
        let (embed, head) = transformer.share_ends();
        Ok(Some(Self {
            embed,
            embedding_norm: norm("enorm")?,
            hidden_norm: norm("hnorm")?,
            projection: Linear::load(checkpoint, &format!("{name}.eh_proj"), [hidden, 2 * hidden], false, compute)?,
            block: Block::load(checkpoint, layer, config, compute)?,
            norm: norm("shared_head.norm")?,
            head,
        }))
    }

    /// What the block sees, `[T, D]`: `eh_proj [enorm(embedding of t_{i+1}); hnorm(h_i)]` for rows at positions i.
    ///
    /// `hidden` `[T, D]` is [`Transformer::final_norm`]'s, `next_tokens` `[T]` are what follows each row, below the
    /// vocabulary's size. At position 0 the embedding counts as zero. Panics where the lengths differ.
    pub fn input(&self, hidden: &Hidden, next_tokens: &[u32], positions: &[usize]) -> Hidden {
        assert_eq!((next_tokens.len(), positions.len()), (hidden.rows(), hidden.rows()), "one of each per row");
        let first: Vec<bool> = positions.iter().map(|&position| position == 0).collect();
        let first = placed(&first, self.embed.device()).view([-1, 1]);
        let embedding = lookup(&self.embed, next_tokens).masked_fill(&first, 0.0);
        let both = [self.embedding_norm.forward(&embedding), self.hidden_norm.forward(&hidden.0)];
        Hidden(self.projection.forward(&Tensor::cat(&both, 1)))
    }

    /// The block, whose layer comes after the model's own, and whose part of the cache is its own. Row i stands at i.
    pub fn block(&self) -> &Block {
        &self.block
    }

    /// Logits `[indices, vocab_size]`, f32, of the rows at `indices` of what left the block. Row i's are about token i + 2.
    pub fn logits(&self, x: &Hidden, indices: &[usize]) -> Vec<f32> {
        self.head.logits(&self.norm.forward(&x.at(indices).0))
    }

    /// The greatest of each row of them.
    pub fn greatest(&self, x: &Hidden, indices: &[usize]) -> Vec<Greatest> {
        self.head.greatest(&self.norm.forward(&x.at(indices).0))
    }
}
