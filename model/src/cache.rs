//! The latent KV cache: per layer and token the normed latent and the rotated shared key, `[C | R]`, in blocks of 64
//! tokens that sequences hold tables of.
//!
//! In: rows as attention makes them, and the slots they go to. Out: views over blocks.
//! Never here: who holds which block, sharing, eviction. That is plain data, and the router's.

use tch::Tensor;

use crate::{
    batch::Segment,
    config::ModelConfig,
    device::Compute,
    kernels::{Rows, attention::Blocks, product::Out, tensor},
};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 64;

/// All layers' blocks. Block b holds the same tokens in every layer. The memory is asked for once; on the CPU the system
/// hands it out as blocks are first used.
#[derive(Debug)]
pub struct KvCache {
    /// Per layer `[blocks, 64, C+R]`.
    layers: Vec<Tensor>,
    width: i64,
}

impl KvCache {
    /// Bytes of one block over `layers` layers.
    pub fn block_bytes(config: &ModelConfig, compute: Compute, layers: usize) -> usize {
        BLOCK_TOKENS * width(config) * compute.kind().elt_size_in_bytes() * layers
    }

    /// `blocks` blocks over `layers` layers, which are the model's and those of its draft module. What a block holds before
    /// it is [cleared](Self::clear) is undefined.
    pub fn new(config: &ModelConfig, compute: Compute, layers: usize, blocks: usize) -> Self {
        let width = width(config) as i64;
        let size = [blocks as i64, BLOCK_TOKENS as i64, width];
        let layer = |_| Tensor::empty(size, (compute.kind(), compute.torch_device()));
        Self { layers: (0..layers).map(layer).collect(), width }
    }

    /// Of one layer, which is `blocks` `[blocks, 64, C+R]`.
    #[cfg(test)]
    pub(crate) fn of(blocks: Tensor) -> Self {
        let width = blocks.size()[2];
        Self { layers: vec![blocks], width }
    }

    /// Forgets what `block` holds. To be called when a sequence takes it: rows past a sequence's end take part in products,
    /// weighted by zero, and zero times what is no number is none.
    pub fn clear(&self, block: u32) {
        for layer in &self.layers {
            let _ = layer.get(i64::from(block)).zero_();
        }
    }

    /// Copies all that `from` holds to `to`.
    pub fn copy_block(&self, from: u32, to: u32) {
        for layer in &self.layers {
            layer.get(i64::from(to)).copy_(&layer.get(i64::from(from)));
        }
    }

    /// Puts rows `[T, C+R]` into `slots` `[T]`; slot s is row s mod 64 of block s / 64.
    pub(crate) fn write(&self, layer: usize, slots: &Tensor, rows: &Tensor) {
        let mut flat = self.layers[layer].view([-1, self.width]);
        let _ = flat.index_copy_(0, slots, rows);
    }

    /// A layer's blocks `[blocks, 64, C+R]`, for kernels on a GPU.
    pub(crate) fn layer(&self, layer: usize) -> &Tensor {
        &self.layers[layer]
    }

    /// A layer's blocks as kernels read them.
    pub(crate) fn blocks(&self, layer: usize) -> Blocks<'_> {
        match tensor::rows(&self.layers[layer]) {
            Rows::F32(values) => Blocks::F32(values),
            Rows::Bf16(values) => Blocks::Bf16(values),
        }
    }

    /// Where a layer's rows `[blocks * 64, C+R]` are written by kernels, while nobody reads [`blocks`](Self::blocks).
    pub(crate) fn place(&self, layer: usize) -> Out<'static> {
        tensor::out(&self.layers[layer])
    }

    /// The rows `[len, C+R]` of `keys` from row `start` on, which is a multiple of 64.
    pub(crate) fn rows(&self, layer: usize, keys: &Keys, start: i64, len: i64) -> Tensor {
        let (block, tokens) = (start / BLOCK_TOKENS as i64, BLOCK_TOKENS as i64);
        match keys {
            Keys::Run { first } => self.layers[layer].view([-1, self.width]).narrow(0, first * tokens + start, len),
            Keys::Table(table) => {
                let blocks = table.narrow(0, block, (len + tokens - 1) / tokens);
                self.layers[layer].index_select(0, &blocks).view([-1, self.width]).narrow(0, 0, len)
            }
        }
    }

    /// The rows `[B, n*64, C+R]` of `blocks` `[B*n]`, which are B tables of n blocks.
    pub(crate) fn tables(&self, layer: usize, blocks: &Tensor, count: i64) -> Tensor {
        self.layers[layer].index_select(0, blocks).view([count, -1, self.width])
    }
}

/// Where one sequence's rows are.
#[derive(Debug)]
pub(crate) enum Keys {
    /// In blocks one after the other: read in place.
    Run { first: i64 },
    /// `[n]`: gathered.
    Table(Tensor),
}

fn width(config: &ModelConfig) -> usize {
    config.kv_lora_rank + config.qk_rope_head_dim
}

/// A cache for one sequence alone, as the oracle and tests want it: block i holds tokens 64i to 64i + 63.
#[derive(Debug)]
pub struct SequenceCache {
    cache: KvCache,
    len: usize,
    context: usize,
}

impl SequenceCache {
    /// Room for the model's whole context.
    pub fn new(config: &ModelConfig, compute: Compute, layers: usize) -> Self {
        let context = config.max_position_embeddings;
        Self { cache: KvCache::new(config, compute, layers, context.div_ceil(BLOCK_TOKENS)), len: 0, context }
    }

    /// The blocks.
    pub fn blocks(&self) -> &KvCache {
        &self.cache
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is in yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The next `rows` rows, which from here on count as computed. Panics where the context has no room for them.
    pub fn extend(&mut self, rows: usize) -> Segment {
        let (start, end) = (self.len, self.len + rows);
        assert!(end <= self.context, "{end} tokens in a context of {}", self.context);
        for block in start.div_ceil(BLOCK_TOKENS)..end.div_ceil(BLOCK_TOKENS) {
            self.cache.clear(block as u32);
        }
        self.len = end;
        Segment { rows, start, blocks: (0..end.div_ceil(BLOCK_TOKENS) as u32).collect() }
    }

    /// Forgets the rows from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}
