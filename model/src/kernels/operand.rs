//! The rows of a product, laid out as the kernel that takes them reads them. In: rows. Out: an [`Operand`]. Never here: a
//! sum.

use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error},
    ops::Range,
    ptr::NonNull,
};

use half::bf16;

use super::{
    isa::Isa,
    lanes,
    matrix::{Matrix, Values},
    rowwise, team,
};
use crate::device::Dtype;

/// Steps of tiles and pairs, in values of the inner dimension.
pub(super) const STEP: usize = 32;
/// Rows of an operand that one tile holds.
pub(super) const TILE_ROWS: usize = 16;
/// From this many rows on, the team lays them out.
const ROWS_FOR_TEAM: usize = 64;

/// How rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// f32 `[T, inner]`, rows padded with zeros; rounded to BF16 first where the model computes in that.
    Lanes { rounded: bool, order: Order },
    /// BF16 `[T, inner]`, rows padded with zeros to whole steps.
    Pairs,
    /// BF16 `[ceil(T / columns), steps, 16, columns, 2]`: what AMX wants of a right-hand side, pairs of the inner dimension
    /// from top to bottom, rows from left to right. `columns` is 16, or T where that is less.
    Tiles,
}

/// In which order the values of a row lie in lanes: as vectors of 32-bit words take a stored weight apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One a word: places 0, 1, 2, ...
    Plain,
    /// Two a word, BF16: of every 32 places 0, 2, 4, ..., then 1, 3, 5, ...
    Halves,
    /// Four a word, FP8: of every 64 places 0, 4, 8, ..., then 1, 5, 9, ..., and so on; and [`FOR_CODES`] times as large.
    Quarters,
}

impl Order {
    /// As `matrix` is taken apart. Blocks that are no whole chunks are made f32 value by value.
    pub(super) fn of(matrix: &Matrix<'_>) -> Self {
        match matrix.values {
            Values::Bf16(_) => Self::Halves,
            Values::Fp8 { block, .. } if block.is_multiple_of(lanes::CHUNK) => Self::Quarters,
            Values::F32(_) | Values::Fp8 { .. } => Self::Plain,
        }
    }
}

/// Words of one vector.
pub(super) const LANES: usize = 16;
/// How many times larger values are that meet codes of FP8, for those may come far too small, and products must not be. A power of
/// two, so that nothing is rounded.
pub(super) const FOR_CODES: f32 = (1u128 << 64) as f32;

impl Format {
    /// The one to multiply `matrix` with, on `isa`, for a model that computes in `dtype`.
    pub(crate) fn of(isa: Isa, dtype: Dtype, matrix: &Matrix<'_>) -> Self {
        let whole_steps = match matrix.values {
            Values::F32(_) => false,
            Values::Bf16(_) => true,
            Values::Fp8 { block, .. } => block.is_multiple_of(2 * STEP),
        };
        match (dtype, isa) {
            (Dtype::Bf16, Isa::Amx) if whole_steps => Self::Tiles,
            (Dtype::Bf16, Isa::Amx | Isa::Avx512Bf16) if whole_steps => Self::Pairs,
            (dtype, _) => Self::Lanes { rounded: dtype == Dtype::Bf16, order: Order::of(matrix) },
        }
    }
}

/// Rows `[T, inner]` as they come.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Rows<'a> {
    /// Values.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// As f32.
    pub(crate) fn to_f32(self, isa: Isa) -> Vec<f32> {
        match self {
            Self::F32(values) => values.to_vec(),
            Self::Bf16(values) => {
                let mut wide = vec![0.0; values.len()];
                rowwise::widen_all(isa, values, &mut wide);
                wide
            }
        }
    }

    /// `len` values from `start` on.
    pub(crate) fn part(&self, start: usize, len: usize) -> Self {
        match self {
            Self::F32(values) => Self::F32(&values[start..][..len]),
            Self::Bf16(values) => Self::Bf16(&values[start..][..len]),
        }
    }
}

/// Rows wherever they are.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    /// T
    pub(crate) rows: usize,
    /// The values of row t.
    pub(crate) row: &'a (dyn Fn(usize) -> Rows<'a> + Sync),
}

/// Rows in a [`Format`].
#[derive(Debug)]
pub(crate) struct Operand {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) inner: usize,
    memory: Memory,
}

