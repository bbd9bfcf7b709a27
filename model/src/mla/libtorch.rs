//! Attention in libtorch's words: what computes it on GPUs, but for what kernels of our own do there, and what all kernels are
//! compared with.
//!
//! In: normed rows and their sequences' parts. Out: one row each. Never here: how a kernel does it.

use tch::{Kind, Tensor};

use super::Mla;
use crate::{
    batch::{Batch, Part, Plan},
    cache::{BLOCK_TOKENS, Keys, KvCache},
    device::Numerics,
    gpu,
};

/// Scores that one product may make: the memory of a long prompt is bounded by its chunk, not by its square.
const MOST_SCORES: i64 = 1 << 23;

impl Mla {
    /// As [`forward`](Mla::forward), for any device.
    pub(super) fn by_libtorch(&self, layer: usize, x: &Tensor, batch: &Batch, cache: &KvCache) -> Tensor {
        let rows = x.size()[0];
        let (angles, Plan { slots, parts, order }) = (&batch.angles, batch.plan(self.on_gpu.is_some()));
        let (q, kv) = self.project(x);
        let q = q.view([rows, self.heads, self.nope + self.rope]);
        let q_nope = q.narrow(2, 0, self.nope); // [T, H, N]
        let q_pe = q.narrow(2, self.nope, self.rope); // [T, H, R]
        let q_pe = match self.on_gpu {
            Some(kernels) => {
                let norm = self.kv_a_norm.parts();
                launched(kernels.remember(self.sizes(), [&q, &kv], norm, angles.turns(), slots, cache.layer(layer)));
                q_pe
            }
            None => {
                let latent = self.kv_a_norm.forward(&kv.narrow(1, 0, self.latent)); // [T, C]
                let k_pe = kv.narrow(1, self.latent, self.rope).unsqueeze(1);
                let k_pe = angles.rotate(&k_pe).squeeze_dim(1); // [T, R]
                cache.write(layer, slots, &Tensor::cat(&[latent, k_pe], 1));
                angles.rotate(&q_pe)
            }
        };

        let part = |part: &Part| match part {
            Part::Few { rows, lookup } => {
                // They are planned where there are kernels for them.
                let kernels = self.on_gpu.unwrap_or_else(|| unreachable!("no kernels"));
                let q_nope = rows.as_ref().map_or_else(|| q_nope.shallow_clone(), |rows| q_nope.index_select(0, rows));
                let queries = self.of_latents(&q_nope).contiguous(); // [H, n, C]
                let sums = kernels.attend(self.sizes(), [&queries, &q], self.scale, lookup, cache.layer(layer));
                self.raise(&launched(sums))
            }
            Part::Together { rows, count, blocks, hidden } => {
                let keys = cache.tables(layer, blocks, *count);
                self.together(&q_nope.index_select(0, rows), &q_pe.index_select(0, rows), &keys, hidden)
            }
            Part::Alone { first, rows, before, keys } => {
                let rows_of = |q: &Tensor| q.narrow(0, *first, *rows);
                self.alone(&rows_of(&q_nope), &rows_of(&q_pe), *before, &Lookup { cache, layer, keys })
            }
        };
        let mut each: Vec<Tensor> = parts.iter().map(part).collect();
        let mut out = if each.len() == 1 { each.swap_remove(0) } else { Tensor::cat(&each, 0) }; // [T, H, V]
        if let Some(order) = order {
            out = out.index_select(0, order);
        }
        self.o_proj.forward(&out.reshape([rows, self.heads * self.value]))
    }

