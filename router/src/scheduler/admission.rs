//! Whether one more request may wait. Pure: whoever calls says what time it is.
//!
//! In: who comes, who starts, who leaves unserved. Out: a place, or why there is none and when to ask again.
//! Never here: the requests themselves, a clock, a lock.
//!
//! A request that would start too late to be answered is refused at once: computing it would take the room of one that
//! can be. So the work that is useful stays about the same however much more is asked for than can be done.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest time over which starts are counted: many start in the same step, and none in the next few.
const WINDOW: Duration = Duration::from_millis(200);
/// What one such count weighs against all before it.
const WEIGHT: f64 = 0.25;
/// Of what is left until the deadline, the share that may go into waiting; the rest is for the answer.
const WAITING_SHARE: f64 = 0.5;
/// Bounds of what somebody refused is told to wait.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// Counts who waits, and learns how often one of them starts.
#[derive(Clone, Debug)]
pub(super) struct Admission {
    bound: usize,
    waiting: usize,
    /// Seconds from one start to the next while others wait; `None` until that was seen.
    pace: Option<f64>,
    /// Since when starts are counted, and how many there were, the one at its beginning included. Only while somebody
    /// waits: when nobody does, the time between two starts tells of the clients and not of the engine.
    window: Option<(Instant, u32)>,
    /// Since when nobody waits.
    idle_since: Option<Instant>,
}

/// Why a request may not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// As many wait as may.
    Full,
    /// It would start after so long, and have too little time left.
    Late {
        /// The estimate.
        wait: Duration,
        /// When there may be less to wait for.
        retry_after: Duration,
    },
}

impl Admission {
    /// At most `bound` requests wait; at least one may.
    pub(super) fn new(bound: usize) -> Self {
        Self { bound: bound.max(1), waiting: 0, pace: None, window: None, idle_since: None }
    }

    /// One more request comes, with so much time until its deadline. With a place, it counts as waiting until it
    /// [starts](Self::started) or [leaves](Self::left). Where nobody waits, it always gets one.
    pub(super) fn admit(&mut self, now: Instant, until_deadline: Duration) -> Result<(), Refusal> {
        if self.waiting >= self.bound {
            return Err(Refusal::Full);
        }
        if self.waiting == 0 {
            // Nobody came for longer than one would have waited: what was learnt under load is out of date.
            let idle = self.idle_since.take().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            self.pace = self.pace.filter(|&pace| idle.as_secs_f64() < pace);
        } else if let Some(pace) = self.pace(now) {
            let wait = self.waiting as f64 * pace;
            let excess = wait - until_deadline.as_secs_f64() * WAITING_SHARE;
            if excess > 0.0 {
                return Err(Refusal::Late { wait: seconds(wait), retry_after: seconds(excess).max(RETRY_MIN) });
            }
        }
        self.waiting += 1;
        Ok(())
    }

    /// One of those who waited is computed from now on.
    pub(super) fn started(&mut self, now: Instant) {
        self.window = match self.window {
            Some((since, starts)) => {
                let elapsed = now.saturating_duration_since(since);
                if elapsed < WINDOW {
                    Some((since, starts + 1))
                } else {
                    let sample = elapsed.as_secs_f64() / f64::from(starts);
                    self.pace = Some(self.pace.map_or(sample, |pace| pace + (sample - pace) * WEIGHT));
                    Some((now, 1))
                }
            }
            None => Some((now, 1)),
        };
        self.left(now);
    }

    /// One of those who waited does not any more: its client gave up, or its deadline passed.
    pub(super) fn left(&mut self, now: Instant) {
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0 {
            self.window = None;
            self.idle_since = Some(now);
        }
    }

    /// How many wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The pace that was learnt, or the present window's where that is slower already: an engine that starts nobody is
    /// noticed before it starts the next one.
    fn pace(&self, now: Instant) -> Option<f64> {
        let learnt = self.pace?;
        let present = self
            .window
            .map_or(0.0, |(since, starts)| now.saturating_duration_since(since).as_secs_f64() / f64::from(starts));
        Some(learnt.max(present))
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX).min(RETRY_MAX)
}

#[cfg(test)]
mod tests;
