//! Multi-head latent attention.
//!
//! In: normed rows of one or more sequences, and their caches. Out: one row each, to be added to the residual.
//! Never here: rows of two sequences in one product of scores; a sequence never sees another's keys.
//!
//! Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C; `inference/model.py` of DeepSeek-V3, whose two
//! forms are kept: `naive` builds keys and values and is the specification, `absorbed` works on the latent itself.

use tch::{Kind, Tensor};

use crate::{
    cache::{LayerCache, SequenceCache},
    checkpoint::{self, Checkpoint},
    config::ModelConfig,
    device::{Compute, Numerics},
    linear::Linear,
    norm::RmsNorm,
    rope::{Angles, Rope, score_factor},
};

/// From this many rows of one sequence on, building keys and values costs less than working on the latent: the naive
/// form's scores take N+R multiplications where the absorbed form's take C+R.
const NAIVE_FROM_ROWS: i64 = 32;

/// Scores that one product may make: the memory of a long prompt is bounded by its chunk, not by its square.
const MOST_SCORES: i64 = 1 << 25;

/// A run of rows that belong to one sequence and follow what its cache holds.
#[derive(Debug)]
pub struct Segment<'a> {
    /// Rows of this step, at least one.
    pub rows: usize,
    /// Where they are appended to.
    pub cache: &'a mut SequenceCache,
}

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Mla {
    query: Query,
    kv_a_proj: Linear,
    kv_a_norm: RmsNorm,
    /// W_UK `[H, N, C]` and W_UV `[H, V, C]`: the two halves of `kv_b_proj`.
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

    /// `[T, D]` to `[T, H*(N+R)]`.
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Direct(proj) => proj.forward(x),
            Self::Latent { down, norm, up } => up.forward(&norm.forward(&down.forward(x))),
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
            key_up: kv_b.narrow(1, 0, nope as i64).copy(),
            value_up: kv_b.narrow(1, nope as i64, value as i64).copy(),
            o_proj: load("o_proj", [hidden, heads * value], config.attention_bias)?,
            heads: heads as i64,
            nope: nope as i64,
            rope: rope as i64,
            value: value as i64,
            latent: latent as i64,
            scale: ((nope + rope) as f64).powf(-0.5) * score_factor(&config.rope),
            numerics: compute.numerics,
        })
    }

    /// Rows `[T, D]` of all `segments`, one after the other, to rows `[T, D]`; their latents join the caches.
    pub(crate) fn forward(
        &self,
        layer: usize,
        x: &Tensor,
        rope: &Rope,
        angles: &Angles,
        segments: &mut [Segment<'_>],
    ) -> Tensor {
        let rows = x.size()[0];
        let q = self.query.forward(x).view([rows, self.heads, self.nope + self.rope]);
        let q_nope = q.narrow(2, 0, self.nope); // [T, H, N]
        let q_pe = rope.rotate(&q.narrow(2, self.nope, self.rope), angles); // [T, H, R]
        let kv = self.kv_a_proj.forward(x); // [T, C+R]
        let latent = self.kv_a_norm.forward(&kv.narrow(1, 0, self.latent)); // [T, C]
        let k_pe = kv.narrow(1, self.latent, self.rope).unsqueeze(1);
        let k_pe = rope.rotate(&k_pe, angles).squeeze_dim(1); // [T, R]
        let cached = Tensor::cat(&[latent, k_pe], 1); // [T, C+R]

        let mut start = 0;
        let mut out = Vec::with_capacity(segments.len());
        for segment in segments {
            let rows = segment.rows as i64;
            let cache = segment.cache.layer(layer);
            cache.append(&cached.narrow(0, start, rows));
            out.push(self.attend(&q_nope.narrow(0, start, rows), &q_pe.narrow(0, start, rows), cache));
            start += rows;
        }
        self.o_proj.forward(&Tensor::cat(&out, 0).view([rows, self.heads * self.value]))
    }

    /// The last `T` rows of one sequence over all its cache: `[T, H, N]`, `[T, H, R]` to `[T, H, V]`.
    fn attend(&self, q_nope: &Tensor, q_pe: &Tensor, cache: &LayerCache) -> Tensor {
        let rows = q_nope.size()[0];
        let before = cache.len() as i64 - rows;
        if self.numerics == Numerics::Reproducible {
            // Row by row over exactly the keys it may see, each in memory of its own, so that how
            // operands are aligned cannot tell chunks apart: the same bits whatever chunk the row came in.
            let each = |row| {
                let keys = cache.view(before + row + 1);
                self.absorbed(&q_nope.narrow(0, row, 1).copy(), &q_pe.narrow(0, row, 1).copy(), &keys)
            };
            return Tensor::cat(&(0..rows).map(each).collect::<Vec<_>>(), 0);
        }
        let keys = cache.view(before + rows);
        if rows < NAIVE_FROM_ROWS {
            self.absorbed(q_nope, q_pe, &keys)
        } else {
            self.naive(q_nope, q_pe, &keys, MOST_SCORES)
        }
    }

    /// The specification: builds every head's keys `[W_UK c | k_pe]` and values `W_UV c`.
    /// `[T, H, N]`, `[T, H, R]`, `[S, C+R]` to `[T, H, V]`, no more than `most_scores` scores at a time.
    fn naive(&self, q_nope: &Tensor, q_pe: &Tensor, keys: &Tensor, most_scores: i64) -> Tensor {
        let context = keys.size()[0];
        let latent = keys.narrow(1, 0, self.latent).unsqueeze(0); // [1, S, C]
        let k_pe = keys.narrow(1, self.latent, self.rope).unsqueeze(0); // [1, S, R]
        let k_nope = latent.matmul(&self.key_up.transpose(1, 2)); // [H, S, N]
        let k = Tensor::cat(&[k_nope, k_pe.expand([self.heads, context, self.rope], false)], 2);
        let v = latent.matmul(&self.value_up.transpose(1, 2)); // [H, S, V]
        let q = Tensor::cat(&[q_nope, q_pe], 2).transpose(0, 1); // [H, T, N+R]
        let (rows, k) = (q.size()[1], k.transpose(1, 2));
        let some = (most_scores / (self.heads * context)).clamp(1, rows);
        let part = |start: i64| {
            let here = some.min(rows - start);
            let seen = context - (rows - start - here);
            let scores = q.narrow(1, start, here).matmul(&k.narrow(2, 0, seen)); // [H, here, seen]
            self.probabilities(scores).matmul(&v.narrow(1, 0, seen)).transpose(0, 1)
        };
        Tensor::cat(&(0..rows).step_by(some as usize).map(part).collect::<Vec<_>>(), 0)
    }

    /// The same on the latent itself: `q' = W_UK^T q_nope`, one key `[C | R]` for all heads, `W_UV` after the sum.
    fn absorbed(&self, q_nope: &Tensor, q_pe: &Tensor, keys: &Tensor) -> Tensor {
        let (rows, context) = (q_nope.size()[0], keys.size()[0]);
        let q_latent = q_nope.transpose(0, 1).matmul(&self.key_up); // [H, T, C]
        let q = Tensor::cat(&[q_latent, q_pe.transpose(0, 1)], 2); // [H, T, C+R]
        let flat = q.reshape([self.heads * rows, self.latent + self.rope]);
        let scores = flat.matmul(&keys.transpose(0, 1)).view([self.heads, rows, context]);
        let p = self.probabilities(scores).view([self.heads * rows, context]);
        let u = p.matmul(&keys.narrow(1, 0, self.latent)).view([self.heads, rows, self.latent]);
        u.matmul(&self.value_up.transpose(1, 2)).transpose(0, 1).contiguous() // [T, H, V]
    }

    /// Causal softmax in f32 over scores `[H, T, S]`; row t sees all but the last T-1-t keys.
    fn probabilities(&self, scores: Tensor) -> Tensor {
        let (kind, size) = (scores.kind(), scores.size());
        let (rows, context) = (size[1], size[2]);
        let mut scores = scores.to_kind(Kind::Float);
        let _ = scores.g_mul_scalar_(self.scale);
        if rows > 1 {
            let future = Tensor::ones([rows, context], (Kind::Bool, scores.device())).triu(context - rows + 1);
            let _ = scores.masked_fill_(&future, f64::NEG_INFINITY);
        }
        scores.softmax(-1, Kind::Float).to_kind(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{checkpoint::Weight, device::init_thread};

    fn random_mla(numerics: Numerics) -> Mla {
        let (heads, nope, rope, value, latent, hidden) = (3, 8, 4, 6, 16, 24);
        let compute = Compute { numerics, ..Compute::REFERENCE };
        let tensor = |size: &[i64]| Tensor::randn(size, (Kind::Float, tch::Device::Cpu)) * 0.2;
        let linear = |size: &[i64]| Linear::new(Weight::owned(tensor(size)), None, compute);
        let checkpoint_free_norm = RmsNorm::of(Weight::owned(tensor(&[latent])), 1e-6);
        Mla {
            query: Query::Direct(linear(&[heads * (nope + rope), hidden])),
            kv_a_proj: linear(&[latent + rope, hidden]),
            kv_a_norm: checkpoint_free_norm,
            key_up: tensor(&[heads, nope, latent]),
            value_up: tensor(&[heads, value, latent]),
            o_proj: linear(&[hidden, heads * value]),
            heads,
            nope,
            rope,
            value,
            latent,
            scale: ((nope + rope) as f64).powf(-0.5),
            numerics,
        }
    }

    #[test]
    fn the_absorbed_form_computes_what_the_naive_form_specifies() {
        init_thread(1);
        let mla = random_mla(Numerics::Fast);
        for (rows, context) in [(1, 1), (1, 70), (5, 5), (7, 40), (40, 40)] {
            let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, tch::Device::Cpu));
            let q_nope = random(&[rows, mla.heads, mla.nope]);
            let q_pe = random(&[rows, mla.heads, mla.rope]);
            let keys = random(&[context, mla.latent + mla.rope]);
            let absorbed = mla.absorbed(&q_nope, &q_pe, &keys);
            for most_scores in [1, 7 * mla.heads * context, MOST_SCORES] {
                let naive = mla.naive(&q_nope, &q_pe, &keys, most_scores);
                let worst = (naive - &absorbed).abs().max().double_value(&[]);
                assert!(worst < 1e-5, "{rows} rows over {context}, {most_scores} scores at a time: {worst}");
            }
        }
    }
}
