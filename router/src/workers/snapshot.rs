//! One immutable picture of who can be asked for which expert. The only thing the data path plans by.
//!
//! In: the cluster's state and the links. Out: holders per (layer, expert), as indices into one list of workers: first
//! those that the plan wants there, then those that hold it still.
//! Never here: workers whose link is down; they are as good as absent.

use std::collections::BTreeMap;

use conclave_placement::{
    ids::{ExpertId, LayerIdx, PlanVersion, WorkerId},
    planner,
    state::{ClusterState, WorkerRecord, WorkerState},
};

use super::Link;

/// A worker that can be asked now.
#[derive(Clone, Debug)]
pub struct Reach {
    /// Its name.
    pub id: WorkerId,
    /// Sends to it.
    pub link: Link,
    /// How fast it is beside the others; 1 where nobody measured.
    pub speed: f64,
}

/// Who can be asked for one expert, as indices into [`Snapshot::workers`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holders<'a> {
    /// Those that the plan wants there.
    pub planned: &'a [u32],
    /// Those that hold it too: about to let go of it, or about to leave.
    pub spare: &'a [u32],
}

#[derive(Clone, Debug, Default)]
struct Held {
    planned: Vec<u32>,
    spare: Vec<u32>,
}

impl Held {
    fn is_some(&self) -> bool {
        !self.planned.is_empty() || !self.spare.is_empty()
    }
}

/// Who can be asked for what.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The plan in force.
    pub plan_version: PlanVersion,
    /// Reachable workers, by name.
    pub workers: Vec<Reach>,
    /// All of them compute on the very processors that this router computes on.
    pub all_beside: bool,
    /// Per layer, per expert.
    holders: BTreeMap<u32, Vec<Held>>,
}

impl Snapshot {
    pub(super) fn empty() -> Self {
        Self { plan_version: PlanVersion(0), workers: Vec::new(), all_beside: false, holders: BTreeMap::new() }
    }

    /// Of `known` workers, those whose link is up, by what `state` says of the plan.
    pub(super) fn new<'a>(state: &ClusterState, known: impl Iterator<Item = (&'a WorkerRecord, &'a Link)>) -> Self {
        let plan_version = state.plan.as_ref().map_or(PlanVersion(0), |plan| plan.version);
        let mut snapshot = Self { plan_version, ..Self::empty() };
        let answers = |(record, link): &(&WorkerRecord, &Link)| record.state != WorkerState::Starting && link.is_up();
        for (record, link) in known.filter(answers) {
            snapshot.add(state, record, link);
        }
        snapshot.compare_speeds();
        snapshot.all_beside = snapshot.workers.iter().all(|worker| worker.link.is_beside());
        snapshot
    }

    fn add(&mut self, state: &ClusterState, record: &WorkerRecord, link: &Link) {
        let stays = !state.is_leaving(record);
        let index = self.workers.len() as u32;
        self.workers.push(Reach { id: record.id.clone(), link: link.clone(), speed: record.speed });
        let planned = |layer: LayerIdx, expert: ExpertId| match &state.plan {
            Some(plan) => plan.holders(layer, expert).contains(&record.id),
            None => true,
        };
        for (layer, expert) in record.resident.iter() {
            let is_planned = stays && planned(layer, expert);
            // As many as somebody holds: the store may have lost the model's key, streams have not.
            let (experts, expert) = (self.holders.entry(layer.0).or_default(), usize::from(expert.0));
            if experts.len() <= expert {
                experts.resize_with(expert + 1, Held::default);
            }
            let held = &mut experts[expert];
            match is_planned {
                true => held.planned.push(index),
                false => held.spare.push(index),
            }
        }
    }

    /// Makes speeds relative to each other, as the planner does.
    fn compare_speeds(&mut self) {
        let speeds: Vec<f64> = self.workers.iter().map(|worker| worker.speed).collect();
        let relative = planner::relative(&speeds).unwrap_or_else(|| vec![1.0; speeds.len()]);
        for (worker, relative) in self.workers.iter_mut().zip(relative) {
            worker.speed = relative;
        }
    }

    /// How many of `experts` experts in each of `layers` nobody can be asked for.
    pub fn out_of_reach(&self, layers: &[LayerIdx], experts: u32) -> usize {
        let reached = |layer: &LayerIdx| {
            self.holders.get(&layer.0).map_or(0, |held| held.iter().filter(|held| held.is_some()).count())
        };
        layers.iter().map(|layer| (experts as usize).saturating_sub(reached(layer))).sum()
    }

    /// Who can be asked for `expert` of `layer`.
    pub fn holders(&self, layer: u32, expert: u16) -> Holders<'_> {
        let held = self.holders.get(&layer).and_then(|experts| experts.get(usize::from(expert)));
        held.map_or(Holders::default(), |held| Holders { planned: &held.planned, spare: &held.spare })
    }
}
