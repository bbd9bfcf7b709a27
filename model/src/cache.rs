//! The latent KV cache of one sequence: per layer and token the normed latent and the rotated shared key, `[C | R]`.
//!
//! In: rows as attention makes them. Out: views over what a sequence has so far.
//! Never here: sharing between sequences, eviction.

use tch::{Device, Kind, Tensor};

use crate::{config::ModelConfig, device::Compute};

/// Tokens that a cache grows by at least.
const BLOCK_TOKENS: usize = 64;

/// One sequence's cache over all layers. Memory is freed when it is dropped.
#[derive(Debug)]
pub struct SequenceCache {
    layers: Vec<LayerCache>,
}

impl SequenceCache {
    /// An empty one. Nothing is allocated before the first row.
    pub fn new(config: &ModelConfig, compute: Compute) -> Self {
        let width = (config.kv_lora_rank + config.qk_rope_head_dim) as i64;
        let layer = || LayerCache { rows: None, len: 0, width, kind: compute.kind(), device: compute.torch_device() };
        Self { layers: (0..config.num_hidden_layers).map(|_| layer()).collect() }
    }

    /// Tokens whose rows are in every layer.
    pub fn len(&self) -> usize {
        self.layers.iter().map(|layer| layer.len).min().unwrap_or(0)
    }

    /// Whether no token is in yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets the rows from `len` on: those of a step that did not finish.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }

    pub(crate) fn layer(&mut self, layer: usize) -> &mut LayerCache {
        &mut self.layers[layer]
    }
}

/// One layer's rows.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// `[capacity, C+R]`.
    rows: Option<Tensor>,
    len: usize,
    width: i64,
    kind: Kind,
    device: Device,
}

impl LayerCache {
    /// Adds rows `[T, C+R]` behind those that are there.
    pub(crate) fn append(&mut self, rows: &Tensor) {
        let more = rows.size()[0];
        self.reserve(self.len as i64 + more);
        if let Some(all) = &self.rows {
            all.narrow(0, self.len as i64, more).copy_(rows);
        }
        self.len += more as usize;
    }

    /// The first `len` rows, `[len, C+R]`, without copying.
    pub(crate) fn view(&self, len: i64) -> Tensor {
        match &self.rows {
            Some(all) => all.narrow(0, 0, len),
            None => Tensor::zeros([0, self.width], (self.kind, self.device)),
        }
    }

    /// Rows so far.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Doubles, so that a token's rows are moved a constant number of times on average.
    fn reserve(&mut self, needed: i64) {
        let capacity = self.rows.as_ref().map_or(0, |rows| rows.size()[0]);
        if needed <= capacity {
            return;
        }
        let block = BLOCK_TOKENS as i64;
        let capacity = (needed.max(capacity * 2) + block - 1) / block * block;
        let grown = Tensor::zeros([capacity, self.width], (self.kind, self.device));
        if let Some(old) = &self.rows {
            grown.narrow(0, 0, self.len as i64).copy_(&old.narrow(0, 0, self.len as i64));
        }
        self.rows = Some(grown);
    }
}
