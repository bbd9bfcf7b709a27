//! Products on vectors of f32: sixteen running sums per output, places 0, 16, 32, ... of the inner dimension in the first,
//! 1, 17, 33, ... in the second, added up at the end. In: a strip of outputs and an operand in lanes. Out: f32. Never here:
//! a sum whose order depends on the vectors' length, so that AVX-512 and AVX2 agree to the bit.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

use super::{
    isa::Isa,
    matrix::{Matrix, Values},
    operand::{View, widen},
};
use crate::checkpoint::fp8::decode_e4m3;

/// Outputs of one strip.
pub(super) const STRIP: usize = 32;
/// Running sums of one output.
const LANES: usize = 16;
/// Outputs and rows whose sums run at once: 16 vectors of them.
const OUTS: usize = 4;
const ROWS: usize = 4;

/// Sixteen f32 values, and the few things that are done with them.
trait Lanes: Copy {
    fn zero() -> Self;
    fn splat(value: f32) -> Self;
    /// # Safety
    /// 16 values are there.
    unsafe fn f32(from: *const f32) -> Self;
    /// # Safety
    /// 16 values are there.
    unsafe fn bf16(from: *const bf16) -> Self;
    /// # Safety
    /// 16 codes are there.
    unsafe fn e4m3(from: *const u8) -> Self;
    /// `self * by + to`.
    fn times_plus(self, by: Self, to: Self) -> Self;
    fn values(self) -> [f32; LANES];
}

/// A stored format.
trait Element: Copy + Default {
    /// # Safety
    /// 16 of them are there.
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's.
        unsafe { L::f32(from) }
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's.
        unsafe { L::bf16(from) }
    }
}

impl Element for u8 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        // SAFETY: the caller's.
        unsafe { L::e4m3(from) }
    }
}

/// Outputs `first..first + outs` of `x W^T`, at most 32 of them, into `y` `[T, 32]`.
pub(super) fn strip(isa: Isa, matrix: &Matrix<'_>, first: usize, outs: usize, x: &View<'_>, y: &mut [f32]) {
    assert!(outs <= STRIP && first + outs <= matrix.out && x.inner() == matrix.inner && y.len() >= x.rows * STRIP);
    // SAFETY: an `Isa` is only ever one that this processor has; the sizes were checked above.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => strip_avx512(matrix, first, outs, x, y),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => strip_avx2(matrix, first, outs, x, y),
            _ => strip_of::<Portable>(matrix, first, outs, x, y),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,f16c,fma,avx2")]
unsafe fn strip_avx512(matrix: &Matrix<'_>, first: usize, outs: usize, x: &View<'_>, y: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { strip_of::<Avx512>(matrix, first, outs, x, y) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn strip_avx2(matrix: &Matrix<'_>, first: usize, outs: usize, x: &View<'_>, y: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe { strip_of::<Avx2>(matrix, first, outs, x, y) }
}

/// # Safety
/// The processor has what `L` needs, and sizes are as [`strip`] checks them.
#[inline(always)]
unsafe fn strip_of<L: Lanes>(matrix: &Matrix<'_>, first: usize, outs: usize, x: &View<'_>, y: &mut [f32]) {
    // SAFETY: the caller's.
    unsafe {
        match matrix.values {
            Values::F32(values) => typed::<L, f32>(values, matrix, first, outs, x, y),
            Values::Bf16(values) => typed::<L, bf16>(values, matrix, first, outs, x, y),
            Values::Fp8 { codes, .. } => typed::<L, u8>(codes, matrix, first, outs, x, y),
        }
    }
}

#[inline(always)]
unsafe fn typed<L: Lanes, W: Element>(
    values: &[W],
    matrix: &Matrix<'_>,
    first: usize,
    outs: usize,
    x: &View<'_>,
    y: &mut [f32],
) {
    let weights = values.as_ptr().wrapping_add(first * matrix.inner);
    let mut row = 0;
    while row < x.rows {
        let rows = ROWS.min(x.rows - row);
        let mut out = 0;
        while out < outs {
            let place = (weights.wrapping_add(out * matrix.inner), first + out, row);
            // SAFETY: the caller's; the block lies within the strip and the operand.
            let y = unsafe { y.as_mut_ptr().add(row * STRIP + out) };
            // Of a block that is not whole, one output or row at a time: the sums are the same.
            if out + OUTS <= outs {
                // SAFETY: as above.
                unsafe {
                    match rows {
                        ROWS => block::<L, W, OUTS, ROWS>(place, matrix, x, y),
                        3 => block::<L, W, OUTS, 3>(place, matrix, x, y),
                        2 => block::<L, W, OUTS, 2>(place, matrix, x, y),
                        _ => block::<L, W, OUTS, 1>(place, matrix, x, y),
                    }
                }
                out += OUTS;
            } else {
                for here in 0..rows {
                    // SAFETY: as above.
                    unsafe { block::<L, W, 1, 1>((place.0, place.1, row + here), matrix, x, y.add(here * STRIP)) };
                }
                out += 1;
            }
        }
        row += rows;
    }
}

/// `O` outputs by `R` rows.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "one index runs over several arrays")]
unsafe fn block<L: Lanes, W: Element, const O: usize, const R: usize>(
    (weights, out, row): (*const W, usize, usize),
    matrix: &Matrix<'_>,
    x: &View<'_>,
    y: *mut f32,
) {
    let rows: [*const f32; R] = std::array::from_fn(|r| x.lanes(row + r));
    let mut totals = [[L::zero(); R]; O];
    for stretch in matrix.stretches() {
        let mut sums = [[L::zero(); R]; O];
        let mut at = stretch.start;
        while at + LANES <= stretch.end {
            for o in 0..O {
                // SAFETY: 16 values from `at` on lie within the row.
                let w: L = unsafe { W::load(weights.wrapping_add(o * matrix.inner + at)) };
                for r in 0..R {
                    // SAFETY: as above.
                    sums[o][r] = unsafe { L::f32(rows[r].wrapping_add(at)) }.times_plus(w, sums[o][r]);
                }
            }
            at += LANES;
        }
        if at < stretch.end {
            let left = stretch.end - at;
            for o in 0..O {
                let (mut w, mut v) = ([W::default(); LANES], [0f32; LANES]);
                // SAFETY: the values that are left, and whole vectors of our own.
                unsafe {
                    std::ptr::copy_nonoverlapping(weights.wrapping_add(o * matrix.inner + at), w.as_mut_ptr(), left);
                    let w: L = W::load(w.as_ptr());
                    for r in 0..R {
                        std::ptr::copy_nonoverlapping(rows[r].wrapping_add(at), v.as_mut_ptr(), left);
                        sums[o][r] = L::f32(v.as_ptr()).times_plus(w, sums[o][r]);
                    }
                }
            }
        }
        for o in 0..O {
            let scale = L::splat(matrix.scale(out + o, stretch.start));
            for r in 0..R {
                totals[o][r] = sums[o][r].times_plus(scale, totals[o][r]);
            }
        }
    }
    for (o, totals) in totals.into_iter().enumerate() {
        for (r, total) in totals.into_iter().enumerate() {
            // SAFETY: the block lies within `y`.
            unsafe { y.add(r * STRIP + o).write(add_up(total.values())) };
        }
    }
}

/// Halves onto each other, until one is left.
#[inline(always)]
pub(super) fn add_up(mut values: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            values[lane] += values[lane + half];
        }
        half /= 2;
    }
    values[0]
}

#[derive(Clone, Copy)]
struct Portable([f32; LANES]);

impl Lanes for Portable {
    #[inline(always)]
    fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn f32(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(widen))
    }

    #[inline(always)]
    unsafe fn e4m3(from: *const u8) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { from.cast::<[u8; LANES]>().read_unaligned() }.map(decode_e4m3))
    }

    #[inline(always)]
    fn times_plus(self, by: Self, to: Self) -> Self {
        // Rounded twice: without an instruction for it, rounding once would take a hundred times as long.
        Self(std::array::from_fn(|lane| self.0[lane] * by.0[lane] + to.0[lane]))
    }

    #[inline(always)]
    fn values(self) -> [f32; LANES] {
        self.0
    }
}

