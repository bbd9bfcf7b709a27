//! The whole model in one process, every expert local: what a cluster's answers are compared with.
//!
//! In: a checkpoint, token ids. Out: logits and greedy tokens. Never here: anything clever.

use crate::{
    batch::Batch,
    cache::SequenceCache,
    checkpoint::{self, Checkpoint},
    compute::{self, ExpertBatch},
    device::Compute,
    expert::Expert,
    gate::Routing,
    hidden::Hidden,
    mtp::Mtp,
    sampler::argmax,
    transformer::{Block, FeedForward, Transformer},
    wire::{self, Encoding},
};

/// Router's half and all experts together.
#[derive(Debug)]
pub struct Oracle {
    transformer: Transformer,
    mtp: Option<Mtp>,
    /// Per layer, empty for dense ones.
    experts: Vec<Vec<Expert>>,
    /// How rows would travel to experts, and back.
    wire: Option<[Encoding; 2]>,
}

impl Oracle {
    /// Loads everything.
    pub fn load(checkpoint: &Checkpoint, compute: Compute) -> Result<Self, checkpoint::Error> {
        let config = checkpoint.config();
        let mut experts = Vec::new();
        for layer in 0..config.layers() {
            let here = if config.is_moe(layer) { config.n_routed_experts } else { 0 };
            let load = |expert| Expert::load(checkpoint, layer as u32, expert as u32, compute);
            experts.push((0..here).map(load).collect::<Result<Vec<_>, _>>()?);
        }
        let transformer = Transformer::load(checkpoint, compute, |_| {})?;
        Ok(Self { mtp: Mtp::load(checkpoint, &transformer)?, transformer, experts, wire: None })
    }

    /// The same, but for what rows lose on their way to experts and back where they travel like this. Back they come as f32 or
    /// BF16, as from a worker.
    pub fn over(self, dispatch: Encoding, combine: Encoding) -> Self {
        Self { wire: Some([dispatch, combine]), ..self }
    }

    /// Logits a row.
    pub fn vocab_size(&self) -> usize {
        self.transformer.config().vocab_size
    }

    /// An empty cache for [`Oracle::forward`], or for [`Oracle::draft`].
    pub fn cache(&self) -> SequenceCache {
        let config = self.transformer.config();
        SequenceCache::new(config, self.transformer.compute(), config.layers())
    }

    /// Computes `tokens`, which follow those in `cache`; logits f32 `[tokens, vocab_size]`.
    pub fn forward(&self, tokens: &[u32], cache: &mut SequenceCache) -> Vec<f32> {
        self.forward_and_hidden(tokens, cache).0
    }

    /// [`Oracle::forward`], and the hidden states `[tokens, D]` after the final norm that [`Oracle::draft`] goes on from.
    pub fn forward_and_hidden(&self, tokens: &[u32], cache: &mut SequenceCache) -> (Vec<f32>, Hidden) {
        let batch = self.transformer.batch(&[cache.extend(tokens.len())]);
        let mut x = self.transformer.embed(tokens);
        for block in self.transformer.blocks() {
            x = self.layer(block, &x, &batch, cache);
        }
        let logits = self.transformer.logits(&x, &(0..tokens.len()).collect::<Vec<_>>());
        (logits, self.transformer.final_norm(&x))
    }

    /// What multi-token prediction makes of `hidden`, the rows after those in `cache`, and of the token that follows each;
    /// logits f32 `[tokens, vocab_size]` of the tokens after those. `cache` is another than the model's: it is one row
    /// behind. `None` where the checkpoint has no such module.
    pub fn draft(&self, hidden: &Hidden, next_tokens: &[u32], cache: &mut SequenceCache) -> Option<Vec<f32>> {
        let mtp = self.mtp.as_ref()?;
        let rows = next_tokens.len();
        let positions: Vec<usize> = (cache.len()..cache.len() + rows).collect();
        let batch = self.transformer.batch(&[cache.extend(rows)]);
        let x = self.layer(mtp.block(), &mtp.input(hidden, next_tokens, &positions), &batch, cache);
        Some(mtp.logits(&x, &(0..rows).collect::<Vec<_>>()))
    }

    fn layer(&self, block: &Block, x: &Hidden, batch: &Batch, cache: &SequenceCache) -> Hidden {
        let x = block.attend(x, batch, cache.blocks());
        let normed = block.normed(&x);
        match block.feed_forward() {
            FeedForward::Dense(dense) => dense.forward(&x, &normed),
            FeedForward::Moe(moe) => {
                let routed = self.routed(block.layer(), moe.route(&normed));
                moe.finish(&x, &routed, moe.shared(&normed))
            }
        }
    }

    /// The weighted sum over each row's experts, in gate order.
    fn routed(&self, layer: usize, (routing, mut hidden): (Routing, Vec<f32>)) -> Vec<f32> {
        let rows = routing.rows();
        let (per_row, width) = (routing.experts_per_row, hidden.len() / rows.max(1));
        if let Some([dispatch, _]) = self.wire {
            let (values, scales) = wire::encode(&hidden, width, dispatch);
            hidden =
                wire::decode(dispatch, &values, &scales, rows, width).unwrap_or_else(|error| unreachable!("{error}"));
        }
        let batch = ExpertBatch {
            layer: layer as u32,
            rows,
            hidden,
            expert_ids: routing.expert_ids.clone(),
            row_ids: (0..rows as u32).flat_map(|row| std::iter::repeat_n(row, per_row)).collect(),
            weights: self.wire.is_none().then(|| routing.weights.clone()),
        };
        let here = |expert: u16| self.experts[layer].get(expert as usize);
        let mut computed = compute::run(&[&batch], &here).unwrap_or_else(|error| unreachable!("{error}"));
        let computed = computed.swap_remove(0).into_f32();
        let Some([_, combine]) = self.wire else { return computed };
        let (values, _) = wire::encode(&computed, width, combine);
        let back = wire::Rows::new(combine, values, routing.weights.len(), width);
        let back = back.unwrap_or_else(|error| unreachable!("{error}"));
        let mut sums = vec![0.0; rows * width];
        for (slot, weight) in routing.weights.iter().enumerate() {
            back.add_weighted(slot, *weight, &mut sums[slot / per_row * width..][..width]);
        }
        sums
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
