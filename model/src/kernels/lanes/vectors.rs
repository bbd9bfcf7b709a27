//! Sixteen f32 values in whatever registers there are. In: weights and rows in memory. Out: sums. Never here: which outputs
//! and rows, of which weight.
//!
//! What is done to each of several outputs or rows stands in loops, not closures: those are functions of their own, which may
//! not have what the processor has.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use super::{LANES, words::Element};

/// Sixteen f32 values, one per word of a vector, and the few things that are done with them.
pub(super) trait Lanes: Copy {
    /// Rows whose sums run at once, at most: four of four outputs take 16 registers of 16 values, three of two outputs 12 of 8.
    const ROWS: usize;
    /// Whether there are registers for four outputs, or two.
    const FOUR: bool;
    /// How many times too small codes of FP8 come: a power of two.
    const CODES: f32;
    /// For up to so many rows codes are made f32 on their way into each sum, and once for all above.
    const CODES_IN_PLACE: usize;
    /// The largest codes, their signs apart, that each place has seen.
    type Seen: Copy + Default;
    fn all(value: f32) -> Self;
    /// `sums += w x`: sixteen words of each of `O` lines by the values of `R` rows that belong to them. What is no number among
    /// codes need not come out as such: `seen` tells of it.
    ///
    /// # Safety
    /// The words and values are there.
    unsafe fn add_words<W: Element, const O: usize, const R: usize>(
        sums: &mut [[Self; R]; O],
        lines: [*const W; O],
        rows: [*const f32; R],
        seen: &mut Self::Seen,
    );
    /// Sixteen words as f32, in the order that rows have, and seen as above.
    ///
    /// # Safety
    /// The words are there, and room for their values.
    unsafe fn put_words<W: Element>(from: *const W, to: *mut f32, seen: &mut Self::Seen);
    fn none_among(seen: Self::Seen) -> bool;
    /// # Safety
    /// There is room for 16 values.
    unsafe fn put(self, to: *mut f32);
}

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Lanes for Portable {
    const ROWS: usize = 3;
    const FOUR: bool = false;
    const CODES: f32 = 1.0;
    const CODES_IN_PLACE: usize = Self::ROWS;
    type Seen = ();

    #[inline(always)]
    fn all(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn add_words<W: Element, const O: usize, const R: usize>(
        sums: &mut [[Self; R]; O],
        lines: [*const W; O],
        rows: [*const f32; R],
        _seen: &mut (),
    ) {
        for nth in 0..W::PER_WORD {
            for o in 0..O {
                // SAFETY: the caller's; so below.
                let w = unsafe { W::portable(lines[o], nth) };
                for r in 0..R {
                    // SAFETY: as above.
                    let x = unsafe { f32::portable(rows[r].wrapping_add(nth * LANES), 0) };
                    // Rounded twice: without an instruction for it, rounding once would take a hundred times as long.
                    sums[o][r].0.iter_mut().zip(x).zip(w).for_each(|((sum, x), w)| *sum += x * w);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn put_words<W: Element>(from: *const W, to: *mut f32, _seen: &mut ()) {
        for nth in 0..W::PER_WORD {
            // SAFETY: the caller's; so below.
            unsafe { Self(W::portable(from, nth)).put(to.wrapping_add(nth * LANES)) };
        }
    }

    #[inline(always)]
    fn none_among((): ()) -> bool {
        // They come out as what they are.
        false
    }

    #[inline(always)]
    unsafe fn put(self, to: *mut f32) {
        // SAFETY: the caller's.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }
}

/// Thirty-two codes, the largest of their places so far, with their signs set.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Seen(__m256i);

#[cfg(target_arch = "x86_64")]
impl Default for Seen {
    #[inline(always)]
    fn default() -> Self {
        // SAFETY: it is only used where the processor has AVX2; so below.
        Self(unsafe { _mm256_setzero_si256() })
    }
}

#[cfg(target_arch = "x86_64")]
impl Seen {
    /// # Safety
    /// 32 codes are there.
    #[inline(always)]
    unsafe fn see(&mut self, from: *const u8) {
        // SAFETY: the caller's.
        unsafe {
            let codes = _mm256_or_si256(_mm256_loadu_si256(from.cast()), _mm256_set1_epi8(i8::MIN));
            self.0 = _mm256_max_epu8(self.0, codes);
        }
    }

    #[inline(always)]
    fn none_among(self) -> bool {
        // SAFETY: as above.
        unsafe { _mm256_movemask_epi8(_mm256_cmpeq_epi8(self.0, _mm256_set1_epi8(-1))) != 0 }
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    const ROWS: usize = 4;
    const FOUR: bool = true;
    /// As f16, which makes subnormals f32 at full speed.
    const CODES: f32 = 256.0;
    const CODES_IN_PLACE: usize = Self::ROWS;
    type Seen = Seen;

    #[inline(always)]
    fn all(value: f32) -> Self {
        // SAFETY: this type is only used where the processor has AVX-512; so everywhere below.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn add_words<W: Element, const O: usize, const R: usize>(
        sums: &mut [[Self; R]; O],
        lines: [*const W; O],
        rows: [*const f32; R],
        seen: &mut Seen,
    ) {
        // SAFETY: the caller's.
        unsafe {
            for nth in 0..W::PER_WORD {
                let mut w = [_mm512_setzero_ps(); O];
                for o in 0..O {
                    w[o] = W::avx512(lines[o], nth);
                }
                for r in 0..R {
                    let x = _mm512_loadu_ps(rows[r].wrapping_add(nth * LANES));
                    for o in 0..O {
                        sums[o][r].0 = _mm512_fmadd_ps(x, w[o], sums[o][r].0);
                    }
                }
            }
            if W::CODES {
                for line in lines {
                    seen.see(line.cast());
                    seen.see(line.cast::<u8>().wrapping_add(32));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn put_words<W: Element>(from: *const W, to: *mut f32, seen: &mut Seen) {
        // SAFETY: the caller's.
        unsafe {
            for nth in 0..W::PER_WORD {
                _mm512_storeu_ps(to.wrapping_add(nth * LANES), W::avx512(from, nth));
            }
            if W::CODES {
                seen.see(from.cast());
                seen.see(from.cast::<u8>().wrapping_add(32));
            }
        }
    }

    #[inline(always)]
    fn none_among(seen: Seen) -> bool {
        seen.none_among()
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
    const FOUR: bool = false;
    /// A subnormal code is a subnormal number, which AMD's processors multiply nearly as fast as any other; Intel's take a
    /// hundred cycles or two for each, and a trained weight has one in some thousands.
    const CODES: f32 = (1u128 << 120) as f32;
    const CODES_IN_PLACE: usize = 9;
    type Seen = Seen;

    #[inline(always)]
    fn all(value: f32) -> Self {
        // SAFETY: this type is only used where the processor has AVX2 and FMA; so everywhere below.
        Self(unsafe { [_mm256_set1_ps(value); 2] })
    }

    /// One half after the other: sixteen registers do for what is needed at once.
    #[inline(always)]
    unsafe fn add_words<W: Element, const O: usize, const R: usize>(
        sums: &mut [[Self; R]; O],
        lines: [*const W; O],
        rows: [*const f32; R],
        seen: &mut Seen,
    ) {
        // SAFETY: the caller's.
        unsafe {
            for half in 0..2 {
                let words = half * LANES / 2 * W::PER_WORD;
                for nth in 0..W::PER_WORD {
                    let mut w = [_mm256_setzero_ps(); O];
                    for o in 0..O {
                        w[o] = W::avx2(lines[o].wrapping_add(words), nth);
                    }
                    for r in 0..R {
                        let x = _mm256_loadu_ps(rows[r].wrapping_add(nth * LANES + half * LANES / 2));
                        for o in 0..O {
                            sums[o][r].0[half] = _mm256_fmadd_ps(x, w[o], sums[o][r].0[half]);
                        }
                    }
                }
                if W::CODES {
                    for line in lines {
                        seen.see(line.wrapping_add(words).cast());
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn put_words<W: Element>(from: *const W, to: *mut f32, seen: &mut Seen) {
        // SAFETY: the caller's.
        unsafe {
            for half in 0..2 {
                let from = from.wrapping_add(half * LANES / 2 * W::PER_WORD);
                for nth in 0..W::PER_WORD {
                    _mm256_storeu_ps(to.wrapping_add(nth * LANES + half * LANES / 2), W::avx2(from, nth));
                }
                if W::CODES {
                    seen.see(from.cast());
                }
            }
        }
    }

    #[inline(always)]
    fn none_among(seen: Seen) -> bool {
        seen.none_among()
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
