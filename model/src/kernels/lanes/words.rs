//! Stored weights, taken apart: sixteen 32-bit words of one f32 value, two of BF16 or four codes of FP8 each. In: words in
//! memory. Out: value `nth` of each, as f32. Never here: a sum or a scale.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

use super::LANES;
use crate::{checkpoint::fp8::decode_e4m3, kernels::operand::widen};

/// A format of weights, and how vectors of words are taken apart: value `nth` of each word, without its scale.
pub(super) trait Element: Copy + Default {
    /// Values of a 32-bit word.
    const PER_WORD: usize;
    /// Whether they are codes of FP8, of which two are no numbers, and which come as many times too small as an instruction set says.
    const CODES: bool = false;
    /// # Safety
    /// 16 words are there.
    unsafe fn portable(from: *const Self, nth: usize) -> [f32; LANES];
    /// # Safety
    /// The processor has AVX2; eight words are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx2(from: *const Self, nth: usize) -> __m256;
    /// # Safety
    /// The processor has AVX-512; 16 words are there.
    #[cfg(target_arch = "x86_64")]
    unsafe fn avx512(from: *const Self, nth: usize) -> __m512;
    /// # Safety
    /// `len` of them are there.
    unsafe fn is_none_among(_from: *const Self, _len: usize) -> bool {
        false
    }
}

impl Element for f32 {
    const PER_WORD: usize = 1;

    #[inline(always)]
    unsafe fn portable(from: *const Self, _: usize) -> [f32; LANES] {
        // SAFETY: the caller's.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn avx2(from: *const Self, _: usize) -> __m256 {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn avx512(from: *const Self, _: usize) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_ps(from) }
    }
}

/// The upper half of a word.
#[cfg(target_arch = "x86_64")]
const UPPER: i32 = -1 << 16;

impl Element for bf16 {
    const PER_WORD: usize = 2;

    #[inline(always)]
    unsafe fn portable(from: *const Self, nth: usize) -> [f32; LANES] {
        // SAFETY: the caller's.
        let words = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        words.map(|word| widen(word[nth]))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn avx2(from: *const Self, nth: usize) -> __m256 {
        // SAFETY: the caller's.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            _mm256_castsi256_ps(match nth {
                0 => _mm256_slli_epi32::<16>(words),
                _ => _mm256_and_si256(words, _mm256_set1_epi32(UPPER)),
            })
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn avx512(from: *const Self, nth: usize) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            _mm512_castsi512_ps(match nth {
                0 => _mm512_slli_epi32::<16>(words),
                _ => _mm512_and_si512(words, _mm512_set1_epi32(UPPER)),
            })
        }
    }
}

impl Element for u8 {
    const PER_WORD: usize = 4;
    const CODES: bool = true;

    #[inline(always)]
    unsafe fn portable(from: *const Self, nth: usize) -> [f32; LANES] {
        // SAFETY: the caller's.
        let words = unsafe { from.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        words.map(|word| decode_e4m3(word[nth]))
    }

    /// A code's bits where f32 has the end of its exponent and the beginning of its mantissa.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn avx2(from: *const Self, nth: usize) -> __m256 {
        /// A sign, and seven bits below those that it fills, in the upper half of an f32 number.
        const CODE: i16 = i16::MIN | 0x7f << 4;
        // SAFETY: the caller's.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            let at_top = if nth.is_multiple_of(2) { _mm256_slli_epi16::<8>(words) } else { words };
            let codes = _mm256_and_si256(_mm256_srai_epi16::<4>(at_top), _mm256_set1_epi16(CODE));
            _mm256_castsi256_ps(match nth / 2 {
                0 => _mm256_slli_epi32::<16>(codes),
                _ => _mm256_and_si256(codes, _mm256_set1_epi32(UPPER)),
            })
        }
    }

    /// A code's bits where f16 has the end of its exponent and the beginning of its mantissa, made f32.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn avx512(from: *const Self, nth: usize) -> __m512 {
        // Of four words the first codes, then the second ones, ...; and so of four parts of a vector.
        const TURNED: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];
        // SAFETY: the caller's.
        unsafe {
            let turned = _mm_loadu_si128(TURNED.as_ptr().cast());
            let words = _mm512_shuffle_epi8(_mm512_loadu_si512(from.cast()), _mm512_broadcast_i32x4(turned));
            let codes = _mm512_permutexvar_epi32(_mm512_cvtepu8_epi32(turned), words);
            let codes = _mm256_cvtepi8_epi16(match nth {
                0 => _mm512_castsi512_si128(codes),
                1 => _mm512_extracti32x4_epi32::<1>(codes),
                2 => _mm512_extracti32x4_epi32::<2>(codes),
                _ => _mm512_extracti32x4_epi32::<3>(codes),
            });
            // The sign fills what is above it; of that, the highest bit is kept.
            let kept = _mm256_set1_epi16(i16::MIN | 0x7f << 7);
            _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16::<7>(codes), kept))
        }
    }

    unsafe fn is_none_among(from: *const Self, len: usize) -> bool {
        // SAFETY: the caller's.
        unsafe { std::slice::from_raw_parts(from, len) }.iter().any(|code| code | 0x80 == 0xff)
    }
}
