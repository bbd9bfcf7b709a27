//! Where a router's time goes, by phase of a step.
//!
//! In: durations, from the engine's thread and from the streams' tasks. Out: the same, summed since start, for whoever
//! scrapes. Never here: a lock, an allocation, a label that is not in this list.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// A part of a step. The first and the last are this router's own work, one after the other on the engine's thread; those
/// of a worker's batch run beside each other, once per batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Norms and latent attention.
    Attention,
    /// The dense layers' own network.
    Dense,
    /// Which experts each row goes to, and the rows as numbers.
    Gate,
    /// Which worker each row goes to.
    Plan,
    /// Rows looked at and encoded for the wire, and copied into each message.
    Encode,
    /// The shared experts, computed while rows are away, or before they leave where workers share the processors.
    Shared,
    /// Of a batch: from its sending to its answer, less what the worker says it took.
    Wire,
    /// Of a batch: in the worker's queue.
    Queue,
    /// Of a batch: on the worker's tensor thread.
    Expert,
    /// Of a batch: its answer decoded and checked.
    Decode,
    /// The weighted sums and the residual.
    Combine,
    /// Final norm and head: logits.
    Head,
    /// Tokens drawn and told.
    Sample,
}

impl Phase {
    /// All, in the order of a step, with their names.
    pub const ALL: [(Self, &str); 13] = [
        (Self::Attention, "attention"),
        (Self::Dense, "dense"),
        (Self::Gate, "gate"),
        (Self::Plan, "plan"),
        (Self::Encode, "encode"),
        (Self::Shared, "shared"),
        (Self::Wire, "wire"),
        (Self::Queue, "queue"),
        (Self::Expert, "expert"),
        (Self::Decode, "decode"),
        (Self::Combine, "combine"),
        (Self::Head, "head"),
        (Self::Sample, "sample"),
    ];
}

/// Nanoseconds since start, by phase.
#[derive(Debug, Default)]
pub struct Phases([AtomicU64; Phase::ALL.len()]);

impl Phases {
    /// Counts `took` to `phase`.
    pub fn add(&self, phase: Phase, took: Duration) {
        // Five centuries fit.
        self.0[phase as usize].fetch_add(took.as_nanos() as u64, Relaxed);
    }

    /// Runs `work` and counts its time.
    pub fn timed<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = work();
        self.add(phase, began.elapsed());
        done
    }

    /// What was counted so far.
    pub fn spent(&self, phase: Phase) -> Duration {
        Duration::from_nanos(self.0[phase as usize].load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_phase_has_a_place_of_its_own() {
        let phases = Phases::default();
        for (place, (phase, _)) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase as usize, place);
            phases.add(phase, Duration::from_millis(place as u64));
        }
        for (place, (phase, _)) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phases.spent(phase), Duration::from_millis(place as u64));
        }
        assert_eq!(phases.timed(Phase::Gate, || 7), 7);
    }
}
