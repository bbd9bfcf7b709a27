//! One immutable picture of who can be asked for which expert. The only thing the data path plans by.
//!
//! In: the cluster's state and the links. Out: holders per (layer, expert), as indices into one list of workers.
//! Never here: workers whose link is down; they are as good as absent.

use std::collections::BTreeMap;

use conclave_placement::{
    ids::{Incarnation, PlanVersion, WorkerId},
    state::{ClusterState, WorkerState},
};

use super::Link;

/// A worker that can be asked now.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Its name.
    pub id: WorkerId,
    /// Sends to it.
    pub link: Link,
}

/// Who can be asked for what.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The plan in force.
    pub plan_version: PlanVersion,
    /// Reachable workers, by name.
    pub workers: Vec<Reach>,
    /// Per layer, per expert, indices into `workers`.
    holders: BTreeMap<u32, Vec<Vec<u32>>>,
}

impl Snapshot {
    pub(super) fn empty() -> Self {
        Self { plan_version: PlanVersion(0), workers: Vec::new(), holders: BTreeMap::new() }
    }

    pub(super) fn new(state: &ClusterState, links: &BTreeMap<(WorkerId, Incarnation), Link>) -> Self {
        let plan_version = state.plan.as_ref().map_or(PlanVersion(0), |plan| plan.version);
        let mut snapshot = Self { plan_version, ..Self::empty() };
        let experts = state.model.as_ref().map_or(0, |model| model.experts as usize);
        for record in state.workers.values().filter(|record| record.state == WorkerState::Serving) {
            let Some(link) = links.get(&(record.id.clone(), record.incarnation)) else { continue };
            if !link.is_up() {
                continue;
            }
            let index = snapshot.workers.len() as u32;
            snapshot.workers.push(Reach { id: record.id.clone(), link: link.clone() });
            for (layer, expert) in record.resident.iter() {
                let layer = snapshot.holders.entry(layer.0).or_insert_with(|| vec![Vec::new(); experts]);
                if let Some(holders) = layer.get_mut(usize::from(expert.0)) {
                    holders.push(index);
                }
            }
        }
        snapshot
    }

    /// Workers that hold `expert` of `layer` and can be asked.
    pub fn holders(&self, layer: u32, expert: u16) -> &[u32] {
        self.holders.get(&layer).and_then(|experts| experts.get(usize::from(expert))).map_or(&[], Vec::as_slice)
    }
}
