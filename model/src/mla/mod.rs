//! Multi-head latent attention.
//!
//! In: normed rows of one or more sequences, and their caches. Out: one row each, to be added to the residual.
//! Never here: rows of two sequences in one product of scores; a sequence never sees another's keys.
//!
//! [`kernels`] computes it on the processor, [`libtorch`] on GPUs, where it leaves few rows to kernels of our own; all are
//! compared with each other.
//!
//! Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; `inference/model.py` of DeepSeek-V3, whose two
//! forms are kept: `naive` builds keys and values and is the specification, `absorbed` works on the latent itself.

mod kernels;
mod libtorch;

use tch::{Device, Tensor};

use crate::{
    batch::Batch,
    cache::KvCache,
    checkpoint::{self, Checkpoint},
    config::ModelConfig,
    device::{Compute, Numerics},
    gpu::attention::{Kernels, Sizes},
    linear::Linear,
    norm::RmsNorm,
    rope::score_factor,
};

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Mla {
    query: Query,
    kv_a_proj: Linear,
    kv_a_norm: RmsNorm,
    /// W_UK, turned `[H, C, N]`, and W_UV `[H, V, C]`: the two halves of `kv_b_proj`.
    key_up: Tensor,
    value_up: Tensor,
    o_proj: Linear,
    heads: i64,
    nope: i64,
    rope: i64,
    value: i64,
    latent: i64,
    scale: f64,
    numerics: Numerics,
    /// Our own on a GPU, where there are some for these sizes.
    on_gpu: Option<&'static Kernels>,
}

/// Queries come from the row itself, or through a latent of their own.
#[derive(Debug)]
enum Query {
    Direct(Linear),
    Latent { down: Linear, norm: RmsNorm, up: Linear },
}

impl Query {
    fn load(
        checkpoint: &Checkpoint,
        name: &str,
        config: &ModelConfig,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let heads = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim);
        let hidden = config.hidden_size;
        let load = |part: &str, size, bias| Linear::load(checkpoint, &format!("{name}.{part}"), size, bias, compute);
        Ok(match config.q_lora_rank {
            None => Self::Direct(load("q_proj", [heads, hidden], false)?),
            Some(rank) => Self::Latent {
                down: load("q_a_proj", [rank, hidden], config.attention_bias)?,
                norm: RmsNorm::load(checkpoint, &format!("{name}.q_a_layernorm"), rank, config.qk_norm_eps, compute)?,
                up: load("q_b_proj", [heads, rank], false)?,
            },
        })
    }

    /// What rows `[T, D]` go through first.
    fn first(&self) -> &Linear {
        match self {
            Self::Direct(proj) => proj,
            Self::Latent { down, .. } => down,
        }
    }

    /// What came of that to `[T, H*(N+R)]`.
    fn finish(&self, first: Tensor) -> Tensor {
        match self {
            Self::Direct(_) => first,
            Self::Latent { norm, up, .. } => up.forward(&norm.forward(&first)),
        }
    }
}

impl Mla {
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        layer: usize,
        config: &ModelConfig,
        compute: Compute,
    ) -> Result<Self, checkpoint::Error> {
        let name = format!("model.layers.{layer}.self_attn");
        let (heads, nope, rope) = (config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim);
        let (value, latent, hidden) = (config.v_head_dim, config.kv_lora_rank, config.hidden_size);
        let load = |part: &str, size, bias| Linear::load(checkpoint, &format!("{name}.{part}"), size, bias, compute);
        let kv_b = checkpoint
            .load(&format!("{name}.kv_b_proj.weight"), &[heads * (nope + value), latent])?
            .to(compute.kind(), compute.torch_device());
        let kv_b = kv_b.view([heads as i64, (nope + value) as i64, latent as i64]);
        Ok(Self {
            query: Query::load(checkpoint, &name, config, compute)?,
            kv_a_proj: load("kv_a_proj_with_mqa", [latent + rope, hidden], config.attention_bias)?,
            kv_a_norm: RmsNorm::load(
                checkpoint,
                &format!("{name}.kv_a_layernorm"),
                latent,
                config.qk_norm_eps,
                compute,
            )?,
            // Their own memory: the mapping they were cut from may go.
            key_up: kv_b.narrow(1, 0, nope as i64).transpose(1, 2).contiguous().copy(),
            value_up: kv_b.narrow(1, nope as i64, value as i64).contiguous().copy(),
            o_proj: load("o_proj", [hidden, heads * value], config.attention_bias)?,
            heads: heads as i64,
            nope: nope as i64,
            rope: rope as i64,
            value: value as i64,
            latent: latent as i64,
            scale: ((nope + rope) as f64).powf(-0.5) * score_factor(&config.rope),
            numerics: compute.numerics,
            on_gpu: Kernels::of(compute, Sizes { heads, nope, rope, latent }),
        })
    }

    fn sizes(&self) -> Sizes {
        let [heads, nope, rope, latent] = [self.heads, self.nope, self.rope, self.latent].map(|size| size as usize);
        Sizes { heads, nope, rope, latent }
    }

    /// Rows `[T, D]` to queries `[T, H*(N+R)]`, and to latents and keys `[T, C+R]`.
    fn project(&self, x: &Tensor) -> (Tensor, Tensor) {
        let [query, kv] = Linear::forward_all([self.query.first(), &self.kv_a_proj], x);
        (self.query.finish(query), kv)
    }

    /// Rows `[T, D]` of `batch` to rows `[T, D]`; their latents go to the cache.
    pub(crate) fn forward(&self, layer: usize, x: &Tensor, batch: &Batch, cache: &KvCache) -> Tensor {
        match x.device() {
            Device::Cpu => self.by_kernels(layer, x, batch, cache),
            _ => self.by_libtorch(layer, x, batch, cache),
        }
    }
}
