//! Attention in the absorbed form over the latent cache, read in place. In: queries of latents, and each sequence's table of
//! blocks. Out: per row and head the weighted sum of latents. Never here: a key or a value built from a latent; scores of
//! more than one block kept; a row that sees another sequence's keys.
//!
//! Blocks are taken in the sequence's order with a running softmax (Milakov and Gimelshein, arXiv 1805.02867), in chunks of
//! a fixed number of blocks whose results are put together in order (flash-decoding does the same with chunks of any size).
//! A row's bits thus depend on its own keys alone: not on the rows beside it, nor on how many threads there are.

use std::ops::Range;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{
    isa::Isa,
    matrix::{Matrix, Values},
    operand::{Format, Memory, Operand, Order, Rows, Source, TILE_ROWS, round, widen},
    product::{STRIP, with_scratch},
    rowwise::{self, COLUMNS, Columns},
    team,
};
use crate::cache::BLOCK_TOKENS;

/// Blocks whose softmax runs through; what is longer is put together from such chunks.
const CHUNK_BLOCKS: usize = 4;
/// Queries (rows by heads) that share one reading of a block.
const QUERIES: usize = 64;
/// Heads of one task, at most.
const HEADS: usize = TILE_ROWS;

/// A layer's blocks, `[blocks, 64, C+R]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Blocks<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// Sizes of one layer's attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// H
    pub(crate) heads: usize,
    /// C
    pub(crate) latent: usize,
    /// C+R
    pub(crate) width: usize,
    /// On scores.
    pub(crate) scale: f32,
}

/// A run of rows of one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<'a> {
    /// Its first row among the queries.
    pub(crate) first: usize,
    pub(crate) rows: usize,
    /// Keys before those of these rows.
    pub(crate) before: usize,
    /// Token t's key is row t mod 64 of block `table[t / 64]`.
    pub(crate) table: &'a [u32],
}

/// Rows of a span and heads that one thread computes, over all their blocks or over one chunk.
#[derive(Clone, Copy)]
struct Task {
    span: usize,
    rows: (usize, usize),
    heads: (usize, usize),
    /// `None`: all chunks.
    chunk: Option<usize>,
}

/// What a softmax has come to, for each of a task's queries.
struct Running {
    largest: Vec<f32>,
    total: Vec<f32>,
    /// `[queries rounded up to 16, C]`
    sums: Vec<f32>,
}

/// Queries `[T, H, C+R]` to `[T, H, C]`.
pub(crate) fn attend(isa: Isa, shape: Shape, blocks: Blocks<'_>, queries: &[f32], spans: &[Span<'_>]) -> Vec<f32> {
    let rows: usize = spans.iter().map(|span| span.rows).sum();
    assert_eq!(queries.len(), rows * shape.heads * shape.width, "a query per row and head");
    let format = blocks.format(isa, shape);
    let tasks = divide(shape, format, spans);
    let mut out = vec![0.0f32; rows * shape.heads * shape.latent];
    let place = Place(out.as_mut_ptr());
    let found: Vec<parking_lot::Mutex<Option<Running>>> = tasks.iter().map(|_| parking_lot::Mutex::new(None)).collect();
    team::run(tasks.len(), &|index| {
        let task = tasks[index];
        let span = spans[task.span];
        let computed = compute(isa, shape, (blocks, format), queries, span, task);
        match task.chunk {
            None => place.put(shape, span, task, &computed),
            Some(_) => *found[index].lock() = Some(computed),
        }
    });
    // Chunks of one place stand one after the other.
    let mut running: Option<Running> = None;
    for (index, task) in tasks.iter().enumerate() {
        let Some(chunk) = task.chunk else { continue };
        let Some(computed) = found[index].lock().take() else { continue };
        running = match running.take() {
            Some(mut before) if chunk > 0 => {
                before.join(isa, &computed, shape.latent);
                Some(before)
            }
            _ => Some(computed),
        };
        let last = tasks.get(index + 1).is_none_or(|next| next.chunk.is_none_or(|next| next == 0));
        if let (true, Some(running)) = (last, &running) {
            place.put(shape, spans[task.span], *task, running);
        }
    }
    out
}

