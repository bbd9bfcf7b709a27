//! The plan: which workers should hold which expert.
//!
//! In: what a planner decided. Out: an immutable, numbered value that names its parent. Never here: a decision. Workers
//! that execute a plan load what it gives them and choose nothing.

use std::collections::BTreeMap;

use crate::ids::{ExpertId, LayerIdx, PlanVersion, WorkerId};
use crate::state::Residency;

/// A target for the whole cluster. It replaces its parent in the store by compare-and-swap, or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// One more than its parent's.
    pub version: PlanVersion,
    /// The plan it was made from; [`PlanVersion::NONE`] for the first.
    pub parent: PlanVersion,
    /// The planner that made it.
    pub policy: String,
    /// Why it was made, one line for people.
    pub reason: String,
    /// For each layer with routed experts, for each expert in order, its holders. The first is no better than the rest.
    pub layers: BTreeMap<LayerIdx, Vec<Vec<WorkerId>>>,
}

/// A plan that was in force, and who put it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastPlan {
    /// As it was.
    pub plan: Plan,
    /// A router's name, or an operator's words.
    pub author: String,
    /// Milliseconds since 1970, by the author's clock.
    pub written_unix_ms: u64,
}

/// What changes for one worker from one plan to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Whom it concerns.
    pub worker: WorkerId,
    /// What it should hold now and should not before.
    pub added: Residency,
    /// What it should hold no longer.
    pub removed: Residency,
}

impl Plan {
    /// What changes from `previous` to this plan, for each worker that anything changes for, by name. From nothing to the
    /// first plan, everything is added.
    pub fn moves_from(&self, previous: Option<&Self>) -> Vec<Move> {
        let mut moves = BTreeMap::new();
        let before = |layer, expert| previous.map(|plan| plan.holders(layer, expert)).unwrap_or_default();
        for (layer, expert, holders) in self.iter() {
            for worker in holders.iter().filter(|worker| !before(layer, expert).contains(worker)) {
                Move::of(&mut moves, worker).added.insert(layer, expert);
            }
        }
        for (layer, expert, holders) in previous.iter().flat_map(|plan| plan.iter()) {
            for worker in holders.iter().filter(|worker| !self.holders(layer, expert).contains(worker)) {
                Move::of(&mut moves, worker).removed.insert(layer, expert);
            }
        }
        moves.into_values().collect()
    }

    /// All that one worker should hold.
    pub fn assigned_to(&self, worker: &WorkerId) -> Residency {
        let mut residency = Residency::new();
        for (layer, expert, holders) in self.iter() {
            if holders.contains(worker) {
                residency.insert(layer, expert);
            }
        }
        residency
    }

    /// The workers that should hold an expert; empty when the plan does not place it.
    pub fn holders(&self, layer: LayerIdx, expert: ExpertId) -> &[WorkerId] {
        let experts = self.layers.get(&layer).map(Vec::as_slice).unwrap_or_default();
        experts.get(usize::from(expert.0)).map(Vec::as_slice).unwrap_or_default()
    }

    /// Every expert with its holders, by layer and expert.
    pub fn iter(&self) -> impl Iterator<Item = (LayerIdx, ExpertId, &[WorkerId])> {
        self.layers.iter().flat_map(|(layer, experts)| {
            let numbered = (0..=u16::MAX).zip(experts);
            numbered.map(|(expert, holders)| (*layer, ExpertId(expert), holders.as_slice()))
        })
    }
}

impl Move {
    fn of<'m>(moves: &'m mut BTreeMap<WorkerId, Self>, worker: &WorkerId) -> &'m mut Self {
        let nothing = || Self { worker: worker.clone(), added: Residency::new(), removed: Residency::new() };
        moves.entry(worker.clone()).or_insert_with(nothing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_finds_its_experts_in_every_layer() {
        let [a, b] = ["a", "b"].map(|name| WorkerId::parse(name).unwrap());
        let plan = Plan {
            version: PlanVersion(1),
            parent: PlanVersion::NONE,
            policy: "test".into(),
            reason: "test".into(),
            layers: BTreeMap::from([
                (LayerIdx(1), vec![vec![a.clone()], vec![b.clone()]]),
                (LayerIdx(2), vec![vec![b.clone(), a.clone()], vec![]]),
            ]),
        };
        let assigned: Vec<_> = plan.assigned_to(&a).iter().collect();
        assert_eq!(assigned, [(LayerIdx(1), ExpertId(0)), (LayerIdx(2), ExpertId(0))]);
        assert_eq!(plan.holders(LayerIdx(2), ExpertId(0)), [b, a]);
        assert!(plan.holders(LayerIdx(2), ExpertId(9)).is_empty());
        assert!(plan.holders(LayerIdx(7), ExpertId(0)).is_empty());
    }

    #[test]
    fn moves_are_what_differs_and_nothing_else() {
        let [a, b, c] = ["a", "b", "c"].map(|name| WorkerId::parse(name).unwrap());
        let plan = |version, holders: [Vec<WorkerId>; 3]| Plan {
            version: PlanVersion(version),
            parent: PlanVersion(version - 1),
            policy: "test".into(),
            reason: "test".into(),
            layers: BTreeMap::from([(LayerIdx(1), holders.into())]),
        };
        let one = plan(1, [vec![a.clone(), b.clone()], vec![b.clone()], vec![a.clone()]]);
        let two = plan(2, [vec![b.clone(), a.clone()], vec![c.clone()], vec![a.clone(), c.clone()]]);
        let experts = |numbers: &[u16]| -> Residency { numbers.iter().map(|n| (LayerIdx(1), ExpertId(*n))).collect() };
        let of = |worker: &WorkerId, added: &[u16], removed: &[u16]| Move {
            worker: worker.clone(),
            added: experts(added),
            removed: experts(removed),
        };
        assert_eq!(two.moves_from(Some(&one)), [of(&b, &[], &[1]), of(&c, &[1, 2], &[])]);
        assert_eq!(one.moves_from(Some(&two)), [of(&b, &[1], &[]), of(&c, &[], &[1, 2])]);
        assert_eq!(one.moves_from(Some(&one)), []);
        assert_eq!(one.moves_from(None), [of(&a, &[0, 2], &[]), of(&b, &[0, 1], &[])]);
    }
}
