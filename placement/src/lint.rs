//! What is wrong, or merely odd, with a plan.
//!
//! In: a plan and the problem it should solve. Out: notes, each a rule with a sentence. Never here: a repair. The same
//! rules are the planners' post-conditions, in tests and in debug builds.

use std::collections::BTreeMap;
use std::fmt;

use crate::ids::{ExpertId, LayerIdx, PlanVersion, WorkerId};
use crate::plan::Plan;
use crate::planner::Problem;

/// The most notes one call returns: a plan that breaks more rules than this is broken anyhow.
pub const MAX_NOTES: usize = 1000;

/// How much a note matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Works, and could be better.
    Advice,
    /// Works until something else fails.
    Warning,
    /// Requests that need it cannot be answered, or a worker cannot do what it is told.
    Error,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// How much it matters.
    pub severity: Severity,
    /// What it is.
    pub rule: Rule,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.rule.fmt(f)
    }
}

/// Everything that can be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rule {
    /// A plan must come after its parent.
    Parent { version: PlanVersion, parent: PlanVersion },
    /// A layer with routed experts that the plan does not mention.
    MissingLayer { layer: LayerIdx },
    /// A layer that has no routed experts in this model.
    UnknownLayer { layer: LayerIdx },
    /// A layer with more or fewer experts than the model has.
    ExpertCount { layer: LayerIdx, planned: usize, experts: u32 },
    /// An expert with no holder at all.
    Unplaced { layer: LayerIdx, expert: ExpertId },
    /// Fewer holders than wanted though a worker has room.
    TooFewReplicas { layer: LayerIdx, expert: ExpertId, holders: usize, wanted: usize },
    /// More holders than wanted.
    TooManyReplicas { layer: LayerIdx, expert: ExpertId, holders: usize, wanted: usize },
    /// The same holder twice.
    DuplicateHolder { layer: LayerIdx, expert: ExpertId, worker: WorkerId },
    /// A holder that is dead or leaving.
    UnknownWorker { worker: WorkerId, experts: usize },
    /// More experts than fit.
    OverBudget { worker: WorkerId, experts: usize, room: usize },
    /// Workers without budgets that differ by more than one expert.
    Uneven { least: usize, most: usize },
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parent { version, parent } => write!(f, "plan {version} does not come after its parent {parent}"),
            Self::MissingLayer { layer } => write!(f, "layer {layer} has routed experts and no plan"),
            Self::UnknownLayer { layer } => write!(f, "layer {layer} is planned and has no routed experts"),
            Self::ExpertCount { layer, planned, experts } => {
                write!(f, "layer {layer} plans {planned} experts, the model has {experts}")
            }
            Self::Unplaced { layer, expert } => write!(f, "expert {expert} of layer {layer} has no holder"),
            Self::TooFewReplicas { layer, expert, holders, wanted } => {
                write!(f, "expert {expert} of layer {layer} has {holders} of {wanted} holders though there is room")
            }
            Self::TooManyReplicas { layer, expert, holders, wanted } => {
                write!(f, "expert {expert} of layer {layer} has {holders} holders, {wanted} are wanted")
            }
            Self::DuplicateHolder { layer, expert, worker } => {
                write!(f, "expert {expert} of layer {layer} names {worker} twice")
            }
            Self::UnknownWorker { worker, experts } => {
                write!(f, "{worker} should hold {experts} experts and is not there, or is leaving")
            }
            Self::OverBudget { worker, experts, room } => {
                write!(f, "{worker} should hold {experts} experts and has room for {room}")
            }
            Self::Uneven { least, most } => write!(f, "workers hold between {least} and {most} experts"),
        }
    }
}

impl Rule {
    fn severity(&self) -> Severity {
        match self {
            Self::Parent { .. } | Self::MissingLayer { .. } | Self::ExpertCount { .. } => Severity::Error,
            Self::Unplaced { .. } | Self::OverBudget { .. } => Severity::Error,
            Self::UnknownLayer { .. } | Self::DuplicateHolder { .. } => Severity::Warning,
            Self::TooFewReplicas { .. } | Self::UnknownWorker { .. } => Severity::Warning,
            Self::TooManyReplicas { .. } | Self::Uneven { .. } => Severity::Advice,
        }
    }
}

/// All that can be said against the plan, at most [`MAX_NOTES`], the worst first.
pub fn lint(plan: &Plan, problem: &Problem<'_>) -> Vec<Note> {
    let mut rules = Vec::new();
    if plan.parent >= plan.version {
        rules.push(Rule::Parent { version: plan.version, parent: plan.parent });
    }
    layers(plan, problem, &mut rules);
    let held = held(plan);
    workers(problem, &held, &mut rules);
    experts(plan, problem, &held, &mut rules);
    let mut notes: Vec<Note> = rules.into_iter().map(|rule| Note { severity: rule.severity(), rule }).collect();
    notes.sort_by_key(|note| std::cmp::Reverse(note.severity));
    notes.truncate(MAX_NOTES);
    notes
}

/// The first rule that no planner may break on any cluster: all but what a lack of memory, or the past, excuses.
pub(crate) fn broken_invariant(plan: &Plan, problem: &Problem<'_>) -> Option<Rule> {
    let excused = |rule: &Rule| matches!(rule, Rule::Unplaced { .. } | Rule::Uneven { .. });
    lint(plan, problem).into_iter().map(|note| note.rule).find(|rule| !excused(rule))
}