/// Where `[T, H, C]` goes; tasks write to different rows or heads of it.
struct Place(*mut f32);

// SAFETY: it is written to by tasks that do not overlap, while `attend` keeps the memory.
unsafe impl Send for Place {}
// SAFETY: as above.
unsafe impl Sync for Place {}

impl Place {
    fn put(&self, shape: Shape, span: Span<'_>, task: Task, running: &Running) {
        let heads = task.heads.1 - task.heads.0;
        for row in task.rows.0..task.rows.1 {
            for head in 0..heads {
                let query = (row - task.rows.0) * heads + head;
                let at = ((span.first + row) * shape.heads + task.heads.0 + head) * shape.latent;
                let sums = &running.sums[query * shape.latent..][..shape.latent];
                // SAFETY: row `span.first + row` and head are of the output, and this task's alone.
                let to = unsafe { std::slice::from_raw_parts_mut(self.0.add(at), shape.latent) };
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum / running.total[query]);
            }
        }
    }
}

fn divide(shape: Shape, format: Format, spans: &[Span<'_>]) -> Vec<Task> {
    let threads = team::threads();
    let rows_at_once = (QUERIES / shape.heads.min(HEADS)).max(1);
    let groups = |span: &Span<'_>| span.rows.div_ceil(rows_at_once) * shape.heads.div_ceil(HEADS);
    // Where there is too little to go round, chunks are computed side by side; and fewer heads at once, unless that many
    // take as long as all.
    let few = spans.iter().map(groups).sum::<usize>() < 2 * threads;
    let fewer = shape.heads.div_ceil(threads).min(HEADS);
    let mut tasks = Vec::new();
    for (index, span) in spans.iter().enumerate() {
        for first in (0..span.rows).step_by(rows_at_once) {
            let rows = (first, span.rows.min(first + rows_at_once));
            let chunks = (span.before + rows.1).div_ceil(BLOCK_TOKENS * CHUNK_BLOCKS);
            let at_once = if few && chunks < 2 * threads && format != Format::Tiles { fewer } else { HEADS };
            for head in (0..shape.heads).step_by(at_once) {
                let heads = (head, shape.heads.min(head + at_once));
                let task = |chunk| Task { span: index, rows, heads, chunk };
                if few && chunks > 1 {
                    tasks.extend((0..chunks).map(|chunk| task(Some(chunk))));
                } else {
                    tasks.push(task(None));
                }
            }
        }
    }
    tasks
}

fn compute(
    isa: Isa,
    shape: Shape,
    (blocks, format): (Blocks<'_>, Format),
    queries: &[f32],
    span: Span<'_>,
    task: Task,
) -> Running {
    let (first, last) = task.rows;
    let heads = task.heads.1 - task.heads.0;
    let q = |query: usize| {
        let (row, head) = (first + query / heads, task.heads.0 + query % heads);
        let at = ((span.first + row) * shape.heads + head) * shape.width;
        Rows::F32(&queries[at..][..shape.width])
    };
    let x = Operand::gathered(format, shape.width, Source { rows: (last - first) * heads, row: &q });
    let all = (span.before + last).div_ceil(BLOCK_TOKENS);
    let chunk = |number: usize| number * CHUNK_BLOCKS..all.min((number + 1) * CHUNK_BLOCKS);
    let queries = Queries { isa, shape, blocks, span, x, first, heads };
    match task.chunk {
        Some(number) => queries.chunk(chunk(number)),
        None => {
            let mut running = queries.chunk(chunk(0));
            for number in 1..all.div_ceil(CHUNK_BLOCKS) {
                running.join(isa, &queries.chunk(chunk(number)), shape.latent);
            }
            running
        }
    }
}

/// A task's queries, laid out.
struct Queries<'a> {
    isa: Isa,
    shape: Shape,
    blocks: Blocks<'a>,
    span: Span<'a>,
    x: Operand,
    /// Row of the span that the first of them belongs to.
    first: usize,
    heads: usize,
}

impl Queries<'_> {
    /// The softmax over the span's blocks `chunk`, from nothing.
    fn chunk(&self, chunk: Range<usize>) -> Running {
        let Self { isa, shape, span, .. } = *self;
        let queries = self.x.rows;
        let padded = queries.next_multiple_of(TILE_ROWS);
        let mut running = Running {
            largest: vec![f32::NEG_INFINITY; queries],
            total: vec![0.0; queries],
            sums: vec![0.0; padded * shape.latent],
        };
        let mut scores = vec![[0.0f32; BLOCK_TOKENS]; queries];
        let mut values = BlockValues::new(self.x.format, padded, shape);
        // The last row sees the most keys.
        let last = span.before + self.first + queries / self.heads;
        for number in chunk {
            let (block, next) = (span.table[number], span.table.get(number + 1));
            // Tiles read all 64 rows, and take as long for fewer.
            let most = match self.x.format {
                Format::Tiles => BLOCK_TOKENS,
                _ => (last - number * BLOCK_TOKENS).min(BLOCK_TOKENS),
            };
            self.score((block, most), next, &mut scores);
            for (query, scores) in scores.iter_mut().enumerate() {
                // Row t sees the keys before it and its own.
                let keys = span.before + self.first + query / self.heads + 1;
                let seen = keys.saturating_sub(number * BLOCK_TOKENS).min(BLOCK_TOKENS);
                let mut state = [running.largest[query], running.total[query], 1.0];
                rowwise::softmax_on(isa, scores, seen, shape.scale, &mut state);
                let [largest, total, correction] = state;
                (running.largest[query], running.total[query]) = (largest, total);
                if correction != 1.0 {
                    rowwise::scale(isa, &mut running.sums[query * shape.latent..][..shape.latent], correction);
                }
            }
            values.add(isa, self.blocks.keys(shape.width, block, most), &mut scores, shape, &mut running.sums);
        }
        running
    }

    /// All queries by the first `keys` keys of `block`; scores of the others mean nothing.
    fn score(&self, (block, keys): (u32, usize), next: Option<&u32>, scores: &mut [[f32; BLOCK_TOKENS]]) {
        let width = self.shape.width;
        let of = |block: u32| Matrix::new(self.blocks.keys(width, block, keys), keys, width);
        let lines = of(block);
        let next = next.map_or(std::ptr::null(), |next| of(*next).row(0));
        with_scratch(|scratch| {
            for strip in 0..keys.div_ceil(STRIP) {
                // While this is multiplied, the same part of the next block is fetched.
                let ahead = if next.is_null() { next } else { next.wrapping_add(strip * STRIP * lines.row_bytes()) };
                let products = scratch.strip(self.isa, &lines, strip, ahead, &self.x.view(0..self.x.rows));
                for (scores, products) in scores.iter_mut().zip(products.chunks_exact(STRIP)) {
                    scores[strip * STRIP..][..STRIP].copy_from_slice(products);
                }
            }
        });
    }
}

