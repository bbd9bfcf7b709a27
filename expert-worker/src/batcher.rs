//! What waits for the tensor thread: batches come in from all routers, groups of one layer go out. Rows of one expert that
//! wait at the same time are computed together, because reading the expert's weights is the cost. Bounded by batches and by
//! values; pure, so nothing is computed or awaited here.
//!
//! The lowest layer goes first: who is behind catches up with who is ahead, and from then on they go forward together,
//! each expert's weights read once for all of them. Nobody starves for it: once the oldest batch has been passed over
//! [`PASSED_OVER`] times, its layer is next.
//!
//! Nobody is made to wait for company: a group is what is there. `batcher/simulation.rs` measures what waits of other
//! lengths would bring: a thread that is busy finds company waiting anyway, and one that is idle only loses the time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use conclave_model::compute::{Computed, ExpertBatch};
use tokio::sync::oneshot;

/// Assignments computed in one go, at most (a single larger batch still goes alone): past this the weights' cost is
/// spread thin already and the youngest of the group would only delay the oldest.
pub const MAX_GROUP_ASSIGNMENTS: usize = 4096;

/// How many groups of lower layers may go before the oldest batch.
pub const PASSED_OVER: u32 = 4;

/// f32 values that may wait in all, 1 GiB of them; a single batch is always let in.
pub const MAX_WAITING_VALUES: usize = 1 << 28;

/// The longest and the shortest that a refused router is told to wait.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(1));

/// Why a batch gets no rows. Each becomes one `RefusedReason` on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    Busy {
        message: &'static str,
        retry_after: Duration,
    },
    Draining,
    /// The experts of this batch that are not here, ascending. Nothing was computed.
    NotResident(Vec<u16>),
    /// What contradicts what.
    Invalid(String),
    Internal(String),
}

/// What a batch gets, and where its time went.
#[derive(Debug)]
pub struct Answer {
    /// One output row per assignment, or per row where the batch carries weights.
    pub outcome: Result<Computed, Refusal>,
    pub queued: Duration,
    pub computed: Duration,
}

/// A batch that waits, and who waits for it.
#[derive(Debug)]
pub struct Pending {
    pub batch: ExpertBatch,
    pub arrived: Instant,
    pub deadline: Instant,
    pub answer: oneshot::Sender<Answer>,
}

/// What [`Batcher::take`] found.
#[derive(Debug, Default)]
pub struct Taken {
    /// Waited past their deadline: refuse them.
    pub expired: Vec<Pending>,
    /// Of one layer, in order of arrival: compute them together. Empty where nothing waits.
    pub group: Vec<Pending>,
}

#[derive(Debug)]
pub struct Batcher {
    waiting: VecDeque<Pending>,
    values: usize,
    max_batches: usize,
    /// Groups that have gone before the batch that is the oldest now, and how many may.
    passed_over: u32,
    may_pass: u32,
    /// Moving average of what one batch costs, seconds.
    batch_seconds: f64,
}

impl Batcher {
    pub fn new(max_batches: usize) -> Self {
        Self {
            waiting: VecDeque::new(),
            values: 0,
            max_batches: max_batches.max(1),
            passed_over: 0,
            may_pass: PASSED_OVER,
            batch_seconds: 0.0,
        }
    }

    /// Lets a batch wait, or says when to come back.
    pub fn push(&mut self, pending: Pending) -> Result<(), Refusal> {
        let values = pending.batch.hidden.len();
        let too_many = self.waiting.len() >= self.max_batches;
        let too_large = !self.waiting.is_empty() && self.values.saturating_add(values) > MAX_WAITING_VALUES;
        if too_many || too_large {
            return Err(Refusal::Busy { message: "the queue is full", retry_after: self.retry_after() });
        }
        self.values += values;
        self.waiting.push_back(pending);
        Ok(())
    }