    /// T rows of one sequence that follow `before` others: `[T, H, N]`, `[T, H, R]` to `[T, H, V]`.
    fn alone(&self, q_nope: &Tensor, q_pe: &Tensor, before: i64, keys: &Lookup<'_>) -> Tensor {
        let rows = q_nope.size()[0];
        if self.numerics == Numerics::Reproducible {
            // Row by row over exactly the keys it may see, each in memory of its own, so that how
            // operands are aligned cannot tell chunks apart: the same bits whatever chunk the row came in.
            let each = |row| {
                let keys = keys.rows(0, before + row + 1).copy();
                self.absorbed(&q_nope.narrow(0, row, 1).copy(), &q_pe.narrow(0, row, 1).copy(), &keys)
            };
            return Tensor::cat(&(0..rows).map(each).collect::<Vec<_>>(), 0);
        }
        if rows >= self.naive_from_rows() {
            return self.naive(q_nope, q_pe, before, keys, MOST_SCORES);
        }
        // As many rows at a time as their scores allow.
        let some = (MOST_SCORES / (self.heads * (before + rows))).clamp(1, rows);
        let part = |start: i64| {
            let here = some.min(rows - start);
            let keys = keys.rows(0, before + start + here);
            self.absorbed(&q_nope.narrow(0, start, here), &q_pe.narrow(0, start, here), &keys)
        };
        Tensor::cat(&(0..rows).step_by(some as usize).map(part).collect::<Vec<_>>(), 0)
    }

    /// From this many rows of one sequence on, building keys and values costs less than working on the latent. Per key and
    /// head the naive form takes N+R+V multiplications a row and C(N+V) once, the absorbed form 2C+R a row.
    fn naive_from_rows(&self) -> i64 {
        let saved = 2 * self.latent - self.nope - self.value;
        if saved <= 0 { i64::MAX } else { self.latent * (self.nope + self.value) / saved + 1 }
    }

    /// The specification: builds every head's keys `[W_UK c | k_pe]` and values `W_UV c`. `[T, H, N]`, `[T, H, R]` over
    /// the `before` keys before these rows and their own, to `[T, H, V]`.
    ///
    /// Keys are taken some at a time, so that no more than `most_scores` scores exist at once, and the softmax is kept
    /// running over them: its maximum and its sum are corrected as greater scores come (Milakov and Gimelshein, arXiv
    /// 1805.02867; FlashAttention, arXiv 2205.14135, section 3.1).
    fn naive(&self, q_nope: &Tensor, q_pe: &Tensor, before: i64, keys: &Lookup<'_>, most_scores: i64) -> Tensor {
        let (rows, block) = (q_nope.size()[0], BLOCK_TOKENS as i64);
        let context = before + rows;
        let q = Tensor::cat(&[q_nope, q_pe], 2).transpose(0, 1).contiguous(); // [H, T, N+R]
        let some = (most_scores / (self.heads * rows) / block).max(1) * block;
        let float = (Kind::Float, q.device());
        let mut largest = Tensor::full([self.heads, rows, 1], f64::NEG_INFINITY, float);
        let mut total = Tensor::zeros([self.heads, rows, 1], float);
        let mut sum = Tensor::zeros([self.heads, rows, self.value], float);
        for start in (0..context).step_by(some as usize) {
            let here = some.min(context - start);
            let (k, v) = self.keys_and_values(&keys.rows(start, here));
            let mut scores = q.matmul(&k.transpose(1, 2)).to_kind(Kind::Float); // [H, T, here]
            let _ = scores.g_mul_scalar_(self.scale);
            hide_future(&mut scores, before - start);
            let larger = largest.maximum(&scores.amax([-1].as_slice(), true));
            let p = (scores - &larger).exp();
            let correction = (largest - &larger).exp();
            total = total * &correction + p.sum_dim_intlist([-1].as_slice(), true, Kind::Float);
            sum = sum * correction + p.to_kind(q.kind()).matmul(&v).to_kind(Kind::Float);
            largest = larger;
        }
        (sum / total).to_kind(q.kind()).transpose(0, 1) // [T, H, V]
    }

    /// Of latents `[S, C+R]`: keys `[H, S, N+R]` and values `[H, S, V]`.
    fn keys_and_values(&self, rows: &Tensor) -> (Tensor, Tensor) {
        let context = rows.size()[0];
        let latent = rows.narrow(1, 0, self.latent).unsqueeze(0); // [1, S, C]
        let k_pe = rows.narrow(1, self.latent, self.rope).unsqueeze(0); // [1, S, R]
        let k_nope = latent.matmul(&self.key_up); // [H, S, N]
        let k = Tensor::cat(&[k_nope, k_pe.expand([self.heads, context, self.rope], false)], 2);
        (k, latent.matmul(&self.value_up.transpose(1, 2)))
    }

