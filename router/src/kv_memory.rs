//! How many blocks the latent cache gets.
//!
//! In: what the operator gave, or what is free; what the model can use. Out: a number of blocks. Never here: an allocation.

use conclave_model::{
    cache::{BLOCK_TOKENS, KvCache},
    config::ModelConfig,
    device::{self, Compute, Device},
};
use conclave_runtime::memory::{self, Memory};

/// Of the memory that is free when the router starts: what the cache takes at most where nobody said.
const DEFAULT_SHARE: f64 = 0.2;

/// Why there is no cache.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not even one block.
    #[error("--kv-memory of {bytes} bytes holds no block: one of {BLOCK_TOKENS} tokens takes {block_bytes} bytes")]
    TooSmall {
        /// Given, or a share of what is free.
        bytes: u64,
        /// Needed for one.
        block_bytes: u64,
    },
    /// Nobody said, and the machine does not say what is free.
    #[error("how much memory is free cannot be read here: give --kv-memory")]
    Unknown,
    /// As above, of the device.
    #[error(transparent)]
    Device(#[from] device::Error),
}

/// Blocks for `layers` layers of `config`: as many as `given` holds, else a fifth of what is free on the device; no more than
/// `sequences` sequences of the longest context can fill.
pub(crate) fn blocks(
    given: Option<Memory>,
    config: &ModelConfig,
    compute: Compute,
    layers: usize,
    sequences: usize,
) -> Result<usize, Error> {
    let bytes = match given {
        Some(given) => given.0,
        None => (free(compute.device)? as f64 * DEFAULT_SHARE) as u64,
    };
    let useful = config.max_position_embeddings.div_ceil(BLOCK_TOKENS).saturating_mul(sequences);
    holds(bytes, KvCache::block_bytes(config, compute, layers) as u64, useful)
}

fn holds(bytes: u64, block_bytes: u64, useful: usize) -> Result<usize, Error> {
    match usize::try_from(bytes / block_bytes.max(1)).unwrap_or(usize::MAX) {
        0 => Err(Error::TooSmall { bytes, block_bytes }),
        // A block's place is a u32 everywhere.
        blocks => Ok(blocks.min(useful).min(u32::MAX as usize / BLOCK_TOKENS)),
    }
}

fn free(device: Device) -> Result<u64, Error> {
    match device {
        Device::Cpu => memory::available().ok_or(Error::Unknown),
        Device::Cuda(_) => Ok(device.free_memory()?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_fit_and_no_more_than_are_of_use() {
        assert_eq!(holds(1000, 100, 50).expect("fits"), 10);
        assert_eq!(holds(1_000_000, 100, 50).expect("fits"), 50);
        let message = holds(99, 100, 50).expect_err("too small").to_string();
        assert!(message.contains("99 bytes") && message.contains("100 bytes"), "{message}");
    }
}