/// 16 codes as the f16 numbers that are 2^-8 times their values, subnormals included.
///
/// # Safety
/// The processor has AVX2; 16 codes are there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn e4m3_as_f16(from: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        let codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()));
        let magnitude = _mm256_and_si256(codes, _mm256_set1_epi16(0x7f));
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(codes, _mm256_set1_epi16(0x80)));
        let half = _mm256_or_si256(sign, _mm256_slli_epi16::<7>(magnitude));
        let nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
        _mm256_or_si256(half, nan)
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: this type is only used where the processor has AVX-512; so everywhere below.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn f32(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn e4m3(from: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(_mm512_mul_ps(_mm512_cvtph_ps(e4m3_as_f16(from)), _mm512_set1_ps(256.0))) }
    }

    #[inline(always)]
    fn times_plus(self, by: Self, to: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_fmadd_ps(self.0, by.0, to.0) })
    }

    #[inline(always)]
    fn values(self) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        // SAFETY: as above; 16 values.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) };
        values
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Avx2([__m256; 2]);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: this type is only used where the processor has AVX2, FMA and F16C; so everywhere below.
        Self(unsafe { [_mm256_setzero_ps(); 2] })
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { [_mm256_set1_ps(value); 2] })
    }

    #[inline(always)]
    unsafe fn f32(from: *const f32) -> Self {
        // SAFETY: the caller's.
        Self(unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] })
    }

    #[inline(always)]
    unsafe fn bf16(from: *const bf16) -> Self {
        // SAFETY: the caller's.
        let half = |from: *const bf16| unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        };
        Self([half(from), half(from.wrapping_add(8))])
    }

    #[inline(always)]
    unsafe fn e4m3(from: *const u8) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let half = e4m3_as_f16(from);
            let scale = _mm256_set1_ps(256.0);
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half));
            Self([_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)])
        }
    }

    #[inline(always)]
    fn times_plus(self, by: Self, to: Self) -> Self {
        // SAFETY: as above.
        Self(std::array::from_fn(|half| unsafe { _mm256_fmadd_ps(self.0[half], by.0[half], to.0[half]) }))
    }

    #[inline(always)]
    fn values(self) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        // SAFETY: as above; twice 8 values.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), self.0[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), self.0[1]);
        }
        values
    }
}