impl Running {
    /// Adds what came of the next chunk.
    fn join(&mut self, isa: Isa, next: &Self, latent: usize) {
        for query in 0..self.total.len() {
            let largest = self.largest[query].max(next.largest[query]);
            // By how much each must shrink; what saw nothing has nothing to shrink.
            let mut by = [self.largest[query], next.largest[query]];
            rowwise::exp_less(isa, &mut by, largest);
            let sums = &mut self.sums[query * latent..][..latent];
            if by[0] != 1.0 {
                rowwise::scale(isa, sums, by[0]);
            }
            rowwise::add_times(isa, sums, by[1], &next.sums[query * latent..][..latent]);
            self.total[query] = self.total[query] * by[0] + next.total[query] * by[1];
            self.largest[query] = largest;
        }
    }
}

/// A block's latents, laid out to be weighed.
enum BlockValues {
    /// In pairs, and room for the weights in BF16.
    #[cfg(target_arch = "x86_64")]
    Tiles { pairs: Memory, weights: Vec<u16> },
    /// Some columns at a time, as f32.
    Lanes { keys: Box<Columns>, rounded: bool },
}

impl BlockValues {
    fn new(format: Format, padded: usize, shape: Shape) -> Self {
        match format {
            #[cfg(target_arch = "x86_64")]
            Format::Tiles => Self::Tiles {
                pairs: Memory::zeroed(BLOCK_TOKENS * shape.latent * 2),
                weights: vec![0; padded * BLOCK_TOKENS],
            },
            format => Self::Lanes {
                keys: Box::new([[0.0; COLUMNS]; BLOCK_TOKENS]),
                rounded: !matches!(format, Format::Lanes { rounded: false, .. }),
            },
        }
    }

