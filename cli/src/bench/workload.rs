//! What is sent: a seed and the wanted distributions come in; out go the requests' times and lengths, and each one's
//! token ids when it is about to leave (all prompts of a long run would not fit into memory). Pure.

use std::ops::RangeInclusive;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::arrivals::arrivals;

/// A length that is drawn uniformly around its mean.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spread {
    /// Tokens; at least 1.
    pub(super) length: u32,
    /// In [0, 1): how far from `length`, as a part of it.
    pub(super) ratio: f64,
}

impl Spread {
    /// The lengths that may be drawn: at least one token.
    pub(super) fn range(self) -> RangeInclusive<u32> {
        let length = f64::from(self.length);
        // A float becomes the nearest u32, so the largest length is not exceeded.
        let low = (length * (1.0 - self.ratio)).floor() as u32;
        let high = (length * (1.0 + self.ratio)).ceil() as u32;
        low.max(1)..=high.max(1)
    }
}

/// A whole run. The same values make the same requests at the same times.
#[derive(Debug, Clone)]
pub(super) struct Workload {
    pub(super) seed: u64,
    /// Token ids are below this; at least 1.
    pub(super) vocab_size: u32,
    pub(super) requests: u32,
    /// Requests a second; infinite: all at once.
    pub(super) rate: f64,
    /// Shape of the gaps' gamma distribution.
    pub(super) burstiness: f64,
    /// Tokens that all prompts begin with.
    pub(super) shared_prefix: u32,
    /// Further tokens of a prompt.
    pub(super) input: Spread,
    pub(super) output: Spread,
}

/// One request before it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Planned {
    /// Since the start.
    pub(super) due: Duration,
    /// Which prompt.
    pub(super) index: u32,
    /// Tokens of the prompt after the shared prefix.
    pub(super) input: u32,
    pub(super) output: u32,
}

/// What is drawn with one seed: each has a generator of its own, so that drawing more of one changes no other.
#[derive(Clone, Copy)]
enum Draw {
    Times,
    Lengths,
    Prefix,
    Prompt(u32),
}

impl Workload {
    /// All requests in the order of their times.
    pub(super) fn plan(&self) -> Vec<Planned> {
        let times = arrivals(self.requests, self.rate, self.burstiness, &mut self.random(Draw::Times));
        let mut lengths = self.random(Draw::Lengths);
        let mut planned = |(index, due)| Planned { due, ..self.draw_lengths(index, &mut lengths) };
        (0..).zip(times).map(&mut planned).collect()
    }

    /// `count` further requests, due at once, whose prompts are none of the plan's.
    pub(super) fn warm_up(&self, count: u32) -> Vec<Planned> {
        let mut lengths = self.random(Draw::Lengths);
        (0..count).map(|extra| self.draw_lengths(self.requests.saturating_add(extra), &mut lengths)).collect()
    }

    fn draw_lengths(&self, index: u32, random: &mut StdRng) -> Planned {
        let input = random.random_range(self.input.range());
        let output = random.random_range(self.output.range());
        Planned { due: Duration::ZERO, index, input, output }
    }

    /// The token ids of `planned`: the shared prefix, then its own.
    pub(super) fn prompt(&self, planned: Planned) -> Vec<u32> {
        let draw = |count: u32, mut random: StdRng| (0..count).map(move |_| random.random_range(0..self.vocab_size));
        let prefix = draw(self.shared_prefix, self.random(Draw::Prefix));
        prefix.chain(draw(planned.input, self.random(Draw::Prompt(planned.index)))).collect()
    }

    fn random(&self, draw: Draw) -> StdRng {
        let (purpose, index) = match draw {
            Draw::Times => (0, 0),
            Draw::Lengths => (1, 0),
            Draw::Prefix => (2, 0),
            Draw::Prompt(index) => (3, index),
        };
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        key[8] = purpose;
        key[16..20].copy_from_slice(&index.to_le_bytes());
        StdRng::from_seed(key)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn workload(seed: u64, shared_prefix: u32, ratio: f64) -> Workload {
        let spread = |length| Spread { length, ratio };
        let (input, output) = (spread(20), spread(10));
        Workload { seed, vocab_size: 50, requests: 30, rate: 5.0, burstiness: 1.0, shared_prefix, input, output }
    }

    #[test]
    fn a_range_lies_evenly_around_its_length() {
        assert_eq!(Spread { length: 100, ratio: 0.0 }.range(), 100..=100);
        assert_eq!(Spread { length: 100, ratio: 0.25 }.range(), 75..=125);
        assert_eq!(Spread { length: 3, ratio: 0.5 }.range(), 1..=5);
        assert_eq!(Spread { length: 1, ratio: 0.9 }.range(), 1..=2);
        assert_eq!(*Spread { length: u32::MAX, ratio: 0.5 }.range().end(), u32::MAX);
    }

    #[test]
    fn another_seed_is_another_workload() {
        let (here, there) = (workload(1, 5, 0.5), workload(2, 5, 0.5));
        assert_ne!(here.plan(), there.plan());
        assert_ne!(here.prompt(here.plan()[0]), there.prompt(here.plan()[0]));
    }

    #[test]
    fn warming_up_reads_none_of_the_measured_prompts() {
        let workload = workload(3, 0, 0.0);
        let measured: Vec<_> = workload.plan().into_iter().map(|planned| workload.prompt(planned)).collect();
        for planned in workload.warm_up(4) {
            assert!(!measured.contains(&workload.prompt(planned)));
        }
    }

    proptest! {
        #[test]
        fn prompts_share_their_prefix_and_nothing_else(seed: u64, prefix in 0_u32..40) {
            let workload = workload(seed, prefix, 0.0);
            let prompts: Vec<_> = workload.plan().into_iter().map(|planned| workload.prompt(planned)).collect();
            let prefix = prefix as usize;
            for prompt in &prompts[1..] {
                prop_assert_eq!(&prompt[..prefix], &prompts[0][..prefix]);
                prop_assert_ne!(&prompt[prefix..], &prompts[0][prefix..]);
            }
        }

        #[test]
        fn lengths_and_ids_stay_in_their_ranges(seed: u64, ratio in 0.0..1.0_f64) {
            let workload = workload(seed, 3, ratio);
            for planned in workload.plan() {
                prop_assert!(workload.input.range().contains(&planned.input));
                prop_assert!(workload.output.range().contains(&planned.output));
                let prompt = workload.prompt(planned);
                prop_assert_eq!(prompt.len(), 3 + planned.input as usize);
                prop_assert!(prompt.iter().all(|id| *id < 50));
            }
        }
    }
}