impl Operand {
    /// To be written before it is read, wherever a row has a value; what pads rows is zero.
    pub(crate) fn empty(format: Format, rows: usize, inner: usize) -> Self {
        let padded = inner.next_multiple_of(2 * STEP);
        let bytes = match format {
            Format::Lanes { .. } => rows * padded * 4,
            Format::Pairs => rows * padded * 2,
            Format::Tiles => rows.next_multiple_of(columns(rows)) * padded * 2,
        };
        let full = match format {
            Format::Lanes { .. } | Format::Pairs => inner == padded,
            Format::Tiles => inner == padded && rows.is_multiple_of(columns(rows)),
        };
        Self { format, rows, inner, memory: if full { Memory::unwritten(bytes) } else { Memory::zeroed(bytes) } }
    }

    /// Panics where `rows` are not whole rows of `inner` values.
    pub(crate) fn of(format: Format, rows: Rows<'_>, inner: usize) -> Self {
        let len = rows.len();
        assert!(inner > 0 && len.is_multiple_of(inner), "{len} values are no rows of {inner}");
        Self::gathered(format, inner, Source { rows: len / inner, row: &|row| rows.part(row * inner, inner) })
    }

    /// Panics where a row is not `inner` values.
    pub(crate) fn gathered(format: Format, inner: usize, Source { rows, row }: Source<'_>) -> Self {
        let operand = Self::empty(format, rows, inner);
        let lay_out = |t: usize| {
            let values = row(t);
            assert_eq!(values.len(), inner, "a whole row");
            match values {
                Rows::F32(values) => operand.put(t, 0, values),
                Rows::Bf16(values) => operand.put_bf16(t, values),
            }
        };
        let group = |group: usize| {
            if !operand.lay_out_group(group, row) {
                (group * TILE_ROWS..rows.min((group + 1) * TILE_ROWS)).for_each(lay_out);
            }
        };
        let groups = rows.div_ceil(TILE_ROWS);
        if rows >= ROWS_FOR_TEAM {
            team::run(groups, &group);
        } else {
            (0..groups).for_each(group);
        }
        operand
    }