fn held(plan: &Plan) -> BTreeMap<&WorkerId, usize> {
    let mut held = BTreeMap::new();
    for holder in plan.iter().flat_map(|(_, _, holders)| holders) {
        *held.entry(holder).or_insert(0) += 1;
    }
    held
}

fn layers(plan: &Plan, problem: &Problem<'_>, rules: &mut Vec<Rule>) {
    let model = problem.model;
    for layer in &model.moe_layers {
        match plan.layers.get(layer) {
            None => rules.push(Rule::MissingLayer { layer: *layer }),
            Some(planned) if planned.len() != model.experts as usize => {
                rules.push(Rule::ExpertCount { layer: *layer, planned: planned.len(), experts: model.experts });
            }
            Some(_) => {}
        }
    }
    let unknown = plan.layers.keys().filter(|layer| !model.moe_layers.contains(layer));
    rules.extend(unknown.map(|layer| Rule::UnknownLayer { layer: *layer }));
}

fn workers(problem: &Problem<'_>, held: &BTreeMap<&WorkerId, usize>, rules: &mut Vec<Rule>) {
    let live: BTreeMap<&WorkerId, usize> =
        problem.workers.iter().map(|worker| (&worker.id, problem.room(worker))).collect();
    for (worker, experts) in held {
        match live.get(worker) {
            None => rules.push(Rule::UnknownWorker { worker: (*worker).clone(), experts: *experts }),
            Some(room) if experts > room => {
                rules.push(Rule::OverBudget { worker: (*worker).clone(), experts: *experts, room: *room });
            }
            Some(_) => {}
        }
    }
    let unlimited = problem.workers.iter().filter(|worker| worker.memory_budget == 0);
    let counts: Vec<usize> = unlimited.map(|worker| held.get(&worker.id).copied().unwrap_or(0)).collect();
    if let (Some(least), Some(most)) = (counts.iter().min(), counts.iter().max())
        && most - least > 1
    {
        rules.push(Rule::Uneven { least: *least, most: *most });
    }
}

fn experts(plan: &Plan, problem: &Problem<'_>, held: &BTreeMap<&WorkerId, usize>, rules: &mut Vec<Rule>) {
    let wanted = (problem.replicas as usize).min(problem.workers.len());
    let open =
        problem.workers.iter().filter(|worker| held.get(&worker.id).copied().unwrap_or(0) < problem.room(worker));
    let open: Vec<&WorkerId> = open.map(|worker| &worker.id).collect();
    for (layer, expert, holders) in plan.iter() {
        if rules.len() > MAX_NOTES {
            return;
        }
        let twice = holders.iter().enumerate().find(|(at, worker)| holders[..*at].contains(worker));
        if let Some((_, worker)) = twice {
            rules.push(Rule::DuplicateHolder { layer, expert, worker: worker.clone() });
        }
        let count = holders.len();
        if count == 0 {
            rules.push(Rule::Unplaced { layer, expert });
        }
        if count < wanted && open.iter().any(|worker| !holders.contains(worker)) {
            rules.push(Rule::TooFewReplicas { layer, expert, holders: count, wanted });
        }
        if count > wanted {
            rules.push(Rule::TooManyReplicas { layer, expert, holders: count, wanted });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planner::PlannerWorker;
    use crate::state::ModelIdentity;

    fn id(name: &str) -> WorkerId {
        WorkerId::parse(name).unwrap()
    }

    #[test]
    fn each_fault_of_a_plan_is_found_and_said() {
        let model = ModelIdentity {
            name: "m".into(),
            config_digest: String::new(),
            checkpoint_digest: String::new(),
            layers: 4,
            moe_layers: vec![LayerIdx(1), LayerIdx(2)],
            experts: 4,
            expert_bytes: 10,
        };
        let workers =
            [("a", 20), ("b", 0), ("c", 0)].map(|(name, memory_budget)| PlannerWorker { id: id(name), memory_budget });
        let problem = Problem { model: &model, workers: &workers, replicas: 2 };
        let holders = |names: &[&str]| names.iter().map(|name| id(name)).collect::<Vec<_>>();
        let plan = Plan {
            version: PlanVersion(3),
            parent: PlanVersion(3),
            policy: "test".into(),
            reason: "test".into(),
            layers: BTreeMap::from([
                (LayerIdx(1), vec![holders(&["a", "b", "c"]), holders(&["b", "b"]), holders(&["a"]), vec![]]),
                (LayerIdx(3), vec![holders(&["a", "dead"])]),
            ]),
        };
        let notes = lint(&plan, &problem);
        let said: Vec<String> = notes.iter().map(|note| note.rule.to_string()).collect();
        for sentence in [
            "plan 3 does not come after its parent 3",
            "layer 2 has routed experts and no plan",
            "layer 3 is planned and has no routed experts",
            "a should hold 3 experts and has room for 2",
            "dead should hold 1 experts and is not there, or is leaving",
            "expert 3 of layer 1 has no holder",
            "expert 1 of layer 1 names b twice",
            "expert 2 of layer 1 has 1 of 2 holders though there is room",
            "expert 0 of layer 1 has 3 holders, 2 are wanted",
            "workers hold between 1 and 3 experts",
        ] {
            assert!(said.iter().any(|line| line == sentence), "{sentence} is not in {said:#?}");
        }
        assert!(notes.is_sorted_by_key(|note| std::cmp::Reverse(note.severity)));
    }
}
