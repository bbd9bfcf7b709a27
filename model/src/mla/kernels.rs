//! Attention on the processor, by our own kernels, in the absorbed form for every row: a row's bits are its own.
//!
//! In: normed rows and their sequences. Out: one row each. Never here: libtorch's arithmetic, a tensor but for what comes
//! and goes.

use tch::{Device, Kind, Tensor};

use super::Mla;
use crate::{
    batch::Batch,
    cache::KvCache,
    device::Dtype,
    kernels::{
        Format, Isa, Matrix, Operand, Rows, Source,
        attention::{self, Shape, Span},
        matrix::Values,
        product::{Job, Out, products},
        team, tensor,
    },
};

/// Rows that one thread makes ready at a time.
const ROWS_AT_ONCE: usize = 16;

impl Mla {
    /// As [`forward`](Mla::forward), on the processor.
    pub(super) fn by_kernels(&self, layer: usize, x: &Tensor, batch: &Batch, cache: &KvCache) -> Tensor {
        let (q, kv) = self.project(x); // [T, H*(N+R)], [T, C+R]
        let (q, kv) = (tensor::rows(&q), tensor::rows(&kv));
        self.remember(layer, kv, batch, cache);
        let queries = self.absorb_by_kernels(q, batch); // [T, H, C+R]
        let spans = batch.segments.iter().scan(0, |first, segment| {
            let span = Span { first: *first, rows: segment.rows, before: segment.start, table: &segment.blocks };
            *first += segment.rows;
            Some(span)
        });
        let spans: Vec<Span<'_>> = spans.collect();
        let sums = attention::attend(Isa::best(), self.shape(), cache.blocks(layer), &queries, &spans); // [T, H, C]
        self.o_proj.forward(&self.raise_by_kernels(&sums, x.kind()))
    }

    fn shape(&self) -> Shape {
        let [heads, latent, rope] = [self.heads, self.latent, self.rope].map(|size| size as usize);
        Shape { heads, latent, width: latent + rope, scale: self.scale as f32 }
    }

    /// Puts each row's latent and key `[C | R]` into its place in the cache.
    fn remember(&self, layer: usize, kv: Rows<'_>, batch: &Batch, cache: &KvCache) {
        let Shape { latent, width, .. } = self.shape();
        let (norm, angles, slots) = (self.kv_a_norm.by_rows(), batch.angles.rows(), &batch.slots);
        let out = cache.place(layer);
        by_rows(slots.len(), &|row| {
            let mut values = kv.part(row * width, width).to_f32(Isa::best());
            let (normed, key) = values.split_at_mut(latent);
            norm.apply(normed, matches!(kv, Rows::Bf16(_)));
            angles.rotate(row, key);
            // SAFETY: the slot is one of the row's sequence, which the caller has to itself, and no other row's.
            #[allow(unsafe_code)]
            unsafe {
                out.write(slots[row] * width, &values);
            }
        });
    }

    /// `[W_UK^T q_nope | q_pe]` per row and head, f32 `[T, H, C+R]`.
    fn absorb_by_kernels(&self, q: Rows<'_>, batch: &Batch) -> Vec<f32> {
        let Shape { heads, latent, width, .. } = self.shape();
        let (nope, each) = (self.nope as usize, (self.nope + self.rope) as usize);
        let rows = batch.slots.len();
        let mut queries = vec![0.0; rows * heads * width];
        let out = Out::F32(queries.as_mut_ptr());
        let part = |row: usize, head: usize, start, len| q.part((row * heads + head) * each + start, len);
        self.per_head(&self.key_up, rows, &|row, head| part(row, head, 0, nope), (out, heads * width, width));
        let angles = batch.angles.rows();
        by_rows(rows, &|row| {
            for head in 0..heads {
                let mut key = part(row, head, nope, each - nope).to_f32(Isa::best());
                angles.rotate(row, &mut key);
                // SAFETY: the last R places of this row's and head's query, which no other row writes.
                #[allow(unsafe_code)]
                unsafe {
                    out.write((row * heads + head) * width + latent, &key);
                }
            }
        });
        queries
    }

    /// Sums of latents `[T, H, C]` to values `[T, H*V]`.
    fn raise_by_kernels(&self, sums: &[f32], kind: Kind) -> Tensor {
        let Shape { heads, latent, .. } = self.shape();
        let (rows, value) = (sums.len() / (heads * latent), self.value as usize);
        let values = Tensor::empty([rows as i64, (heads * value) as i64], (kind, Device::Cpu));
        let out = tensor::out(&values);
        let sum = |row: usize, head: usize| Rows::F32(&sums[(row * heads + head) * latent..][..latent]);
        self.per_head(&self.value_up, rows, &sum, (out, heads * value, value));
        values
    }

    /// Each head's rows by its own matrix, `weights` being `[H, out, inner]`; head h's go to columns from `h * each` on, of
    /// rows that are `stride` long.
    fn per_head<'a>(
        &self,
        weights: &Tensor,
        rows: usize,
        row: &(dyn Fn(usize, usize) -> Rows<'a> + Sync),
        (out, stride, each): (Out<'_>, usize, usize),
    ) {
        let size = weights.size();
        let [heads, columns, inner] = [size[0], size[1], size[2]].map(|size| size as usize);
        let (all, dtype) = (tensor::rows(weights), self.dtype());
        let matrices: Vec<Matrix<'_>> = (0..heads)
            .map(|head| {
                let values = match all.part(head * columns * inner, columns * inner) {
                    Rows::F32(values) => Values::F32(values),
                    Rows::Bf16(values) => Values::Bf16(values),
                };
                Matrix::new(values, columns, inner)
            })
            .collect();
        let operands: Vec<Operand> = matrices
            .iter()
            .enumerate()
            .map(|(head, matrix)| {
                let format = Format::of(Isa::best(), dtype, matrix);
                Operand::gathered(format, inner, Source { rows, row: &|t| row(t, head) })
            })
            .collect();
        let jobs: Vec<Job<'_>> = matrices
            .iter()
            .zip(&operands)
            .enumerate()
            .map(|(head, (matrix, x))| Job { x, matrix: *matrix, bias: None, out, stride, offset: head * each })
            .collect();
        // SAFETY: `out` has `rows` rows of `stride`, and each head has its own columns of them.
        #[allow(unsafe_code)]
        unsafe {
            products(Isa::best(), &jobs);
        }
    }

    fn dtype(&self) -> Dtype {
        if self.key_up.kind() == Kind::Float { Dtype::F32 } else { Dtype::Bf16 }
    }
}

/// `work(row)` for all rows, over the team where they are many.
fn by_rows(rows: usize, work: &(dyn Fn(usize) + Sync)) {
    team::run(rows.div_ceil(ROWS_AT_ONCE), &|part| {
        (part * ROWS_AT_ONCE..rows.min((part + 1) * ROWS_AT_ONCE)).for_each(work);
    });
}