    /// Takes the layer whose turn it is, and of it what can be computed together, in order of arrival, up to
    /// [`MAX_GROUP_ASSIGNMENTS`]. Batches nobody waits for any more are dropped.
    pub fn take(&mut self, now: Instant) -> Taken {
        let mut taken = Taken::default();
        let oldest = self.waiting.front().map(|pending| pending.arrived);
        for pending in std::mem::take(&mut self.waiting) {
            let gone = pending.answer.is_closed();
            if !gone && pending.deadline > now {
                self.waiting.push_back(pending);
                continue;
            }
            self.values -= pending.batch.hidden.len();
            if !gone {
                taken.expired.push(pending);
            }
        }
        let Some(first) = self.waiting.front() else { return taken };
        if oldest != Some(first.arrived) {
            self.passed_over = 0;
        }
        let lowest = self.waiting.iter().map(|pending| pending.batch.layer).min().unwrap_or(first.batch.layer);
        let layer = if self.passed_over < self.may_pass { lowest } else { first.batch.layer };
        self.passed_over = if layer == first.batch.layer { 0 } else { self.passed_over + 1 };
        self.take_layer(layer, &mut taken.group);
        taken
    }

    fn take_layer(&mut self, layer: u32, group: &mut Vec<Pending>) {
        let (mut assignments, mut full) = (0, false);
        for pending in std::mem::take(&mut self.waiting) {
            let size = pending.batch.expert_ids.len();
            let fits = !full && (group.is_empty() || assignments + size <= MAX_GROUP_ASSIGNMENTS);
            if pending.batch.layer != layer || !fits {
                // Later ones of this layer stay behind it: nobody is overtaken by a smaller batch.
                full |= pending.batch.layer == layer;
                self.waiting.push_back(pending);
            } else {
                assignments += size;
                self.values -= pending.batch.hidden.len();
                group.push(pending);
            }
        }
    }

    /// Learns from a computed group what a batch costs.
    pub fn finished(&mut self, batches: usize, took: Duration) {
        let each = took.as_secs_f64() / batches.max(1) as f64;
        self.batch_seconds = if self.batch_seconds == 0.0 { each } else { 0.9 * self.batch_seconds + 0.1 * each };
    }

    /// When the queue will have emptied, by what batches cost lately.
    pub fn retry_after(&self) -> Duration {
        let (least, most) = RETRY_AFTER;
        let seconds = self.batch_seconds * self.waiting.len() as f64;
        Duration::try_from_secs_f64(seconds).unwrap_or(most).clamp(least, most)
    }

    /// f32 values that wait.
    pub fn values(&self) -> usize {
        self.values
    }

    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod simulation;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pending(layer: u32, assignments: usize, deadline: Instant) -> (Pending, oneshot::Receiver<Answer>) {
        let (answer, waits) = oneshot::channel();
        let batch = ExpertBatch {
            layer,
            rows: 1,
            hidden: vec![0.0; 4],
            expert_ids: vec![0; assignments],
            row_ids: vec![0; assignments],
            weights: None,
        };
        (Pending { batch, arrived: Instant::now(), deadline, answer }, waits)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(3600)
    }

    #[test]
    fn what_waits_for_one_layer_is_taken_together_the_lowest_layer_first() {
        let mut batcher = Batcher::new(8);
        let mut waits = Vec::new();
        for (layer, size) in [(3, 1), (1, 2), (3, 5), (1, 7)] {
            let (pending, wait) = pending(layer, size, later());
            batcher.push(pending).unwrap();
            waits.push(wait);
        }
        let sizes = |taken: Taken| taken.group.iter().map(|p| p.batch.expert_ids.len()).collect::<Vec<_>>();
        assert_eq!(sizes(batcher.take(Instant::now())), [2, 7]);
        assert_eq!(sizes(batcher.take(Instant::now())), [1, 5]);
        assert!(batcher.take(Instant::now()).group.is_empty());
        assert_eq!(batcher.values, 0);
    }

