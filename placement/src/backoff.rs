//! How long to wait before trying again: twice as long each time, up to a cap, and never the same for everybody.
//!
//! In: failures and successes. Out: waits. Never here: a limit on the number of tries; who tries has a token or a deadline.

use std::time::Duration;

use crate::chance;

const FIRST: Duration = Duration::from_millis(50);
const CAP: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// The next wait: between half of it and the whole of it.
    pub(crate) fn next(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(CAP);
        whole.mul_f64(chance::draw(0.5..=1.0))
    }

    pub(crate) fn reset(&mut self) {
        self.next = FIRST;
    }

    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_differ() {
        let mut backoff = Backoff::new();
        for _ in 0..20 {
            assert!(backoff.next() <= CAP);
        }
        let late = backoff.next();
        assert!(late >= CAP / 2);
        assert_ne!((late, backoff.next()), (backoff.next(), backoff.next()), "jitter");
        backoff.reset();
        assert!(backoff.next() <= FIRST);
    }
}
