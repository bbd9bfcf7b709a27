//! Which experts could not be loaded, and what follows: each failure and each moment comes in; whether to try again now, and
//! what to tell the cluster, goes out. No clock is read here, and nothing is loaded.

use std::collections::HashMap;
use std::time::Duration;

use conclave_placement::ids::{ExpertId, LayerIdx};
use conclave_placement::state::Residency;
use tokio::time::Instant;

/// Between two attempts: doubles from the first to the second.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A failure in a row from which on the cluster is told: the first may have been a moment's.
const TOLD_FROM: u32 = 2;
/// How long it is told after the last attempt: then the expert may be given to this worker again.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct Failures(HashMap<(LayerIdx, ExpertId), Failed>);

#[derive(Debug)]
struct Failed {
    times: u32,
    last: Instant,
    again: Instant,
}

impl Failures {
    /// One more attempt failed.
    pub fn failed(&mut self, expert: (LayerIdx, ExpertId), now: Instant) {
        let failed = self.0.entry(expert).or_insert(Failed { times: 0, last: now, again: now });
        let pause = PAUSE.0.saturating_mul(1 << failed.times.min(8)).min(PAUSE.1);
        *failed = Failed { times: failed.times + 1, last: now, again: now + pause };
    }

    /// It is here after all.
    pub fn succeeded(&mut self, expert: (LayerIdx, ExpertId)) {
        self.0.remove(&expert);
    }

    /// Whether it may be tried now.
    pub fn may_try(&self, expert: (LayerIdx, ExpertId), now: Instant) -> bool {
        self.0.get(&expert).is_none_or(|failed| failed.again <= now)
    }

    /// What the cluster is to know.
    pub fn told(&self) -> Residency {
        self.0.iter().filter(|(_, failed)| failed.times >= TOLD_FROM).map(|(expert, _)| *expert).collect()
    }

    /// Forgets what was long ago.
    pub fn forget(&mut self, now: Instant) {
        self.0.retain(|_, failed| failed.forgotten() > now);
    }

    /// When there is something to do though nothing happens: an expert of `assigned` to try, or a failure to forget.
    pub fn next(&self, assigned: &Residency) -> Option<Instant> {
        let next = |(expert, failed): (&(LayerIdx, ExpertId), &Failed)| match assigned.contains(expert.0, expert.1) {
            true => failed.again,
            false => failed.forgotten(),
        };
        self.0.iter().map(next).min()
    }
}

impl Failed {
    fn forgotten(&self) -> Instant {
        self.last + FORGOTTEN_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPERT: (LayerIdx, ExpertId) = (LayerIdx(1), ExpertId(7));

    #[test]
    fn what_fails_again_is_told_tried_less_and_less_and_forgotten_in_the_end() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        failures.failed(EXPERT, start);
        assert!(!failures.may_try(EXPERT, start) && failures.may_try(EXPERT, at(1)));
        assert!(failures.told().is_empty(), "it may have been a moment's");
        failures.failed(EXPERT, at(1));
        assert!(failures.told().contains(EXPERT.0, EXPERT.1));
        assert!(!failures.may_try(EXPERT, at(2)) && failures.may_try(EXPERT, at(3)));
        let assigned = Residency::from_iter([EXPERT]);
        assert_eq!((failures.next(&assigned), failures.next(&Residency::new())), (Some(at(3)), Some(at(61))));
        for _ in 0..100 {
            failures.failed(EXPERT, at(4));
        }
        assert!(failures.may_try(EXPERT, at(34)), "no pause is longer than half a minute");
        failures.forget(at(64));
        assert!(failures.told().is_empty() && failures.may_try(EXPERT, at(64)));
    }

    #[test]
    fn what_is_here_has_not_failed() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        failures.failed(EXPERT, now);
        failures.succeeded(EXPERT);
        assert!(failures.may_try(EXPERT, now) && failures.next(&Residency::new()).is_none());
    }
}