    #[test]
    fn a_full_queue_refuses_and_says_when_to_return() {
        let mut batcher = Batcher::new(1);
        batcher.finished(1, Duration::from_millis(20));
        let (first, _wait) = pending(0, 1, later());
        batcher.push(first).unwrap();
        let (second, _wait) = pending(0, 1, later());
        let refusal = batcher.push(second).unwrap_err();
        let Refusal::Busy { retry_after, .. } = refusal else { panic!("{refusal:?}") };
        assert_eq!(retry_after, Duration::from_millis(20));
    }

    #[test]
    fn the_late_are_refused_and_the_abandoned_are_dropped() {
        let mut batcher = Batcher::new(8);
        let (late, _late_waits) = pending(0, 1, Instant::now());
        let (abandoned, waits) = pending(0, 1, later());
        let (alive, _alive_waits) = pending(0, 1, later());
        drop(waits);
        for pending in [late, abandoned, alive] {
            batcher.push(pending).unwrap();
        }
        let taken = batcher.take(Instant::now());
        assert_eq!((taken.expired.len(), taken.group.len(), batcher.len()), (1, 1, 0));
    }

    proptest! {
        /// Whatever keeps coming: the oldest batch is passed over a few times at most, so each has its turn within as many
        /// times that as there were batches before it.
        #[test]
        fn nobody_starves(layers in prop::collection::vec(0u32..6, 1..20), newcomers in prop::collection::vec(0u32..6, 200)) {
            let mut batcher = Batcher::new(1000);
            let mut waits = Vec::new();
            let mut add = |batcher: &mut Batcher, layer, number| {
                let (pending, wait) = pending(layer, number, later());
                batcher.push(pending).unwrap();
                waits.push(wait);
            };
            // A batch's number of assignments is its name.
            for (number, layer) in layers.iter().enumerate() {
                add(&mut batcher, *layer, number + 1);
            }
            let mut left = vec![false; layers.len()];
            for (turn, layer) in newcomers.iter().enumerate() {
                for pending in batcher.take(Instant::now()).group {
                    if let Some(left) = left.get_mut(pending.batch.expert_ids.len() - 1) {
                        *left = true;
                    }
                }
                let turns = |number: usize| (number + 1) * (PASSED_OVER as usize + 1);
                for (number, left) in left.iter().enumerate() {
                    prop_assert!(*left || turn + 1 < turns(number), "batch {} after {} turns", number, turn + 1);
                }
                add(&mut batcher, *layer, 1000);
            }
        }

        #[test]
        fn every_batch_leaves_once_in_order_within_its_layer(sizes in prop::collection::vec((0u32..4, 1usize..5000), 1..60)) {
            let mut batcher = Batcher::new(64);
            let mut waits = Vec::new();
            for (layer, size) in &sizes {
                let (pending, wait) = pending(*layer, *size, later());
                batcher.push(pending).unwrap();
                waits.push(wait);
            }
            let mut left: Vec<Vec<usize>> = vec![Vec::new(); 4];
            while !batcher.is_empty() {
                let group = batcher.take(Instant::now()).group;
                let total: usize = group.iter().map(|p| p.batch.expert_ids.len()).sum();
                prop_assert!(!group.is_empty() && (group.len() == 1 || total <= MAX_GROUP_ASSIGNMENTS));
                prop_assert!(group.iter().all(|p| p.batch.layer == group[0].batch.layer));
                left[group[0].batch.layer as usize].extend(group.iter().map(|p| p.batch.expert_ids.len()));
            }
            for layer in 0..4u32 {
                let pushed: Vec<_> = sizes.iter().filter(|(l, _)| *l == layer).map(|(_, size)| *size).collect();
                prop_assert_eq!(&left[layer as usize], &pushed);
            }
            prop_assert_eq!(batcher.values, 0);
        }
    }
}