    /// A whole group of 16 rows into tiles at once; `false` where it is no such group, or rows are not whole steps.
    fn lay_out_group<'a>(&self, group: usize, row: &(dyn Fn(usize) -> Rows<'a> + Sync)) -> bool {
        let whole =
            self.format == Format::Tiles && self.inner.is_multiple_of(STEP) && (group + 1) * TILE_ROWS <= self.rows;
        if !whole {
            return false;
        }
        let lines: [Rows<'_>; TILE_ROWS] = std::array::from_fn(|line| row(group * TILE_ROWS + line));
        assert!(lines.iter().all(|line| line.len() == self.inner), "whole rows");
        #[cfg(target_arch = "x86_64")]
        for step in 0..self.inner / STEP {
            let to = self.tile(group, step).cast_mut();
            let (mut wide, mut half) = ([std::ptr::null(); TILE_ROWS], [std::ptr::null(); TILE_ROWS]);
            for (at, line) in lines.iter().enumerate() {
                match line {
                    Rows::F32(values) => wide[at] = values[step * STEP..].as_ptr(),
                    Rows::Bf16(values) => half[at] = values[step * STEP..].as_ptr(),
                }
            }
            // SAFETY: tiles are chosen only where the processor has them; every line has a whole step from there on, and
            // step `step` of the group is a tile of 1 KiB.
            unsafe {
                if half.iter().all(|line| line.is_null()) {
                    super::tiles::lay_out_f32(wide, to);
                } else if wide.iter().all(|line| line.is_null()) {
                    super::tiles::lay_out_bf16(half, to);
                } else {
                    return false;
                }
            }
        }
        true
    }

    /// Writes the lines of `values`, one per row of `rows` and `stride` apart, from `start` on: `len` of each. Of the operand's
    /// rows these are a [`view`](Self::view).
    pub(super) fn put_all(&self, rows: Range<usize>, (start, len): (usize, usize), values: &[f32], stride: usize) {
        let mut first = 0;
        #[cfg(target_arch = "x86_64")]
        if self.format == Format::Tiles && len == STEP && start.is_multiple_of(STEP) {
            while first + TILE_ROWS <= rows.len() && self.columns() == TILE_ROWS {
                let lines = std::array::from_fn(|line| values[(first + line) * stride..][..len].as_ptr());
                // SAFETY: as above.
                unsafe {
                    super::tiles::lay_out_f32(
                        lines,
                        self.tile((rows.start + first) / TILE_ROWS, start / STEP).cast_mut(),
                    );
                };
                first += TILE_ROWS;
            }
        }
        (first..rows.len()).for_each(|row| self.put(rows.start + row, start, &values[row * stride..][..len]));
    }

    /// Rows `rows` of it, which begin with a whole group where they do not begin with the first.
    pub(super) fn view(&self, rows: Range<usize>) -> View<'_> {
        debug_assert!(rows.start.is_multiple_of(TILE_ROWS) && rows.end <= self.rows);
        View { operand: self, first: rows.start, rows: rows.len() }
    }

    /// Rows of a tile.
    fn columns(&self) -> usize {
        columns(self.rows)
    }

    /// Values of a padded row.
    fn padded(&self) -> usize {
        self.inner.next_multiple_of(2 * STEP)
    }

    /// Where tile row group `group`, which has [`columns`](Self::columns) rows, begins at step `step`.
    fn tile(&self, group: usize, step: usize) -> *const u8 {
        let columns = self.columns();
        self.memory.start().wrapping_add((group * self.padded() / STEP + step) * columns * STEP * 2)
    }

    /// f32 values of `row`, in [`Format::Lanes`].
    fn lanes(&self, row: usize) -> *const f32 {
        self.memory.start().cast::<f32>().wrapping_add(row * self.padded())
    }

    /// BF16 values of `row`, in [`Format::Pairs`].
    fn pairs(&self, row: usize) -> *const bf16 {
        self.memory.start().cast::<bf16>().wrapping_add(row * self.padded())
    }

    /// Writes `values` into `row` from `start` on, which is even. Different stretches may be written by different threads
    /// at once; nobody may read meanwhile, nor may two write one stretch.
    pub(super) fn put(&self, row: usize, start: usize, values: &[f32]) {
        assert!(row < self.rows && start + values.len() <= self.inner, "a row of the operand");
        match self.format {
            Format::Lanes { rounded, order } => {
                // SAFETY: the row lies within the memory (checked above), which is the operand's own and is written through
                // raw pointers only; that stretches do not overlap between threads is the caller's.
                unsafe { put_lanes(self.lanes(row).cast_mut(), order, start, values, rounded) };
            }
            Format::Pairs => {
                let to = self.pairs(row).cast_mut().cast::<u16>().wrapping_add(start);
                // SAFETY: as above.
                let to = unsafe { std::slice::from_raw_parts_mut(to, values.len()) };
                to.iter_mut().zip(values).for_each(|(to, value)| *to = round(*value));
            }
            Format::Tiles => {
                let mut rounded = [0u16; 64];
                for (part, values) in values.chunks(rounded.len()).enumerate() {
                    rounded.iter_mut().zip(values).for_each(|(to, value)| *to = round(*value));
                    self.put_pairs(row, start + part * rounded.len(), &rounded[..values.len()]);
                }
            }
        }
    }

    fn put_bf16(&self, row: usize, values: &[bf16]) {
        match self.format {
            Format::Lanes { .. } => {
                let mut wide = [0f32; 64];
                for (part, values) in values.chunks(wide.len()).enumerate() {
                    wide.iter_mut().zip(values).for_each(|(to, value)| *to = widen(value.to_bits()));
                    self.put(row, part * wide.len(), &wide[..values.len()]);
                }
            }
            Format::Pairs => {
                // SAFETY: as in `put`; the row has at least as many values as are given.
                let to = unsafe { std::slice::from_raw_parts_mut(self.pairs(row).cast_mut(), self.inner) };
                to.copy_from_slice(values);
            }
            Format::Tiles => {
                // SAFETY: a BF16 number and a u16 have one layout.
                let bits = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u16>(), values.len()) };
                self.put_pairs(row, 0, bits);
            }
        }
    }

    /// Into tiles: pair p of a step goes to line p, at the row's place in it.
    fn put_pairs(&self, row: usize, start: usize, bits: &[u16]) {
        debug_assert!(start.is_multiple_of(2));
        let columns = self.columns();
        let (group, column) = (row / columns, row % columns);
        let to = self.tile(group, 0).cast_mut().cast::<u32>().wrapping_add(start / 2 * columns + column);
        let (pairs, rest) = bits.as_chunks::<2>();
        for (pair, bits) in pairs.iter().enumerate() {
            // SAFETY: pair `pair` of the row lies within the memory: the row and its values do (checked by `put`).
            unsafe { to.wrapping_add(pair * columns).write(u32::from(bits[0]) | u32::from(bits[1]) << 16) };
        }
        if let [last] = rest {
            // SAFETY: as above.
            unsafe { to.wrapping_add(pairs.len() * columns).write(u32::from(*last)) };
        }
    }
}

