//! Chance: what jitter, leases and incarnations are drawn from, in this one place.
//!
//! In: a range. Out: a number in it, different for everybody. Never here: a secret. A simulation may ask for the same
//! numbers again, thread by thread; nothing else has a reason to.

use std::cell::RefCell;

use rand::distr::uniform::{SampleRange, SampleUniform};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

thread_local! {
    static REPEATED: RefCell<Option<SmallRng>> = const { RefCell::new(None) };
}

/// From here on, this thread draws the numbers that belong to `seed`. For simulations only.
pub fn repeat(seed: u64) {
    REPEATED.set(Some(SmallRng::seed_from_u64(seed)));
}

pub(crate) fn draw<T: SampleUniform>(range: impl SampleRange<T>) -> T {
    REPEATED.with_borrow_mut(|repeated| match repeated {
        Some(repeated) => repeated.random_range(range),
        None => rand::random_range(range),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_seed_makes_chance_repeat_itself() {
        let draw = || [0; 4].map(|_| draw(0..u64::MAX));
        assert_ne!(draw(), draw());
        repeat(7);
        let first = draw();
        assert_ne!(first, draw());
        repeat(7);
        assert_eq!(first, draw());
    }
}
