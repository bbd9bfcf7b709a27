//! Sixteen f32 values in whatever registers there are. In: values and codes in memory. Out: sums. Never here: which values,
//! of which weight.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

use super::LANES;
use crate::{checkpoint::fp8::decode_e4m3, kernels::operand::widen};

/// An E4M3 number whose bits are put where f16 has the end of its exponent and the beginning of its mantissa is so many times
/// too small, subnormals included. (f32 has room for them too, but takes long for its own subnormals.)
const E4M3_AS_F16: f32 = 256.0;

/// Sixteen f32 values, and the few things that are done with them.
pub(super) trait Lanes: Copy {
    /// Rows whose sums run at once, at most: four of four outputs take 16 registers of 16 values, three of two outputs 12 of 8.
    const ROWS: usize;
    /// The largest codes, their signs apart, that each place has seen.
    type Seen: Copy + Default;
    fn zero() -> Self;
    /// # Safety
    /// 16 values are there.
    unsafe fn f32(from: *const f32) -> Self;
    /// # Safety
    /// 16 values are there.
    unsafe fn bf16(from: *const bf16) -> Self;
    /// What codes of a block with this scale are multiplied with by [`e4m3`](Self::e4m3).
    fn factor(scale: f32) -> Self;
    /// What is no number among the codes need not come out as such: `seen` tells of it.
    ///
    /// # Safety
    /// 16 codes are there.
    unsafe fn e4m3(from: *const u8, factor: Self, seen: &mut Self::Seen) -> Self;
    fn none_among(seen: Self::Seen) -> bool;
    /// `self * by + to`.
    fn times_plus(self, by: Self, to: Self) -> Self;
    /// # Safety
    /// There is room for 16 values.
    unsafe fn put(self, to: *mut f32);
}

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    const ROWS: usize = 3;
    type Seen = ();

    #[inline(always)]
    fn zero() -> Self {
        Self([0.0; LANES])
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
    fn factor(scale: f32) -> Self {
        Self([scale; LANES])
    }

    #[inline(always)]
    unsafe fn e4m3(from: *const u8, factor: Self, _seen: &mut ()) -> Self {
        // SAFETY: the caller's.
        let codes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Self(std::array::from_fn(|lane| decode_e4m3(codes[lane]) * factor.0[lane]))
    }

    #[inline(always)]
    fn none_among((): ()) -> bool {
        // They come out as what they are.
        false
    }

    #[inline(always)]
    fn times_plus(self, by: Self, to: Self) -> Self {
        // Rounded twice: without an instruction for it, rounding once would take a hundred times as long.
        Self(std::array::from_fn(|lane| self.0[lane] * by.0[lane] + to.0[lane]))
    }

    #[inline(always)]
    unsafe fn put(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }
}

/// Sixteen codes, the largest of their places so far, with their signs set.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Seen(__m128i);

#[cfg(target_arch = "x86_64")]
impl Default for Seen {
    #[inline(always)]
    fn default() -> Self {
        // SAFETY: every x86-64 has SSE2; so below.
        Self(unsafe { _mm_setzero_si128() })
    }
}

#[cfg(target_arch = "x86_64")]
impl Seen {
    #[inline(always)]
    fn none_among(self) -> bool {
        // SAFETY: as above.
        unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(self.0, _mm_set1_epi8(-1))) != 0 }
    }
}

/// 16 codes as f16 numbers, [`E4M3_AS_F16`] times too small.
///
/// # Safety
/// The processor has AVX2; 16 codes are there.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn e4m3_as_f16(from: *const u8, seen: &mut Seen) -> __m256i {
    // The sign fills what is above it; of that, the highest bit is kept.
    const KEPT: i16 = i16::MIN | 0x7f << 7;
    // SAFETY: the caller's.
    unsafe {
        let codes = _mm_loadu_si128(from.cast());
        seen.0 = _mm_max_epu8(seen.0, _mm_or_si128(codes, _mm_set1_epi8(i8::MIN)));
        let codes = _mm256_cvtepi8_epi16(codes);
        _mm256_and_si256(_mm256_slli_epi16::<7>(codes), _mm256_set1_epi16(KEPT))
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    const ROWS: usize = 4;
    type Seen = Seen;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: this type is only used where the processor has AVX-512; so everywhere below.
        Self(unsafe { _mm512_setzero_ps() })
    }

    #[inline(always)]
    fn factor(scale: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_set1_ps(scale * E4M3_AS_F16) })
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
    unsafe fn e4m3(from: *const u8, factor: Self, seen: &mut Seen) -> Self {
        // SAFETY: the caller's.
        unsafe { Self(_mm512_mul_ps(_mm512_cvtph_ps(e4m3_as_f16(from, seen)), factor.0)) }
    }

    #[inline(always)]
    fn none_among(seen: Seen) -> bool {
        seen.none_among()
    }

    #[inline(always)]
    fn times_plus(self, by: Self, to: Self) -> Self {
        // SAFETY: as above.
        Self(unsafe { _mm512_fmadd_ps(self.0, by.0, to.0) })
    }

    #[inline(always)]
    unsafe fn put(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { _mm512_storeu_ps(to, self.0) };
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx2([__m256; 2]);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    const ROWS: usize = 3;
    type Seen = Seen;

    #[inline(always)]
    fn zero() -> Self {
        // SAFETY: this type is only used where the processor has AVX2, FMA and F16C; so everywhere below.
        Self(unsafe { [_mm256_setzero_ps(); 2] })
    }

    #[inline(always)]
    fn factor(scale: f32) -> Self {
        // SAFETY: as above.
        Self(unsafe { [_mm256_set1_ps(scale * E4M3_AS_F16); 2] })
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
    unsafe fn e4m3(from: *const u8, factor: Self, seen: &mut Seen) -> Self {
        // SAFETY: the caller's.
        unsafe {
            let half = e4m3_as_f16(from, seen);
            let low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
            let high = _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(half));
            Self([_mm256_mul_ps(low, factor.0[0]), _mm256_mul_ps(high, factor.0[1])])
        }
    }

    #[inline(always)]
    fn none_among(seen: Seen) -> bool {
        seen.none_among()
    }

    #[inline(always)]
    fn times_plus(self, by: Self, to: Self) -> Self {
        // SAFETY: as above.
        Self(std::array::from_fn(|half| unsafe { _mm256_fmadd_ps(self.0[half], by.0[half], to.0[half]) }))
    }

    #[inline(always)]
    unsafe fn put(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe {
            _mm256_storeu_ps(to, self.0[0]);
            _mm256_storeu_ps(to.add(8), self.0[1]);
        }
    }
}
