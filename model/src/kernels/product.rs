//! `y = x W^T + b` over a team. In: an operand and a matrix. Out: f32 or BF16 rows where the caller wants them. Never here:
//! how a strip is summed.

use std::{cell::RefCell, ops::Range};

use half::bf16;

use super::{
    grown,
    isa::Isa,
    lanes,
    matrix::Matrix,
    operand::{Format, Operand, Rows, TILE_ROWS, View, round},
    team,
};
#[cfg(target_arch = "x86_64")]
use super::{pairs, tiles};

/// Outputs that are computed together.
pub(super) const STRIP: usize = lanes::STRIP;
/// Strips that one thread takes at once, at most: what it reads next it can have fetched.
const MOST_STRIPS: usize = 8;
/// Rows that one thread takes at once, at most: they and their strips' weights stay in a core's own cache.
const MOST_ROWS: usize = 256;
/// A product of less is done where it is asked for: waking others takes longer.
const BYTES_FOR_TEAM: usize = 64 * 1024;

/// Where rows `[T, out]` go.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Out<'a> {
    /// One after the other.
    F32(*mut f32),
    Bf16(*mut bf16),
    /// Each where its own pointer says.
    Scattered(&'a [*mut f32]),
}

// SAFETY: tasks write to parts of it that do not overlap; whoever makes one keeps the memory to himself meanwhile.
unsafe impl Send for Out<'_> {}
// SAFETY: as above.
unsafe impl Sync for Out<'_> {}

/// One product: rows of `x` by `matrix`, and `bias` `[out]` added where there is one. Row t goes to `out` from
/// `t * stride + offset` on, or from `offset` on where it has a place of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) x: &'a Operand,
    pub(crate) matrix: Matrix<'a>,
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) out: Out<'a>,
    pub(crate) stride: usize,
    pub(crate) offset: usize,
}