    /// The same on the latent itself: `q' = W_UK^T q_nope`, one key `[C | R]` for all heads, `W_UV` after the sum.
    /// `[T, H, N]`, `[T, H, R]`, `[S, C+R]` to `[T, H, V]`; these rows are the last T of the S.
    fn absorbed(&self, q_nope: &Tensor, q_pe: &Tensor, keys: &Tensor) -> Tensor {
        let (rows, context) = (q_nope.size()[0], keys.size()[0]);
        let q = self.absorb(q_nope, q_pe).reshape([1, self.heads * rows, self.latent + self.rope]);
        let mut scores = self.scaled_scores(&q, &keys.unsqueeze(0)).view([self.heads, rows, context]);
        hide_future(&mut scores, context - rows);
        let p = scores.softmax(-1, scores.kind()).view([self.heads * rows, context]);
        let u = p.matmul(&keys.narrow(1, 0, self.latent)).view([self.heads, rows, self.latent]);
        self.raise(&u)
    }

    /// The absorbed form for B sequences of r rows each: `[B*r, H, N]`, `[B*r, H, R]`, `[B, S, C+R]` to `[B*r, H, V]`.
    /// `hidden` `[B, 1, r, S]` is what each row may not see.
    fn together(&self, q_nope: &Tensor, q_pe: &Tensor, keys: &Tensor, hidden: &Tensor) -> Tensor {
        let (count, context) = (keys.size()[0], keys.size()[1]);
        let each = q_nope.size()[0] / count;
        let q = self.absorb(q_nope, q_pe).view([self.heads, count, each, -1]).transpose(0, 1); // [B, H, r, C+R]
        let q = q.reshape([count, self.heads * each, self.latent + self.rope]);
        let mut scores = self.scaled_scores(&q, keys).view([count, self.heads, each, context]);
        let _ = scores.masked_fill_(hidden, f64::NEG_INFINITY);
        let p = scores.softmax(-1, scores.kind()).view([count, self.heads * each, context]);
        let u = p.matmul(&keys.narrow(2, 0, self.latent)).view([count, self.heads, each, self.latent]);
        self.raise(&u.transpose(0, 1).reshape([self.heads, count * each, self.latent]))
    }

    /// `[T, H, N]`, `[T, H, R]` to queries of latents `[H, T, C+R]`.
    fn absorb(&self, q_nope: &Tensor, q_pe: &Tensor) -> Tensor {
        Tensor::cat(&[self.of_latents(q_nope), q_pe.transpose(0, 1)], 2)
    }

    /// `[T, H, N]` to queries of latents `[H, T, C]`.
    fn of_latents(&self, q_nope: &Tensor) -> Tensor {
        q_nope.transpose(0, 1).matmul(&self.key_up.transpose(1, 2))
    }

    /// Sums of latents `[H, T, C]` to values `[T, H, V]`.
    fn raise(&self, u: &Tensor) -> Tensor {
        u.matmul(&self.value_up.transpose(1, 2)).transpose(0, 1).contiguous()
    }

    /// `[B, n, C+R]` by `[B, S, C+R]` to `[B, n, S]`: sums are scaled in f32, before they are rounded.
    fn scaled_scores(&self, q: &Tensor, keys: &Tensor) -> Tensor {
        // Added 0 times, which is not at all.
        let nothing = Tensor::empty([1, 1, 1], (q.kind(), q.device()));
        nothing.baddbmm(q, &keys.transpose(1, 2), 0.0, self.scale)
    }
}

/// Panics where a kernel could not be launched, as libtorch does: what the engine makes of either is one thing.
fn launched<T>(outcome: Result<T, gpu::Error>) -> T {
    outcome.unwrap_or_else(|error| panic!("attention on the GPU: {error}"))
}

/// In `[H, T, S]` row t sees key s where s <= `before` + t.
fn hide_future(scores: &mut Tensor, before: i64) {
    let (rows, context) = (scores.size()[1], scores.size()[2]);
    if before + 1 < context {
        let future = Tensor::ones([rows, context], (Kind::Bool, scores.device())).triu(before + 1);
        let _ = scores.masked_fill_(&future, f64::NEG_INFINITY);
    }
}

