//! Prompts of random token ids: a vocabulary's size comes in, prompts that no cache has seen go out, the same in every
//! run. What they say does not matter to the time they take.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[derive(Debug)]
pub(crate) struct Prompts {
    vocab_size: u32,
    random: StdRng,
}

impl Prompts {
    /// Ids below `vocab_size`, which is at least 1.
    pub(crate) fn new(vocab_size: u32) -> Self {
        Self { vocab_size: vocab_size.max(1), random: StdRng::seed_from_u64(0) }
    }

    /// The next `count` ids.
    pub(crate) fn draw(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.random.random_range(0..self.vocab_size)).collect()
    }
}