/// Does all of `jobs`, side by side.
///
/// # Safety
/// Every job's `out` has room for its rows, which no other job and nobody else touches meanwhile.
pub(crate) unsafe fn products(isa: Isa, jobs: &[Job<'_>]) {
    let work: Vec<Work> = jobs.iter().map(|job| Work::of(&job.matrix, job.x, jobs.len())).collect();
    run_all(&work, &|index, strips, rows| {
        let Job { x, matrix, bias, out, stride, offset } = jobs[index];
        with_scratch(|scratch| {
            fetch_first(&matrix, &strips, x);
            for strip in strips.clone() {
                let next = following(&matrix, strip, &strips);
                let (first, outs) = place(strip, matrix.out);
                let y = scratch.strip(isa, &matrix, strip, next, &x.view(rows.clone()));
                for (row, y) in rows.clone().zip(y.chunks_exact_mut(STRIP)) {
                    let y = &mut y[..outs];
                    if let Some(bias) = bias {
                        y.iter_mut().zip(&bias[first..]).for_each(|(y, bias)| *y += bias);
                    }
                    // SAFETY: row `row`, outputs `first..first + outs`: within `out`, and this task's alone.
                    unsafe { out.write_row(row, stride, offset + first, y) };
                }
            }
        });
    });
}

/// Where the strip after `strip` lies, if it is of the same run.
pub(super) fn following(matrix: &Matrix<'_>, strip: usize, strips: &Range<usize>) -> *const u8 {
    if strip + 1 < strips.end { matrix.row((strip + 1) * STRIP) } else { std::ptr::null() }
}

/// Has the beginning of a run brought nearer, all at once: nobody has done so while computing what was before it. Of many
/// rows it does not matter.
pub(super) fn fetch_first(matrix: &Matrix<'_>, strips: &Range<usize>, x: &Operand) {
    #[cfg(target_arch = "x86_64")]
    if x.rows <= TILE_ROWS {
        let (first, outs) = place(strips.start, matrix.out);
        let strip = outs * matrix.row_bytes();
        // Vectors fetch for themselves from there on.
        let bytes = if let Format::Lanes { .. } = x.format { strip.min(lanes::AHEAD) } else { strip };
        tiles::fetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(matrix.row(first), bytes / 64);
    }
}

/// Strips of a job and rows of it.
type Task<'a> = dyn Fn(usize, Range<usize>, Range<usize>) + Sync + 'a;

/// Does every job's runs of strips and rows, each once.
pub(super) fn run_all(work: &[Work], task: &Task<'_>) {
    let runs: usize = work.iter().map(Work::runs).sum();
    let bytes: usize = work.iter().map(|work| work.bytes).sum();
    let one = |mut run: usize| {
        for (index, work) in work.iter().enumerate() {
            if run < work.runs() {
                return task(index, work.strips(run), work.rows(run));
            }
            run -= work.runs();
        }
    };
    // Waking others takes longer than a small product.
    if bytes < BYTES_FOR_TEAM { (0..runs).for_each(one) } else { team::run(runs, &one) }
}

impl Out<'_> {
    /// Of row `row`, from `at` on.
    ///
    /// # Safety
    /// `values` fit in there, and nobody else touches that meanwhile.
    #[inline]
    pub(crate) unsafe fn write_row(self, row: usize, stride: usize, at: usize, values: &[f32]) {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::Scattered(rows) => Self::F32(rows[row]).write(at, values),
                flat => flat.write(row * stride + at, values),
            }
        }
    }

    /// From `at` on; to memory that is not scattered.
    ///
    /// # Safety
    /// As [`write_row`](Self::write_row)'s.
    #[inline]
    pub(crate) unsafe fn write(self, at: usize, values: &[f32]) {
        // SAFETY: the caller's; a BF16 number and a u16 have one layout.
        unsafe {
            match self {
                Self::F32(to) => std::ptr::copy_nonoverlapping(values.as_ptr(), to.add(at), values.len()),
                Self::Bf16(to) => {
                    let to = std::slice::from_raw_parts_mut(to.add(at).cast::<u16>(), values.len());
                    to.iter_mut().zip(values).for_each(|(to, value)| *to = round(*value));
                }
                Self::Scattered(_) => unreachable!("scattered rows are written by row"),
            }
        }
    }

    /// As they are, from `at` on; to memory of their format.
    ///
    /// # Safety
    /// As [`write_row`](Self::write_row)'s.
    pub(super) unsafe fn copy(self, at: usize, values: Rows<'_>) {
        // SAFETY: the caller's.
        unsafe {
            match (self, values) {
                (Self::F32(to), Rows::F32(from)) => from.as_ptr().copy_to_nonoverlapping(to.add(at), from.len()),
                (Self::Bf16(to), Rows::Bf16(from)) => from.as_ptr().copy_to_nonoverlapping(to.add(at), from.len()),
                _ => unreachable!("a copy changes no format"),
            }
        }
    }
}

/// The first output of a strip, and how many it has.
pub(super) fn place(strip: usize, out: usize) -> (usize, usize) {
    let first = strip * STRIP;
    (first, STRIP.min(out - first))
}

/// Strips and rows of one job, divided into runs that threads take.
pub(super) struct Work {
    strips: usize,
    run: usize,
    rows: usize,
    /// What is read for it, counted anew for every 16 rows.
    bytes: usize,
}

impl Work {
    /// For a product of the rows of `x`, one of `jobs`.
    pub(super) fn of(matrix: &Matrix<'_>, x: &Operand, jobs: usize) -> Self {
        let (strips, rows) = (matrix.out.div_ceil(STRIP), x.rows);
        // Some runs a thread: who is late leaves his to others, and three of one size are no two halves. Tiles begin each by
        // waiting for a whole strip, vectors hardly wait.
        let each = if let Format::Lanes { .. } = x.format { 4 } else { 2 };
        let runs = (each * team::threads()).div_ceil(jobs);
        let most = if rows > TILE_ROWS { MOST_STRIPS } else { strips };
        Self {
            strips,
            run: (strips / runs).clamp(1, most.max(1)),
            rows,
            bytes: matrix.out * matrix.row_bytes() * rows.div_ceil(16),
        }
    }

    fn runs(&self) -> usize {
        self.strips.div_ceil(self.run) * self.rows.div_ceil(MOST_ROWS)
    }

    /// All rows of one run of strips follow each other.
    fn strips(&self, run: usize) -> Range<usize> {
        let first = run / self.rows.div_ceil(MOST_ROWS) * self.run;
        first..self.strips.min(first + self.run)
    }

    fn rows(&self, run: usize) -> Range<usize> {
        let first = run % self.rows.div_ceil(MOST_ROWS) * MOST_ROWS;
        first..self.rows.min(first + MOST_ROWS)
    }
}

