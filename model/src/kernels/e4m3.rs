//! FP8 weights on their way into registers: E4M3 codes to BF16, sixty-four at a time. In: codes. Out: BF16, exact. Never
//! here: scales.

use std::arch::x86_64::*;

use crate::checkpoint::fp8::decode_e4m3;

/// E4M3 to BF16 by two lookups in tables of 128 bytes, the sign apart.
pub(super) struct Tables {
    low: [__m512i; 2],
    high: [__m512i; 2],
    sign: __m512i,
    order: __m512i,
}

static BYTES: std::sync::LazyLock<[[u8; 128]; 2]> = std::sync::LazyLock::new(|| {
    let bits = |code: usize| (decode_e4m3(code as u8).to_bits() >> 16) as u16;
    [std::array::from_fn(|code| bits(code) as u8), std::array::from_fn(|code| (bits(code) >> 8) as u8)]
});

impl Tables {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    pub(super) fn new() -> Self {
        let [low, high] = &*BYTES;
        // SAFETY: both halves of 128 bytes.
        let load = |bytes: &[u8; 128]| unsafe {
            [_mm512_loadu_si512(bytes.as_ptr().cast()), _mm512_loadu_si512(bytes.as_ptr().add(64).cast())]
        };
        Self {
            low: load(low),
            high: load(high),
            sign: _mm512_set1_epi8(-128),
            // So that what is interleaved within each quarter comes out in order.
            order: _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7),
        }
    }

    /// `len` codes to BF16, and zeros up to a multiple of 64.
    ///
    /// # Safety
    /// `codes` has `len` bytes, `to` room for them and the zeros.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    #[inline]
    pub(super) unsafe fn decode(&self, codes: *const u8, len: usize, to: *mut u16) {
        let mut at = 0;
        while at < len {
            // SAFETY: the mask keeps the load within `len`; 64 values are written from a multiple of 64 below `len` on.
            unsafe {
                let here = if len - at >= 64 {
                    _mm512_loadu_si512(codes.add(at).cast())
                } else {
                    _mm512_maskz_loadu_epi8((1 << (len - at)) - 1, codes.add(at).cast())
                };
                let here = _mm512_permutexvar_epi64(self.order, here);
                let low = _mm512_permutex2var_epi8(self.low[0], here, self.low[1]);
                let high = _mm512_permutex2var_epi8(self.high[0], here, self.high[1]);
                // high | (here & sign)
                let high = _mm512_ternarylogic_epi64::<0xf8>(high, here, self.sign);
                _mm512_storeu_si512(to.add(at).cast(), _mm512_unpacklo_epi8(low, high));
                _mm512_storeu_si512(to.add(at + 32).cast(), _mm512_unpackhi_epi8(low, high));
            }
            at += 64;
        }
    }
}
