//! Which experts are here: the loader adds, the service asks, the registration publishes. A snapshot that is replaced
//! whole, so a reader never waits for a load. It knows names only; the weights live on the tensor thread, because
//! libtorch's tensors may not be shared between threads.
//!
//! It only grows for now: a plan that takes an expert away leaves it resident until the process ends. Routers use what
//! is resident and prefer the plan, so that costs memory, never correctness.

use std::sync::Arc;

use conclave_placement::ids::{ExpertId, LayerIdx};
use conclave_placement::state::Residency;
use parking_lot::RwLock;

/// What is resident at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    pub experts: Residency,
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
        if next.experts.insert(layer, expert) {
            next.count += 1;
            next.bytes += bytes;
        }
    }

    /// The experts among `ids` that are not here, ascending, each once.
    pub fn missing(&self, layer: LayerIdx, ids: &[u16]) -> Vec<u16> {
        let snapshot = self.snapshot();
        let absent = |id: &u16| !snapshot.experts.contains(layer, ExpertId(*id));
        let mut missing: Vec<u16> = ids.iter().copied().filter(absent).collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_once_and_in_order() {
        let resident = Resident::default();
        resident.insert(LayerIdx(2), ExpertId(5), 100);
        resident.insert(LayerIdx(2), ExpertId(5), 100);
        assert_eq!(resident.missing(LayerIdx(2), &[9, 5, 1, 9]), [1, 9]);
        assert_eq!(resident.missing(LayerIdx(3), &[5]), [5]);
        let snapshot = resident.snapshot();
        assert_eq!((snapshot.count, snapshot.bytes), (1, 100));
    }
}