/// What a thread keeps from product to product.
pub(super) struct Scratch {
    y: Vec<f32>,
    decoded: Vec<u16>,
    room: Vec<f32>,
    #[cfg(target_arch = "x86_64")]
    tiles: tiles::Scratch,
}

impl Scratch {
    /// Strip `strip` of `x W^T`, `[T, 32]`; `next` is where what will be asked for after it lies, or null.
    pub(super) fn strip(
        &mut self,
        isa: Isa,
        matrix: &Matrix<'_>,
        strip: usize,
        next: *const u8,
        x: &View<'_>,
    ) -> &mut [f32] {
        assert_eq!(x.inner(), matrix.inner, "a row as long as the weight's");
        let (first, outs) = place(strip, matrix.out);
        let y = grown(&mut self.y, x.rows * STRIP);
        #[cfg(target_arch = "x86_64")]
        match x.format() {
            // SAFETY: only asked for where the processor has it (`Format::of` goes by an `Isa`); sizes as asserted.
            Format::Tiles => unsafe {
                tiles::strip(matrix, first, outs, x, y, &mut self.tiles, next);
            },
            // SAFETY: as above.
            Format::Pairs => unsafe { pairs::strip(matrix, first, outs, x, y, &mut self.decoded) },
            Format::Lanes { .. } => lanes::strip(isa, matrix, first, outs, x, y, &mut self.room),
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (next, &self.decoded);
            lanes::strip(isa, matrix, first, outs, x, y, &mut self.room);
        }
        y
    }
}

thread_local! {
    static SCRATCH: RefCell<[Scratch; 2]> = RefCell::new(std::array::from_fn(|_| Scratch {
        y: Vec::new(),
        decoded: Vec::new(),
        room: Vec::new(),
        #[cfg(target_arch = "x86_64")]
        tiles: tiles::Scratch::new(),
    }));
}

pub(super) fn with_scratch<T>(work: impl FnOnce(&mut Scratch) -> T) -> T {
    SCRATCH.with_borrow_mut(|[scratch, _]| work(scratch))
}

