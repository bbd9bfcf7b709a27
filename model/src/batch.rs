//! The rows of one forward pass, prepared once for all its layers: where they stand, where their latents go, and which of
//! them attention computes together.
//!
//! In: segments of sequences. Out: angles, slots and parts. Never here: hidden values; anything that differs by layer.

use std::{cell::OnceCell, collections::BTreeMap};

use tch::{Device, Kind, Tensor};

use crate::{
    cache::{BLOCK_TOKENS, Keys},
    device::Numerics,
    gpu::attention::{Lookup, SeenRow},
    rope::{Angles, Rope},
    transfer::placed,
};

/// Sequences with up to this many new rows each are left to our own kernels, or computed together with others of about their length.
const ROWS_TOGETHER: usize = 4;

/// A run of rows that belong to one sequence and follow what its blocks hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of this pass, at least one.
    pub rows: usize,
    /// Tokens that are in the cache already.
    pub start: usize,
    /// The sequence's table: token t is row t mod 64 of block `blocks[t / 64]`. Covers all rows.
    pub blocks: Vec<u32>,
}

/// A pass's rows, segment after segment.
#[derive(Debug)]
pub struct Batch {
    pub(crate) angles: Angles,
    /// Where each row's latent goes, `[T]`.
    pub(crate) slots: Vec<usize>,
    pub(crate) segments: Vec<Segment>,
    device: Device,
    numerics: Numerics,
    plan: OnceCell<Plan>,
}

/// How libtorch computes a pass's attention.
#[derive(Debug)]
pub(crate) struct Plan {
    /// As the batch's, `[T]`.
    pub(crate) slots: Tensor,
    pub(crate) parts: Vec<Part>,
    /// From the parts' rows, one part after the other, to the pass's; `None` where they are in order.
    pub(crate) order: Option<Tensor>,
}

/// Rows that attention computes in one go.
#[derive(Debug)]
pub(crate) enum Part {
    /// Those of all segments of few rows, for our own kernels.
    Few {
        /// Of the pass, `[n]`; `None` where they are all of them, in order.
        rows: Option<Tensor>,
        lookup: Lookup,
    },
    /// B segments of r rows each over tables of n blocks each, padded.
    Together {
        /// Of the pass, `[B*r]`.
        rows: Tensor,
        count: i64,
        /// `[B*n]`.
        blocks: Tensor,
        /// What row i of segment b may not see, `[B, 1, r, n*64]`.
        hidden: Tensor,
    },
    /// One segment.
    Alone {
        /// Its first row in the pass.
        first: i64,
        rows: i64,
        /// Rows in the cache before these.
        before: i64,
        keys: Keys,
    },
}

impl Batch {
    pub(crate) fn new(segments: &[Segment], rope: &Rope, device: Device, numerics: Numerics) -> Self {
        let positions: Vec<i64> = segments.iter().flat_map(|s| s.start..s.start + s.rows).map(|p| p as i64).collect();
        Self {
            angles: rope.angles(&positions),
            slots: segments.iter().flat_map(slots).collect(),
            segments: segments.to_vec(),
            device,
            numerics,
            plan: OnceCell::new(),
        }
    }

    /// Made when it is first asked for, once for all layers.
    /// `by_kernels`: our own compute what is few.
    pub(crate) fn plan(&self, by_kernels: bool) -> &Plan {
        self.plan.get_or_init(|| {
            let slots: Vec<i64> = self.slots.iter().map(|&slot| slot as i64).collect();
            let (parts, order) = divide(&self.segments, self.device, self.numerics, by_kernels);
            Plan { slots: placed(&slots, self.device), parts, order: order.map(|order| placed(&order, self.device)) }
        })
    }
}

fn slots(segment: &Segment) -> impl Iterator<Item = usize> + '_ {
    let slot = |token: usize| segment.blocks[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS + token % BLOCK_TOKENS;
    (segment.start..segment.start + segment.rows).map(slot)
}

