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

impl Plan {
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
}
