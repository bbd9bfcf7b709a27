//! How much memory experts may take.
//!
//! In: what the operator said, or nothing; what is free when the worker starts. Out: bytes; 0 is no limit. Never here: an
//! allocation, or who counts it.

use std::fmt;
use std::str::FromStr;

use conclave_model::device::{self, Device};
use conclave_runtime::memory::{self, BadMemory, Memory};

/// Of what is free on a GPU, what experts take at most where nobody said: the rest is for batches.
const SHARE_OF_GPU: f64 = 0.9;
/// Of what is free in main memory: others live there too.
const SHARE_OF_MAIN: f64 = 0.8;

/// As an operator says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// Most of what is free.
    Auto,
    /// So many bytes; 0 is no limit.
    Bytes(Memory),
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("how much memory is free cannot be read here: give --memory in bytes")]
    Unknown,
    #[error(transparent)]
    Device(#[from] device::Error),
}

/// Bytes for experts on `device`. Where nobody said, what a GPU has is the limit: beyond it nothing works. Main memory has
/// none: weights are mapped from files, and a machine may hold more of them than fits, at a price.
pub fn limit(said: Option<Limit>, device: Device) -> Result<u64, Error> {
    match (said, device) {
        (Some(Limit::Bytes(Memory(bytes))), _) => Ok(bytes),
        (None, Device::Cpu) => Ok(0),
        (Some(Limit::Auto), Device::Cpu) => Ok(share(memory::available().ok_or(Error::Unknown)?, SHARE_OF_MAIN)),
        (Some(Limit::Auto) | None, Device::Cuda(_)) => Ok(share(device.free_memory()?, SHARE_OF_GPU)),
    }
}

/// At least a byte: 0 would mean the opposite.
fn share(free: u64, share: f64) -> u64 {
    ((free as f64 * share) as u64).max(1)
}

impl FromStr for Limit {
    type Err = BadMemory;

    fn from_str(text: &str) -> Result<Self, BadMemory> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Bytes) }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Bytes(memory) => memory.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_given_found_or_none() {
        let limit = |text: &str| limit(Some(text.parse().unwrap()), Device::Cpu).unwrap();
        assert_eq!((limit("3KiB"), limit("0")), (3072, 0));
        let free = memory::available().unwrap();
        let found = limit("auto");
        assert!(found > 0 && found < free + free / 10, "{found} of {free}");
        assert_eq!(super::limit(None, Device::Cpu).unwrap(), 0);
        for text in ["auto", "16384"] {
            assert_eq!(text.parse::<Limit>().unwrap().to_string(), text);
        }
        assert!("automatic".parse::<Limit>().is_err());
    }
}
