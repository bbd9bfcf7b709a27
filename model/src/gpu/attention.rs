//! Attention of few rows by our own kernels on a GPU, `attention.cu`.
//!
//! In: what the projections made, and where rows and keys lie. Out: latents in the cache; sums of latents. Never here: a key
//! moved before it is read; rows of a long prompt, which share keys and are libtorch's.

use tch::{Kind, Tensor};

use super::{Error, Kernel, Module, PerGpu, argument};
use crate::{cache::BLOCK_TOKENS, device::Compute, transfer::placed};

/// Heads of a block of threads, and blocks of the cache that it goes through: as the kernels'.
const HEADS: usize = 16;
const SPAN: usize = 8;
/// Shared memory that a block of threads may have on every GPU since compute capability 8.0.
const MOST_SHARED: usize = 99 << 10;
/// Each of 8 warps sums up as many tiles of 8 latents.
const LATENTS: usize = 64;
const MOST_LATENTS: usize = 512;

/// A model's attention in numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sizes {
    pub(crate) heads: usize,
    pub(crate) nope: usize,
    pub(crate) rope: usize,
    pub(crate) latent: usize,
}

/// The rows that are computed, as kernels look them up.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// On the GPU, i64: as the kernels' `Row`, for each; then the tables.
    table: Tensor,
    rows: usize,
    /// Of the longest table.
    spans: usize,
    /// Spans of all rows that have more than one.
    parts: usize,
}

impl Lookup {
    /// Of rows that see so many keys by a table each, told by the nth of `tables`, and that are such rows of the pass.
    pub(crate) fn new(rows: &[SeenRow], tables: &[&[u32]], device: tch::Device) -> Self {
        /// Numbers of a row.
        const ROW: usize = 4;
        let mut begins = rows.len() * ROW;
        let mut first_of = |table: &&[u32]| {
            let first = begins;
            begins += table.len();
            first
        };
        let firsts: Vec<usize> = tables.iter().map(&mut first_of).collect();
        let (mut numbers, mut spans, mut parts) = (Vec::with_capacity(begins), 0, 0);
        for SeenRow { table, keys, row } in rows {
            numbers.extend([firsts[*table], *keys, *row, parts].map(|number| number as i64));
            let own = keys.div_ceil(BLOCK_TOKENS).div_ceil(SPAN);
            spans = spans.max(own);
            parts += if own > 1 { own } else { 0 };
        }
        numbers.extend(tables.iter().copied().flatten().map(|&block| i64::from(block)));
        Self { table: placed(&numbers, device), rows: rows.len(), spans, parts }
    }
}

/// One row of a [`Lookup`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct SeenRow {
    pub(crate) table: usize,
    pub(crate) keys: usize,
    pub(crate) row: usize,
}

/// The kernels of one GPU.
#[derive(Debug)]
pub(crate) struct Kernels {
    module: Module,
    remember: Kernel,
    attend: Kernel,
    combine: Kernel,
}

