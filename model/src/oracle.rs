//! The whole model in one process, every expert local: what a cluster's answers are compared with.
//!
//! In: a checkpoint, token ids. Out: logits and greedy tokens. Never here: anything clever.

use crate::{
    cache::SequenceCache,
    checkpoint::{self, Checkpoint},
    compute::{self, ExpertBatch},
    device::Compute,
    expert::Expert,
    hidden::Hidden,
    sampler::argmax,
    transformer::{FeedForward, Segment, Transformer},
};

/// Router's half and all experts together.
#[derive(Debug)]
pub struct Oracle {
    transformer: Transformer,
    /// Per layer, empty for dense ones.
    experts: Vec<Vec<Expert>>,
}

impl Oracle {
    /// Loads everything.
    pub fn load(checkpoint: &Checkpoint, compute: Compute) -> Result<Self, checkpoint::Error> {
        let config = checkpoint.config();
        let mut experts = Vec::new();
        for layer in 0..config.num_hidden_layers {
            let here = if config.is_moe(layer) { config.n_routed_experts } else { 0 };
            let load = |expert| Expert::load(checkpoint, layer as u32, expert as u32, compute);
            experts.push((0..here).map(load).collect::<Result<Vec<_>, _>>()?);
        }
        Ok(Self { transformer: Transformer::load(checkpoint, compute, |_| {})?, experts })
    }

    /// Logits a row.
    pub fn vocab_size(&self) -> usize {
        self.transformer.config().vocab_size
    }

    /// An empty cache for [`Oracle::forward`].
    pub fn cache(&self) -> SequenceCache {
        SequenceCache::new(self.transformer.config(), self.transformer.compute())
    }

    /// Computes `tokens`, which follow those in `cache`; logits f32 `[tokens, vocab_size]`.
    pub fn forward(&self, tokens: &[u32], cache: &mut SequenceCache) -> Vec<f32> {
        let start = cache.len() as i64;
        let positions: Vec<i64> = (start..start + tokens.len() as i64).collect();
        let positions = self.transformer.positions(&positions);
        let mut x = self.transformer.embed(tokens);
        for block in self.transformer.blocks() {
            x = block.attend(&x, &positions, &mut [Segment { rows: tokens.len(), cache: &mut *cache }]);
            let normed = block.normed(&x);
            x = match block.feed_forward() {
                FeedForward::Dense(dense) => dense.forward(&x, &normed),
                FeedForward::Moe(moe) => {
                    let routed = self.routed(block.layer(), &normed, &moe.route(&normed));
                    moe.finish(&x, &routed, moe.shared(&normed))
                }
            };
        }
        self.transformer.logits(&x, &(0..tokens.len()).collect::<Vec<_>>())
    }

    /// The weighted sum over each row's experts, in gate order.
    fn routed(&self, layer: usize, normed: &Hidden, routing: &crate::gate::Routing) -> Vec<f32> {
        let rows = normed.rows();
        let batch = ExpertBatch {
            layer: layer as u32,
            rows,
            hidden: normed.to_rows(),
            expert_ids: routing.expert_ids.clone(),
            row_ids: (0..rows as u32).flat_map(|row| std::iter::repeat_n(row, routing.experts_per_row)).collect(),
            weights: Some(routing.weights.clone()),
        };
        let here = |expert: u16| self.experts[layer].get(expert as usize);
        let mut computed = compute::run(&[&batch], &here).unwrap_or_else(|error| unreachable!("{error}"));
        computed.swap_remove(0)
    }

    /// The `count` tokens that greedy decoding draws after `prompt`.
    pub fn generate_greedy(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        let vocab = self.vocab_size();
        let mut cache = self.cache();
        let mut drawn = Vec::with_capacity(count);
        let mut next = prompt.to_vec();
        while drawn.len() < count {
            let logits = self.forward(&next, &mut cache);
            let token = argmax(&logits[logits.len() - vocab..]);
            drawn.push(token);
            next = vec![token];
        }
        drawn
    }
}