    /// `sums += weights * latents`, for all queries; what weighs nothing in all of them need not be there. Weights are rounded
    /// as the products' operands are.
    fn add(
        &mut self,
        isa: Isa,
        block: Values<'_>,
        weights: &mut [[f32; BLOCK_TOKENS]],
        shape: Shape,
        sums: &mut [f32],
    ) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Tiles { pairs, weights: rounded } => {
                let Values::Bf16(rows) = block else { unreachable!("only BF16 is multiplied in tiles") };
                assert_eq!(rows.len(), BLOCK_TOKENS * shape.width, "a whole block");
                for (to, weights) in rounded.chunks_exact_mut(BLOCK_TOKENS).zip(weights) {
                    to.iter_mut().zip(weights).for_each(|(to, weight)| *to = round(*weight));
                }
                // SAFETY: tiles are chosen only where the processor has them; a block has 64 rows, and every 16 queries
                // have their lines in `rounded` and `sums`, which are padded to that.
                unsafe {
                    tiles::pair_rows(rows.as_ptr(), shape.width, shape.latent, pairs.start().cast());
                    for group in 0..rounded.len() / (TILE_ROWS * BLOCK_TOKENS) {
                        let weights = rounded[group * TILE_ROWS * BLOCK_TOKENS..].as_ptr();
                        let sums = sums[group * TILE_ROWS * shape.latent..].as_mut_ptr();
                        tiles::weigh(weights, pairs.start().cast(), shape.latent, sums);
                    }
                }
            }
            Self::Lanes { keys, rounded } => {
                if *rounded {
                    weights.as_flattened_mut().iter_mut().for_each(|weight| *weight = widen(round(*weight)));
                }
                for first in (0..shape.latent).step_by(COLUMNS) {
                    let columns = first..shape.latent.min(first + COLUMNS);
                    match block {
                        Values::F32(rows) => {
                            for (key, row) in keys.iter_mut().zip(rows.chunks_exact(shape.width)) {
                                key[..columns.len()].copy_from_slice(&row[columns.clone()]);
                            }
                        }
                        Values::Bf16(rows) => {
                            rowwise::widen_columns(isa, rows, shape.width, columns.clone(), keys);
                        }
                        Values::Fp8 { .. } => unreachable!("a cache holds no FP8"),
                    }
                    rowwise::weigh(isa, sums, shape.latent, columns, weights, keys);
                }
            }
        }
    }
}

impl<'a> Blocks<'a> {
    fn dtype(&self) -> crate::device::Dtype {
        match self {
            Self::F32(_) => crate::device::Dtype::F32,
            Self::Bf16(_) => crate::device::Dtype::Bf16,
        }
    }

