//! What this processor can do. In: its own answers, and the name of a smaller set where the environment asks for one. Out:
//! an [`Isa`]. Never here: a guess; what is reported can be run.

use std::sync::OnceLock;

/// Asks for a smaller instruction set than the processor's: on a fleet of mixed processors, results agree to the bit only
/// where all compute with the same one.
pub const ISA_VARIABLE: &str = "CONCLAVE_ISA";

/// Instruction sets that the kernels know, from small to large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Isa {
    /// What the compiler makes of plain loops.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// AVX-512 with dot products of BF16 pairs, and VBMI.
    Avx512Bf16,
    /// Those, and tiles of BF16.
    Amx,
}

const NAMES: [(&str, Isa); 5] = [
    ("portable", Isa::Portable),
    ("avx2", Isa::Avx2),
    ("avx512", Isa::Avx512),
    ("avx512_bf16", Isa::Avx512Bf16),
    ("amx", Isa::Amx),
];

impl Isa {
    /// The one to compute with: the largest this processor has, or the one the environment names if that is smaller.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let here = Self::detect();
            let Ok(asked) = std::env::var(ISA_VARIABLE) else { return here };
            match NAMES.iter().find(|(name, _)| *name == asked) {
                Some((_, asked)) => here.min(*asked),
                None => {
                    let known = NAMES.map(|(name, _)| name).join(", ");
                    tracing::warn!(asked, "{ISA_VARIABLE} names no instruction set: use one of {known}");
                    here
                }
            }
        })
    }

    /// As people write it.
    pub(crate) fn name(self) -> &'static str {
        NAMES.iter().find(|(_, isa)| *isa == self).map_or("portable", |(name, _)| name)
    }

    /// All that can be run here.
    #[cfg(test)]
    pub(crate) fn available() -> impl Iterator<Item = Self> {
        let here = Self::detect();
        NAMES.into_iter().map(|(_, isa)| isa).filter(move |isa| *isa <= here)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        Self::Portable
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        use std::arch::is_x86_feature_detected as has;
        if !(has!("avx2") && has!("fma") && has!("f16c")) {
            return Self::Portable;
        }
        if !(has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq")) {
            return Self::Avx2;
        }
        if !(has!("avx512bf16") && has!("avx512vbmi")) {
            return Self::Avx512;
        }
        if has_tiles() && may_use_tiles() { Self::Amx } else { Self::Avx512Bf16 }
    }
}

/// CPUID leaf 7: bits 22 (AMX-BF16) and 24 (AMX-TILE) of EDX.
#[cfg(target_arch = "x86_64")]
fn has_tiles() -> bool {
    let both = 1 << 22 | 1 << 24;
    std::arch::x86_64::__cpuid_count(7, 0).edx & both == both
}

/// Asks the kernel for the tile registers: Linux gives them, 8 KiB of state a thread, to processes that ask.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn may_use_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: arch_prctl(2) with this code takes a number, touches no memory of ours, and clobbers what every system call
    // does.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn may_use_tiles() -> bool {
    false
}

/// For each loop of the module `portable` beside it: a function that takes the best of three forms that it is compiled in, and one
/// in `at` that is told which. Rust never contracts or reorders float operations, so the three agree bit for bit.
macro_rules! by_isa {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?;)*) => {
        $($(#[$doc])*
        pub(super) fn $name($($arg: $type),*) $(-> $out)? {
            at::$name(Isa::best(), $($arg),*)
        })*

        pub(super) mod at {
            use super::Isa;

            $(#[allow(unsafe_code)]
            #[inline]
            pub(in super::super) fn $name(isa: Isa, $($arg: $type),*) $(-> $out)? {
                match isa {
                    // SAFETY: an `Isa` is only ever one that this processor has, and these have all that the function names.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { super::avx512::$name($($arg),*) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => unsafe { super::avx2::$name($($arg),*) },
                    _ => super::portable::$name($($arg),*),
                }
            })*
        }

        #[cfg(target_arch = "x86_64")]
        mod avx512 {
            $(#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
            pub(super) fn $name($($arg: $type),*) $(-> $out)? {
                super::portable::$name($($arg),*)
            })*
        }

        #[cfg(target_arch = "x86_64")]
        mod avx2 {
            $(#[target_feature(enable = "avx2")]
            pub(super) fn $name($($arg: $type),*) $(-> $out)? {
                super::portable::$name($($arg),*)
            })*
        }
    };
}

pub(crate) use by_isa;