/// Few rows go through our own kernels, where there are some. Else those over tables of about one length go together, so that a step of many sequences is a handful of products: a
/// table is padded to at most twice its size. Everything else is computed alone.
fn divide(segments: &[Segment], device: Device, numerics: Numerics, by_kernels: bool) -> (Vec<Part>, Option<Vec<i64>>) {
    let mut few: Vec<(&Segment, i64)> = Vec::new();
    let mut together: BTreeMap<(usize, u32), Vec<(&Segment, i64)>> = BTreeMap::new();
    let mut alone = Vec::new();
    let mut first = 0;
    for segment in segments {
        let blocks = (segment.start + segment.rows).div_ceil(BLOCK_TOKENS);
        if segment.rows > ROWS_TOGETHER || numerics != Numerics::Fast {
            alone.push((segment, first));
        } else if by_kernels {
            few.push((segment, first));
        } else {
            together.entry((segment.rows, blocks.next_power_of_two().ilog2())).or_default().push((segment, first));
        }
        first += segment.rows as i64;
    }
    let mut parts = Vec::new();
    let mut rows: Vec<i64> = Vec::new();
    if !few.is_empty() {
        rows.extend(few.iter().flat_map(|(segment, first)| *first..*first + segment.rows as i64));
        let all = few.len() == segments.len();
        parts.push(Part::Few { rows: (!all).then(|| placed(&rows, device)), lookup: lookup(&few, device) });
    }
    for group in together.into_values() {
        if let [one] = group[..] {
            alone.push(one);
            continue;
        }
        rows.extend(group.iter().flat_map(|(segment, first)| *first..*first + segment.rows as i64));
        parts.push(group_of(&group, device));
    }
    for (segment, first) in alone {
        rows.extend(first..first + segment.rows as i64);
        parts.push(Part::Alone {
            first,
            rows: segment.rows as i64,
            before: segment.start as i64,
            keys: keys(segment, device),
        });
    }
    let in_order = rows.iter().enumerate().all(|(place, row)| place as i64 == *row);
    let mut order = vec![0; rows.len()];
    for (place, row) in rows.into_iter().enumerate() {
        order[row as usize] = place as i64;
    }
    (parts, if in_order { None } else { Some(order) })
}

fn keys(segment: &Segment, device: Device) -> Keys {
    let needed = (segment.start + segment.rows).div_ceil(BLOCK_TOKENS);
    let blocks = &segment.blocks[..needed];
    if blocks.windows(2).all(|pair| pair[1] == pair[0] + 1) {
        return Keys::Run { first: blocks.first().map_or(0, |&first| i64::from(first)) };
    }
    let blocks: Vec<i64> = blocks.iter().map(|&block| i64::from(block)).collect();
    Keys::Table(placed(&blocks, device))
}

/// Of the rows of `few`, which come with the first row of each.
fn lookup(few: &[(&Segment, i64)], device: Device) -> Lookup {
    let seen = |(table, (segment, first)): (usize, &(&Segment, i64))| {
        let (start, first) = (segment.start, *first as usize);
        (0..segment.rows).map(move |row| SeenRow { table, keys: start + row + 1, row: first + row })
    };
    let rows: Vec<SeenRow> = few.iter().enumerate().flat_map(seen).collect();
    let tables =
        few.iter().map(|(segment, _)| &segment.blocks[..(segment.start + segment.rows).div_ceil(BLOCK_TOKENS)]);
    Lookup::new(&rows, &tables.collect::<Vec<_>>(), device)
}

fn group_of(group: &[(&Segment, i64)], device: Device) -> Part {
    let needed = |segment: &Segment| (segment.start + segment.rows).div_ceil(BLOCK_TOKENS);
    let most = group.iter().map(|(segment, _)| needed(segment)).max().unwrap_or(0);
    let (mut rows, mut blocks, mut last_seen) = (Vec::new(), Vec::new(), Vec::new());
    for (segment, first) in group {
        rows.extend(*first..*first + segment.rows as i64);
        let own = &segment.blocks[..needed(segment)];
        // Any block will do as padding; one that is there is in the cache's bounds.
        blocks.extend(own.iter().chain(std::iter::repeat(&own[0])).take(most).map(|&block| i64::from(block)));
        last_seen.extend((segment.start..segment.start + segment.rows).map(|row| row as i64));
    }
    let (count, each) = (group.len() as i64, group[0].0.rows as i64);
    let last_seen = placed(&last_seen, device).view([count, 1, each, 1]);
    let tokens = Tensor::arange((most * BLOCK_TOKENS) as i64, (Kind::Int64, device));
    Part::Together {
        rows: placed(&rows, device),
        count,
        blocks: placed(&blocks, device),
        hidden: tokens.gt_tensor(&last_seen),
    }
}