    /// How queries are laid out to be multiplied with them.
    fn format(&self, isa: Isa, shape: Shape) -> Format {
        let example = Matrix { values: self.keys(shape.width, 0, BLOCK_TOKENS), out: BLOCK_TOKENS, inner: shape.width };
        match Format::of(isa, self.dtype(), &example) {
            Format::Tiles if !shape.latent.is_multiple_of(TILE_ROWS) => {
                Format::Lanes { rounded: true, order: Order::Halves }
            }
            format => format,
        }
    }

    /// The first `keys` of a block, `[keys, C+R]`.
    fn keys(&self, width: usize, block: u32, keys: usize) -> Values<'a> {
        let (start, len) = (block as usize * BLOCK_TOKENS * width, keys * width);
        match self {
            Self::F32(values) => Values::F32(&values[start..][..len]),
            Self::Bf16(values) => Values::Bf16(&values[start..][..len]),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::product::tests::numbers, *};

    const WIDTH_MORE: usize = 8;

    /// Softmax and sum in f64, one query.
    fn plainly(q: &[f32], keys: &[&[f32]], shape: Shape) -> Vec<f64> {
        let dot = |key: &[f32]| q.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
        let scores: Vec<f64> = keys.iter().map(|key| dot(key) * f64::from(shape.scale)).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        (0..shape.latent)
            .map(|at| weights.iter().zip(keys).map(|(w, key)| w * f64::from(key[at])).sum::<f64>() / total)
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_row_is_what_the_formula_says_and_the_same_in_any_company(
            seed: u64,
            heads in 1usize..20,
            latent in prop::sample::select(vec![16usize, 48, 20]),
            before in 0usize..2200,
            rows in 1usize..9,
            f32_cache: bool,
        ) {
            team::gather(2);
            let shape = Shape { heads, latent, width: latent + WIDTH_MORE, scale: 0.7 };
            let blocks = (before + rows).div_ceil(BLOCK_TOKENS) + 2;
            let mut cache = numbers(seed, blocks * BLOCK_TOKENS * shape.width);
            let mut queries = numbers(!seed, rows * heads * shape.width);
            let halves: Vec<bf16> = cache.iter().map(|value| bf16::from_f32(*value)).collect();
            if !f32_cache {
                cache.iter_mut().zip(&halves).for_each(|(wide, half)| *wide = half.to_f32());
                queries.iter_mut().for_each(|q| *q = bf16::from_f32(*q).to_f32());
            }
            // From the last block to the first.
            let table: Vec<u32> = (0..blocks as u32).rev().collect();
            let key = |token: usize| {
                let row = table[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS + token % BLOCK_TOKENS;
                &cache[row * shape.width..][..shape.width]
            };
            let stored = if f32_cache { Blocks::F32(&cache) } else { Blocks::Bf16(&halves) };
            for isa in Isa::available() {
                let span = Span { first: 0, rows, before, table: &table };
                let together = attend(isa, shape, stored, &queries, &[span]);
                for row in [0, rows - 1] {
                    let keys: Vec<&[f32]> = (0..=before + row).map(key).collect();
                    let at = row * heads * shape.width;
                    let right = plainly(&queries[at..][..shape.width], &keys, shape);
                    let ours = &together[row * heads * latent..][..latent];
                    let bound = if f32_cache { 2e-5 } else { 8e-3 };
                    for (ours, right) in ours.iter().zip(&right) {
                        prop_assert!((f64::from(*ours) - right).abs() < bound, "{isa:?}: {ours} {right}");
                    }
                    let span = Span { first: 0, rows: 1, before: before + row, table: &table };
                    let alone = attend(isa, shape, stored, &queries[at..][..heads * shape.width], &[span]);
                    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    prop_assert_eq!(bits(&alone), bits(&together[row * heads * latent..][..heads * latent]), "{:?}", isa);
                }
            }
        }
    }
}