impl Kernels {
    /// Those for `compute`, see [`PerGpu::of`], where they can compute attention of these sizes.
    pub(crate) fn of(compute: Compute, sizes: Sizes) -> Option<&'static Self> {
        static COMPILED: PerGpu<Kernels> = PerGpu::new();
        let Sizes { nope, rope, latent, .. } = sizes;
        let suits = latent.is_multiple_of(LATENTS)
            && latent <= MOST_LATENTS
            && rope.is_multiple_of(16)
            && nope.is_multiple_of(8)
            && shared_bytes(sizes) <= MOST_SHARED;
        let kernels = || COMPILED.of(compute, Self::compile, "libtorch computes attention");
        if suits { kernels() } else { None }
    }

    fn compile(index: usize) -> Result<Self, Error> {
        let module = Module::compile(index, "attention.cu", include_str!("attention.cu"))?;
        Ok(Self {
            remember: module.kernel(c"remember")?,
            attend: module.kernel_with_shared(c"attend", MOST_SHARED)?,
            combine: module.kernel(c"combine")?,
            module,
        })
    }

    /// Norms the latents of `kv` `[T, C+R]` by `weight` `[C]` and `eps`, turns its keys and those of `q` `[T, H, N+R]`, in place,
    /// by `turns` f32 `[T, 1, R/2, 2]`, and puts latents and keys into rows `slots` `[T]` of `cache` `[., C+R]`.
    pub(crate) fn remember(
        &self,
        sizes: Sizes,
        [q, kv]: [&Tensor; 2],
        (weight, eps): (&Tensor, f32),
        (turns, interleaved): (&Tensor, bool),
        slots: &Tensor,
        cache: &Tensor,
    ) -> Result<(), Error> {
        let Sizes { heads, nope, rope, latent } = sizes;
        let rows = kv.size()[0] as usize;
        for (tensor, kind, values) in [
            (q, Kind::BFloat16, rows * heads * (nope + rope)),
            (kv, Kind::BFloat16, rows * (latent + rope)),
            (weight, Kind::BFloat16, latent),
            (turns, Kind::Float, rows * rope),
            (slots, Kind::Int64, rows),
        ] {
            assert!(tensor.is_contiguous() && tensor.kind() == kind && tensor.numel() == values, "{tensor:?}");
        }
        assert!(cache.is_contiguous() && cache.kind() == Kind::BFloat16);
        assert_eq!(cache.size().last(), Some(&((latent + rope) as i64)));
        let mut pointers = [q, kv, weight, turns, slots, cache].map(Tensor::data_ptr);
        let mut eps = eps;
        let mut numbers = [heads, nope, rope, latent, usize::from(interleaved)].map(|number| number as i32);
        let arguments = pointers.iter_mut().map(argument).chain([argument(&mut eps)]);
        let mut arguments: Vec<_> = arguments.chain(numbers.iter_mut().map(argument)).collect();
        // SAFETY: twelve values as the kernel declares them; sizes were checked above, and slots are places in the cache, as for
        // every way of computing.
        unsafe { self.module.launch(self.remember, [rows, 1, 1], &mut arguments) }
    }

    /// Of the rows in `lookup`: `queries` `[H, n, C]` of latents, and what of `q` `[T, H, N+R]` carries positions, over the keys
    /// in `cache`, to sums of latents `[H, n, C]`.
    pub(crate) fn attend(
        &self,
        sizes: Sizes,
        [queries, q]: [&Tensor; 2],
        scale: f64,
        lookup: &Lookup,
        cache: &Tensor,
    ) -> Result<Tensor, Error> {
        let Sizes { heads, nope, rope, latent } = sizes;
        let rows = lookup.rows;
        assert!(queries.is_contiguous() && queries.numel() == heads * rows * latent, "{queries:?}");
        assert!(q.numel() >= rows * heads * (nope + rope) && cache.size().last() == Some(&((latent + rope) as i64)));
        assert!([queries, q, cache].iter().all(|tensor| tensor.kind() == Kind::BFloat16 && tensor.is_contiguous()));
        let out = queries.empty_like();
        let spans = lookup.spans;
        let (apart, float) = ((lookup.parts * heads) as i64, (Kind::Float, q.device()));
        let parts = Tensor::empty([apart, latent as i64], float);
        let stats = Tensor::empty([apart, 2], float);
        let mut pointers = [queries, q, cache, &lookup.table, &out, &parts, &stats].map(Tensor::data_ptr);
        let mut scale = scale as f32;
        let mut numbers = [heads, nope, rope, latent].map(|number| number as i32);
        let arguments = pointers.iter_mut().map(argument).chain([argument(&mut scale)]);
        let mut arguments: Vec<_> = arguments.chain(numbers.iter_mut().map(argument)).collect();
        // SAFETY: twelve values as the kernel declares them; sizes were checked above, and tables hold blocks of the cache, as
        // for every way of computing.
        unsafe { self.module.launch(self.attend, [rows, heads.div_ceil(HEADS), spans], &mut arguments)? };
        if spans > 1 {
            let mut pointers = [&lookup.table, &parts, &stats, &out].map(Tensor::data_ptr);
            let mut latent = latent as i32;
            let mut arguments: Vec<_> = pointers.iter_mut().map(argument).chain([argument(&mut latent)]).collect();
            // SAFETY: five values as the kernel declares them, of what was written just now.
            unsafe { self.module.launch(self.combine, [rows, heads, 1], &mut arguments)? };
        }
        Ok(out)
    }
}

/// As `attend` divides it: keys, queries, weights, scores and three numbers a head.
fn shared_bytes(Sizes { rope, latent, .. }: Sizes) -> usize {
    let line = latent + rope + 8;
    2 * (BLOCK_TOKENS + HEADS) * line + 2 * HEADS * (BLOCK_TOKENS + 8) + 4 * HEADS * (BLOCK_TOKENS + 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_tells_each_row_its_table_its_keys_and_where_its_spans_go() {
        let (long, short): (Vec<u32>, Vec<u32>) = ((0..17).rev().collect(), vec![40]);
        // 17 blocks are 3 spans, 8 blocks are one.
        let rows = [(1, 30, 0), (0, 1030, 1), (0, 512, 2), (0, 1031, 3), (0, 513, 5)];
        let rows = rows.map(|(table, keys, row)| SeenRow { table, keys, row });
        let lookup = Lookup::new(&rows, &[&long, &short], tch::Device::Cpu);
        assert_eq!((lookup.rows, lookup.spans, lookup.parts), (5, 3, 3 + 3 + 2));
        let numbers = Vec::<i64>::try_from(&lookup.table).expect("i64");
        let (rows, tables) = numbers.split_at(5 * 4);
        let expected = [[37, 30, 0, 0], [20, 1030, 1, 0], [20, 512, 2, 3], [20, 1031, 3, 3], [20, 513, 5, 6]];
        assert_eq!(rows, expected.as_flattened());
        assert_eq!(tables, [long, short].concat().into_iter().map(i64::from).collect::<Vec<_>>());
    }
}