/// One layer's rows of one sequence.
struct Lookup<'a> {
    cache: &'a KvCache,
    layer: usize,
    keys: &'a Keys,
}

impl Lookup<'_> {
    /// `[len, C+R]` from row `start` on, which is a multiple of 64.
    fn rows(&self, start: i64, len: i64) -> Tensor {
        self.cache.rows(self.layer, self.keys, start, len)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Query, *};
    use crate::{
        batch::Segment,
        checkpoint::{Stored, Weight},
        config::RopeConfig,
        device::{Compute, Device, Dtype, init_thread},
        gpu::attention::Kernels,
        linear::Linear,
        made_up_gpu,
        norm::RmsNorm,
        rope::Rope,
    };

    fn random_mla(numerics: Numerics) -> Mla {
        random_mla_of([3, 8, 4, 6, 16], Compute { numerics, ..Compute::REFERENCE })
    }

    fn random_mla_of([heads, nope, rope, value, latent]: [i64; 5], compute: Compute) -> Mla {
        let hidden = 24;
        let tensor = |size: &[i64]| {
            let spread = 0.2 * (24.0 / *size.last().unwrap_or(&24) as f64).sqrt();
            (Tensor::randn(size, FLOAT) * spread).to_device_(compute.torch_device(), compute.kind(), false, false)
        };
        let linear = |size: &[i64]| Linear::new(Stored::Plain(Weight::owned(tensor(size))), None, compute);
        let checkpoint_free_norm = RmsNorm::of(Weight::owned(tensor(&[latent])), 1e-6);
        Mla {
            query: Query::Direct(linear(&[heads * (nope + rope), hidden])),
            kv_a_proj: linear(&[latent + rope, hidden]),
            kv_a_norm: checkpoint_free_norm,
            key_up: tensor(&[heads, latent, nope]),
            value_up: tensor(&[heads, value, latent]),
            o_proj: linear(&[hidden, heads * value]),
            heads,
            nope,
            rope,
            value,
            latent,
            scale: ((nope + rope) as f64).powf(-0.5),
            numerics: compute.numerics,
            on_gpu: None,
        }
    }

    impl Mla {
        fn become_of(&mut self, compute: Compute) {
            let linear = |linear: &Linear| {
                let weight = linear.plain().expect("plain numbers").to_kind(compute.kind());
                Linear::new(Stored::Plain(Weight::owned(weight)), None, compute)
            };
            if let Query::Direct(proj) = &self.query {
                self.query = Query::Direct(linear(proj));
            }
            self.kv_a_proj = linear(&self.kv_a_proj);
            self.o_proj = linear(&self.o_proj);
            self.kv_a_norm = RmsNorm::of(Weight::owned(self.kv_a_norm.parts().0.to_kind(compute.kind())), 1e-6);
            self.key_up = self.key_up.to_kind(compute.kind());
            self.value_up = self.value_up.to_kind(compute.kind());
        }
    }

    /// A cache of one layer that holds one sequence's `keys` `[S, C+R]` in `blocks`; everything else in it is no number.
    fn holding(keys: &Tensor, blocks: &[u32]) -> KvCache {
        let (context, width) = (keys.size()[0] as usize, keys.size()[1]);
        let cache = KvCache::of(Tensor::full([12, BLOCK_TOKENS as i64, width], f64::NAN, FLOAT));
        blocks.iter().for_each(|&block| cache.clear(block));
        let slot = |token: usize| {
            i64::from(blocks[token / BLOCK_TOKENS]) * BLOCK_TOKENS as i64 + (token % BLOCK_TOKENS) as i64
        };
        cache.write(0, &Tensor::from_slice(&(0..context).map(slot).collect::<Vec<_>>()), keys);
        cache
    }

    const FLOAT: (Kind, tch::Device) = (Kind::Float, tch::Device::Cpu);

    fn worst(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn the_absorbed_form_computes_what_the_naive_form_specifies() {
        init_thread(1);
        let mla = random_mla(Numerics::Fast);
        for (rows, context) in [(1, 1), (1, 70), (5, 5), (7, 40), (40, 40), (40, 300), (130, 500)] {
            let random = |size: &[i64]| Tensor::randn(size, FLOAT);
            let q_nope = random(&[rows, mla.heads, mla.nope]);
            let q_pe = random(&[rows, mla.heads, mla.rope]);
            let keys = random(&[context, mla.latent + mla.rope]);
            let absorbed = mla.absorbed(&q_nope, &q_pe, &keys);
            let in_a_row = (holding(&keys, &[2, 3, 4, 5, 6, 7, 8, 9]), Keys::Run { first: 2 });
            let scattered = [7, 3, 11, 0, 5, 9, 1, 8u32];
            let table = Tensor::from_slice(&scattered.map(i64::from));
            for (cache, keys) in [in_a_row, (holding(&keys, &scattered), Keys::Table(table))] {
                let lookup = Lookup { cache: &cache, layer: 0, keys: &keys };
                for most_scores in [1, 100 * mla.heads * rows, MOST_SCORES] {
                    let naive = mla.naive(&q_nope, &q_pe, context - rows, &lookup, most_scores);
                    let off = worst(&naive, &absorbed);
                    assert!(off < 1e-5, "{rows} rows over {context}, {most_scores} scores at a time: {off}");
                }
            }
        }
    }

    #[test]
    fn sequences_computed_together_get_what_each_gets_alone() {
        init_thread(1);
        let mla = random_mla(Numerics::Fast);
        let config = RopeConfig { theta: 1e4, interleaved: true, scaling: None };
        let rope = Rope::new(&config, mla.rope as usize, tch::Device::Cpu);
        let cache = KvCache::of(Tensor::zeros([12, BLOCK_TOKENS as i64, mla.latent + mla.rope], FLOAT));
        let _ = cache.rows(0, &Keys::Run { first: 0 }, 0, 12 * 64).uniform_(-1.0, 1.0);
        let segment = |rows, start, blocks: &[u32]| Segment { rows, start, blocks: blocks.to_vec() };
        let segments = [
            segment(1, 150, &[7, 3, 9]),
            segment(2, 63, &[4, 1]),
            segment(1, 191, &[2, 5, 8]),
            segment(40, 30, &[11, 10]),
            segment(2, 70, &[0, 6]),
        ];
        let rows: i64 = segments.iter().map(|segment| segment.rows as i64).sum();
        let x = Tensor::randn([rows, 24], FLOAT);
        let batch = |segments: &[Segment]| Batch::new(segments, &rope, tch::Device::Cpu, Numerics::Fast);
        let together = batch(&segments);
        let plan = together.plan(false);
        assert!(plan.parts.iter().any(|part| matches!(part, Part::Together { .. })) && plan.order.is_some());
        let together = mla.by_libtorch(0, &x, &together, &cache);
        let mut first = 0;
        for segment in segments {
            let rows = segment.rows as i64;
            let alone = mla.by_libtorch(0, &x.narrow(0, first, rows), &batch(std::slice::from_ref(&segment)), &cache);
            let off = worst(&alone, &together.narrow(0, first, rows));
            assert!(off < 1e-5, "{segment:?}: {off}");
            first += rows;
        }
    }

    /// The sequences of one step: some with their last row only, one in the middle of its prompt, tables in no order.
    fn step(context: usize) -> Vec<Segment> {
        let segment = |rows, start, blocks: &[u32]| Segment { rows, start, blocks: blocks.to_vec() };
        vec![
            segment(1, context, &(0..17).rev().collect::<Vec<_>>()),
            segment(2, 63, &[20, 18]),
            segment(40, 30, &[31, 25]),
            segment(1, 0, &[19]),
            segment(3, 70, &[21, 30]),
        ]
    }

    #[test]
    fn kernels_compute_what_libtorch_does_and_every_row_as_if_alone() {
        init_thread(2);
        let config = RopeConfig { theta: 1e4, interleaved: true, scaling: None };
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut mla = random_mla(Numerics::Reproducible);
            let kind = if dtype == Dtype::F32 { Kind::Float } else { Kind::BFloat16 };
            mla.become_of(Compute { dtype, numerics: Numerics::Reproducible, ..Compute::REFERENCE });
            let rope = Rope::new(&config, mla.rope as usize, tch::Device::Cpu);
            let cache =
                KvCache::of(Tensor::zeros([32, BLOCK_TOKENS as i64, mla.latent + mla.rope], FLOAT).to_kind(kind));
            let _ = cache.rows(0, &Keys::Run { first: 0 }, 0, 32 * 64).uniform_(-1.0, 1.0);
            for context in [3, 640, 1050] {
                let segments = step(context);
                let rows: i64 = segments.iter().map(|segment| segment.rows as i64).sum();
                let x = Tensor::randn([rows, 24], FLOAT).to_kind(kind);
                let batch = |segments: &[Segment]| Batch::new(segments, &rope, tch::Device::Cpu, Numerics::Fast);
                let right = mla.by_libtorch(0, &x, &batch(&segments), &cache);
                let ours = mla.by_kernels(0, &x, &batch(&segments), &cache);
                let off = worst(&right.to_kind(Kind::Float), &ours.to_kind(Kind::Float));
                assert!(off < if dtype == Dtype::F32 { 1e-5 } else { 2e-2 }, "{dtype:?} over {context}: {off}");
                let mut first = 0;
                for segment in segments {
                    for row in 0..segment.rows {
                        let alone = Segment { rows: 1, start: segment.start + row, blocks: segment.blocks.clone() };
                        let alone = mla.by_kernels(0, &x.narrow(0, first, 1), &batch(&[alone]), &cache);
                        assert!(alone.equal(&ours.narrow(0, first, 1)), "{dtype:?}: row {row} of {segment:?}");
                        first += 1;
                    }
                }
            }
        }
    }

    #[test]
    fn kernels_on_a_gpu_compute_what_libtorch_does() {
        let device = Device::Cuda(0);
        if let Err(error) = device.open() {
            return made_up_gpu::again(error);
        }
        init_thread(1);
        tch::manual_seed(3);
        let compute = Compute { device, dtype: Dtype::Bf16, numerics: Numerics::Fast };
        let gpu = compute.torch_device();
        for sizes in [[3, 8, 16, 8, 64], [20, 16, 32, 16, 192], [16, 128, 64, 128, 512]] {
            for interleaved in [true, false] {
                let mut mla = random_mla_of(sizes, compute);
                let config = RopeConfig { theta: 1e4, interleaved, scaling: None };
                let rope = Rope::new(&config, mla.rope as usize, gpu);
                let size = [64, BLOCK_TOKENS as i64, mla.latent + mla.rope];
                let seen = (Tensor::randn(size, FLOAT) * 0.5).to_device_(gpu, Kind::BFloat16, false, false);
                let mut some = step(640);
                some.push(Segment { rows: 1, start: 1600, blocks: (32..58).rev().collect() });
                for segments in [&some[..1], &some[5..], &some[..2], &some[..], &some[3..]] {
                    let rows: i64 = segments.iter().map(|segment| segment.rows as i64).sum();
                    let x = Tensor::randn([rows, 24], FLOAT).to_device_(gpu, Kind::BFloat16, false, false);
                    let computed = |mla: &mut Mla, kernels| {
                        mla.on_gpu = kernels;
                        let cache = KvCache::of(seen.copy());
                        let batch = Batch::new(segments, &rope, gpu, Numerics::Fast);
                        let rows = mla.by_libtorch(0, &x, &batch, &cache).to_kind(Kind::Float);
                        let cached = cache.layer(0).to_kind(Kind::Float);
                        [rows, cached]
                    };
                    let right = computed(&mut mla, None);
                    let kernels = Kernels::of(compute, mla.sizes());
                    assert!(kernels.is_some(), "kernels are there");
                    let ours = computed(&mut mla, kernels);
                    for (ours, right) in ours.iter().zip(&right) {
                        let off = (ours - right).square().mean(Kind::Float) / right.square().mean(Kind::Float);
                        let off = off.sqrt().double_value(&[]);
                        assert!(off < 2e-2, "{sizes:?}, {interleaved}, {segments:?}: off by {off}");
                    }
                }
            }
        }
    }
}
