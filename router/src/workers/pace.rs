//! How long answers usually take, by size, over all workers: what tells a late answer from a large batch.
//!
//! In: how long each answer took. Out: from when on an answer of some size is late.
//! Never here: a verdict on a worker. Where too little is known, nothing is late.

use std::time::Duration;

use parking_lot::Mutex;

/// Sizes are told apart by powers of two.
const CLASSES: usize = 24;
/// Answers of one size that are remembered.
const REMEMBERED: usize = 64;
/// Answers that must be known before one can be late.
const ENOUGH: usize = 8;
/// An answer is late after this many times what nine out of ten take, and never sooner than that.
const LATE: (u32, Duration) = (4, Duration::from_millis(50));

/// Recent answers of all workers.
#[derive(Debug)]
pub struct Pace(Mutex<Vec<Recent>>);

#[derive(Clone, Debug, Default)]
struct Recent {
    took: Vec<Duration>,
    next: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self(Mutex::new(vec![Recent::default(); CLASSES]))
    }
}

fn class(assignments: usize) -> usize {
    (assignments.max(1).ilog2() as usize).min(CLASSES - 1)
}

impl Pace {
    /// An answer to `assignments` assignments took so long.
    pub fn observe(&self, assignments: usize, took: Duration) {
        let recent = &mut self.0.lock()[class(assignments)];
        if recent.took.len() < REMEMBERED {
            recent.took.push(took);
        } else {
            recent.took[recent.next] = took;
            recent.next = (recent.next + 1) % REMEMBERED;
        }
    }

    /// From when on an answer to `assignments` assignments is late; `None` where nobody knows.
    pub fn late_after(&self, assignments: usize) -> Option<Duration> {
        let (size, classes) = (class(assignments), self.0.lock());
        let larger = || (size + 1..CLASSES).find_map(|class| classes[class].usual());
        // What only smaller batches are known of may take as much longer as it is larger.
        let smaller = || (0..size).rev().find_map(|class| Some(classes[class].usual()? * (1 << (size - class))));
        let usual = classes[size].usual().or_else(smaller).or_else(larger)?;
        Some((usual * LATE.0).max(LATE.1))
    }
}

impl Recent {
    /// What nine out of ten take at most.
    fn usual(&self) -> Option<Duration> {
        if self.took.len() < ENOUGH {
            return None;
        }
        let mut took = self.took.clone();
        let at = took.len() * 9 / 10;
        Some(*took.select_nth_unstable(at).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn known(assignments: usize, took: Duration) -> Pace {
        let pace = Pace::default();
        for _ in 0..ENOUGH {
            pace.observe(assignments, took);
        }
        pace
    }

    #[test]
    fn nothing_is_late_before_enough_is_known() {
        let pace = Pace::default();
        for _ in 1..ENOUGH {
            pace.observe(4, ms(100));
            assert_eq!(pace.late_after(4), None);
        }
        pace.observe(4, ms(100));
        assert_eq!(pace.late_after(4), Some(ms(400)));
    }

    #[test]
    fn a_larger_batch_may_take_longer_and_a_smaller_one_as_long() {
        let pace = known(16, ms(100));
        assert_eq!(pace.late_after(64), Some(ms(1600)));
        assert_eq!(pace.late_after(1), Some(ms(400)));
        assert_eq!(pace.late_after(31), Some(ms(400)), "as what is known");
        assert!(pace.late_after(usize::MAX).is_some(), "no size overflows");
    }

    #[test]
    fn quick_answers_are_given_time_and_one_slow_one_changes_nothing() {
        let pace = known(1, ms(1));
        assert_eq!(pace.late_after(1), Some(LATE.1));
        for took in [ms(30_000), ms(1), ms(1)] {
            pace.observe(1, took);
        }
        assert_eq!(pace.late_after(1), Some(LATE.1));
        for _ in 0..2 * REMEMBERED {
            pace.observe(1, ms(200));
        }
        assert_eq!(pace.late_after(1), Some(ms(800)), "all of them change it");
    }
}