/// For two strips at once.
pub(super) fn with_two<T>(work: impl FnOnce(&mut Scratch, &mut Scratch) -> T) -> T {
    SCRATCH.with_borrow_mut(|[one, two]| work(one, two))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::{super::operand::Rows, super::reference, *};
    use crate::{checkpoint::fp8::encode_e4m3, device::Dtype, kernels::matrix::Values};

    /// Weights in one stored format.
    #[derive(Debug, Clone)]
    pub(in crate::kernels) enum Stored {
        F32(Vec<f32>),
        Bf16(Vec<bf16>),
        /// Codes, scales, and the size of their blocks.
        Fp8(Vec<u8>, Vec<f32>, usize),
    }

    impl Stored {
        pub(in crate::kernels) fn matrix(&self, out: usize, inner: usize) -> Matrix<'_> {
            let values = match self {
                Self::F32(values) => Values::F32(values),
                Self::Bf16(values) => Values::Bf16(values),
                Self::Fp8(codes, scales, block) => Values::Fp8 { codes, scales, block: *block },
            };
            Matrix::new(values, out, inner)
        }
    }

    pub(in crate::kernels) fn stored(values: &[f32], out: usize, inner: usize, which: usize) -> Stored {
        match which {
            0 => Stored::F32(values.to_vec()),
            1 => Stored::Bf16(values.iter().map(|value| bf16::from_f32(*value)).collect()),
            _ => {
                let block = [128, 64, 256][which - 2];
                let scales = (0..out.div_ceil(block) * inner.div_ceil(block)).map(|block| 0.25 + block as f32 * 0.37);
                Stored::Fp8(values.iter().map(|value| encode_e4m3(value * 3.0)).collect(), scales.collect(), block)
            }
        }
    }

    /// Numbers between -1 and 1, and some that are small or zero.
    pub(in crate::kernels) fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        (0..count)
            .map(|_| match (next() * 16.0) as u32 {
                0 => 0.0,
                1 => (next() - 0.5) * 1e-2,
                _ => next() * 2.0 - 1.0,
            })
            .collect()
    }

    fn multiply(isa: Isa, dtype: Dtype, x: &[f32], matrix: &Matrix<'_>, bias: Option<&[f32]>) -> Vec<f32> {
        let x = Operand::of(Format::of(isa, dtype, matrix), Rows::F32(x), matrix.inner);
        let mut y = vec![f32::NAN; x.rows * matrix.out];
        // SAFETY: as many values as the product has.
        unsafe {
            let (out, stride) = (Out::F32(y.as_mut_ptr()), matrix.out);
            products(isa, &[Job { x: &x, matrix: *matrix, bias, out, stride, offset: 0 }]);
        }
        y
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Every kernel computes the product, and a row alone what it does among others.
    fn holds(
        seed: u64,
        rows: usize,
        [out, inner]: [usize; 2],
        which: usize,
        dtype: Dtype,
    ) -> Result<(), TestCaseError> {
        let weights = stored(&numbers(seed, out * inner), out, inner, which);
        let matrix = weights.matrix(out, inner);
        let mut x = numbers(!seed, rows * inner);
        if dtype == Dtype::Bf16 {
            x.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
        }
        let bias = numbers(seed ^ 7, out);
        let (right, most) = (reference::product(&x, &matrix), reference::magnitude(&x, &matrix));
        for isa in Isa::available() {
            let y = multiply(isa, dtype, &x, &matrix, Some(&bias));
            for (at, y) in y.iter().enumerate() {
                let bias = f64::from(bias[at % out]);
                let off = (f64::from(*y) - right[at] - bias).abs();
                prop_assert!(off <= 1e-6 * (most[at] + bias.abs()) + 1e-30, "{isa:?} {at}: {y} {}", right[at] + bias);
            }
            for row in [0, rows / 2, rows - 1] {
                let alone = multiply(isa, dtype, &x[row * inner..][..inner], &matrix, Some(&bias));
                prop_assert_eq!(bits(&alone), bits(&y[row * out..][..out]), "{:?} row {} of {}", isa, row, rows);
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_kernel_computes_the_product_and_no_row_sees_another(
            seed: u64,
            rows in 1usize..70,
            out in 1usize..150,
            inner in prop_oneof![2 => 1usize..400, 1 => 600usize..1500],
            which in 0usize..5,
            f32_model: bool,
        ) {
            team::gather(2);
            holds(seed, rows, [out, inner], which, if f32_model { Dtype::F32 } else { Dtype::Bf16 })?;
        }
    }

    /// Of those fewer weights than a strip has are made f32 at once.
    #[test]
    fn long_lines_are_multiplied_like_short_ones() {
        for (which, inner) in (1..5).flat_map(|which| [2_200, 7_000].map(|inner| (which, inner))) {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                holds(3, 20, [70, inner], which, dtype).unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }

    #[test]
    fn avx2_and_avx512_agree_to_the_bit_on_vectors_of_f32() {
        let here: Vec<Isa> = Isa::available().filter(|isa| matches!(isa, Isa::Avx2 | Isa::Avx512)).collect();
        for which in 0..5 {
            let weights = stored(&numbers(5, 77 * 300), 77, 300, which);
            let matrix = weights.matrix(77, 300);
            let x = numbers(6, 5 * 300);
            let all: Vec<_> = here.iter().map(|isa| bits(&multiply(*isa, Dtype::F32, &x, &matrix, None))).collect();
            assert!(all.windows(2).all(|two| two[0] == two[1]));
        }
    }

    #[test]
    fn every_code_is_what_the_table_says_and_what_is_no_number_stays_none() {
        for isa in Isa::available() {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                for code in 0..=255u8 {
                    let codes: Vec<u8> = (0..128).map(|at| if at == 77 { code } else { 0 }).collect();
                    let scales = [0.5];
                    let matrix = Matrix::new(Values::Fp8 { codes: &codes, scales: &scales, block: 128 }, 1, 128);
                    let right = crate::checkpoint::fp8::decode_e4m3(code) * 0.5;
                    for rows in [1, 5, 20] {
                        let y = multiply(isa, dtype, &vec![1.0; 128 * rows], &matrix, None)[rows - 1];
                        let same = y == right || (y.is_nan() && right.is_nan());
                        assert!(same, "{isa:?} {dtype:?} {code:#x}: {y} {right}");
                    }
                }
            }
        }
    }
}
