//! Which experts are here: the reconciler adds and takes away, the service asks, the registration publishes. A snapshot
//! that is replaced whole, so a reader never waits for a load. It knows names only; the weights live on the tensor
//! thread, because libtorch's tensors may not be shared between threads.
//!
//! An expert leaves in two steps. First it *retires*: it is no longer told to the cluster, and is still answered for,
//! because a router may not have heard yet. Then it is forgotten, and only after that its weights are dropped.

use std::sync::Arc;

use conclave_placement::ids::{ExpertId, LayerIdx};
use conclave_placement::state::Residency;
use parking_lot::RwLock;

/// What is resident at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// What the cluster is told.
    pub experts: Residency,
    /// What is only still answered for.
    pub retiring: Residency,
    /// Of both.
    pub count: u64,
    pub bytes: u64,
}

#[derive(Debug, Default)]
pub struct Resident {
    current: RwLock<Arc<Snapshot>>,
}

impl Resident {
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current.read())
    }

    /// Says that an expert is here. Call it after the tensor thread has it, never before.
    pub fn insert(&self, layer: LayerIdx, expert: ExpertId, bytes: u64) {
        let mut current = self.current.write();
        let next = Arc::make_mut(&mut current);
        if next.experts.insert(layer, expert) && !next.retiring.remove(layer, expert) {
            next.count += 1;
            next.bytes += bytes;
        }
    }

    /// Tells no more of an expert that is here. False where it is not.
    pub fn retire(&self, layer: LayerIdx, expert: ExpertId) -> bool {
        let mut current = self.current.write();
        let next = Arc::make_mut(&mut current);
        next.experts.remove(layer, expert) && next.retiring.insert(layer, expert)
    }

    /// Tells of a retiring expert again. False where there is none: its weights may be gone.
    pub fn revive(&self, layer: LayerIdx, expert: ExpertId) -> bool {
        let mut current = self.current.write();
        let next = Arc::make_mut(&mut current);
        next.retiring.remove(layer, expert) && next.experts.insert(layer, expert)
    }

    /// Answers no more for a retiring expert. False where it is not retiring. Drop its weights after this, never before.
    pub fn forget(&self, layer: LayerIdx, expert: ExpertId, bytes: u64) -> bool {
        let mut current = self.current.write();
        let next = Arc::make_mut(&mut current);
        let forgotten = next.retiring.remove(layer, expert);
        if forgotten {
            next.count -= 1;
            next.bytes -= bytes;
        }
        forgotten
    }

    /// The experts among `ids` that are not here, ascending, each once.
    pub fn missing(&self, layer: LayerIdx, ids: &[u16]) -> Vec<u16> {
        let snapshot = self.snapshot();
        let here = |id: ExpertId| snapshot.experts.contains(layer, id) || snapshot.retiring.contains(layer, id);
        let mut missing: Vec<u16> = ids.iter().copied().filter(|id| !here(ExpertId(*id))).collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: LayerIdx = LayerIdx(2);

    #[test]
    fn what_is_missing_is_named_once_and_in_order() {
        let resident = Resident::default();
        resident.insert(LAYER, ExpertId(5), 100);
        resident.insert(LAYER, ExpertId(5), 100);
        assert_eq!(resident.missing(LAYER, &[9, 5, 1, 9]), [1, 9]);
        assert_eq!(resident.missing(LayerIdx(3), &[5]), [5]);
        let snapshot = resident.snapshot();
        assert_eq!((snapshot.count, snapshot.bytes), (1, 100));
    }

    #[test]
    fn an_expert_that_retires_is_answered_for_until_it_is_forgotten() {
        let resident = Resident::default();
        resident.insert(LAYER, ExpertId(5), 100);
        assert!(resident.retire(LAYER, ExpertId(5)) && !resident.retire(LAYER, ExpertId(5)));
        assert!(resident.snapshot().experts.is_empty(), "nobody is told");
        assert!(resident.missing(LAYER, &[5]).is_empty(), "whoever asks is answered");
        assert_eq!(resident.snapshot().bytes, 100, "it still takes memory");

        assert!(resident.revive(LAYER, ExpertId(5)));
        assert!(!resident.forget(LAYER, ExpertId(5), 100), "only what retires can be forgotten");
        assert!(resident.retire(LAYER, ExpertId(5)) && resident.forget(LAYER, ExpertId(5), 100));
        assert_eq!(resident.missing(LAYER, &[5]), [5]);
        assert!(!resident.revive(LAYER, ExpertId(5)), "it would have to be loaded");
        assert_eq!((resident.snapshot().count, resident.snapshot().bytes), (0, 0));
    }

    #[test]
    fn an_expert_that_is_loaded_anew_while_it_retires_counts_once() {
        let resident = Resident::default();
        resident.insert(LAYER, ExpertId(5), 100);
        resident.retire(LAYER, ExpertId(5));
        resident.insert(LAYER, ExpertId(5), 100);
        assert_eq!((resident.snapshot().count, resident.snapshot().retiring.len()), (1, 0));
    }
}