/// Some rows of an operand, numbered from 0: what a kernel multiplies.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    operand: &'a Operand,
    first: usize,
    pub(super) rows: usize,
}

impl View<'_> {
    pub(super) fn format(&self) -> Format {
        self.operand.format
    }

    pub(super) fn inner(&self) -> usize {
        self.operand.inner
    }

    pub(super) fn columns(&self) -> usize {
        self.operand.columns()
    }

    pub(super) fn padded(&self) -> usize {
        self.operand.padded()
    }

    pub(super) fn tile(&self, group: usize, step: usize) -> *const u8 {
        self.operand.tile(self.first / self.columns() + group, step)
    }

    pub(super) fn lanes(&self, row: usize) -> *const f32 {
        self.operand.lanes(self.first + row)
    }

    pub(super) fn pairs(&self, row: usize) -> *const bf16 {
        self.operand.pairs(self.first + row)
    }
}

/// Writes `values` where places `start..` of a row in lanes lie.
///
/// # Safety
/// The row has them, and nobody else touches them meanwhile.
unsafe fn put_lanes(row: *mut f32, order: Order, start: usize, values: &[f32], rounded: bool) {
    let value = |value: f32| if rounded { widen(round(value)) } else { value };
    // SAFETY: the caller's.
    unsafe {
        match order {
            Order::Plain => put_words::<1>(row, start, values, value),
            Order::Halves => put_words::<2>(row, start, values, value),
            Order::Quarters => put_words::<4>(row, start, values, |from| value(from) * FOR_CODES),
        }
    }
}

/// As [`put_lanes`], where a word holds `P` values.
///
/// # Safety
/// As [`put_lanes`]'s.
#[inline(always)]
unsafe fn put_words<const P: usize>(row: *mut f32, start: usize, values: &[f32], value: impl Fn(f32) -> f32) {
    let group = LANES * P;
    let before = (start.next_multiple_of(group) - start).min(values.len());
    let after = before + (values.len() - before) / group * group;
    for (nth, from) in values[before..after].chunks_exact(group).enumerate() {
        let to = row.wrapping_add(start + before + nth * group).cast::<[[f32; LANES]; P]>();
        // SAFETY: the caller's; so below.
        let to = unsafe { &mut *to };
        for (of_word, to) in to.iter_mut().enumerate() {
            to.iter_mut().enumerate().for_each(|(word, to)| *to = value(from[word * P + of_word]));
        }
    }
    // What is no whole group goes one by one.
    for at in (0..before).chain(after..values.len()) {
        let (first, within) = ((start + at) / group * group, (start + at) % group);
        // SAFETY: as above.
        unsafe { row.wrapping_add(first + within % P * LANES + within / P).write(value(values[at])) };
    }
}

fn columns(rows: usize) -> usize {
    rows.clamp(1, TILE_ROWS)
}

/// To the nearest BF16 number, ties to even; what is no number stays none.
#[inline(always)]
pub(crate) fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

#[inline(always)]
pub(crate) fn widen(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Memory that begins on a cache line.
#[derive(Debug)]
pub(super) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it is memory of its own, like a `Vec`'s; who writes to it when is `Operand::put`'s contract.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(super) fn zeroed(bytes: usize) -> Self {
        Self::of(bytes, alloc_zeroed)
    }

    /// Nobody may read what was not written before.
    fn unwritten(bytes: usize) -> Self {
        Self::of(bytes, alloc)
    }

    fn of(bytes: usize, allocate: unsafe fn(Layout) -> *mut u8) -> Self {
        let Ok(layout) = Layout::from_size_align(bytes.max(64), 64) else { panic!("{bytes} bytes are too many") };
        // SAFETY: the layout's size is not zero.
        let start = unsafe { allocate(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, layout }
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}
