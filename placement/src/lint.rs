//! What is wrong, or merely odd, with a plan.
//!
//! In: a plan, the problem it should solve, and the plan before it. Out: notes, each a rule with a sentence. Never here: a
//! repair. The same rules are the planners' post-conditions, in tests and in debug builds.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use crate::ids::{ExpertId, LayerIdx, PlanVersion, WorkerId};
use crate::plan::{Move, Plan};
use crate::planner::fate::{Fates, Spread};
use crate::planner::{Problem, relative_speeds};
use crate::state::Residency;

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
    /// A plan must be the next after its parent. One without a parent may begin anywhere: a store may have lost its plan.
    Parent { version: PlanVersion, parent: PlanVersion },
    /// A plan must be made from the one before it, or it undoes what another leader did.
    Orphan { parent: PlanVersion, previous: PlanVersion },
    /// A layer with routed experts that the plan does not mention.
    MissingLayer { layer: LayerIdx },
    /// A layer that has no routed experts in this model.
    UnknownLayer { layer: LayerIdx },
    /// A layer with more or fewer experts than the model has.
    ExpertCount { layer: LayerIdx, planned: usize, experts: u32 },
    /// An expert without a holder that lives and stays.
    Unplaced { layer: LayerIdx, expert: ExpertId },
    /// Fewer holders that live and stay than wanted though a worker has room.
    TooFewReplicas { layer: LayerIdx, expert: ExpertId, holders: usize, wanted: usize },
    /// More holders than wanted, and than the layer's redundant copies could account for.
    TooManyReplicas { layer: LayerIdx, expert: ExpertId, holders: usize, most: usize },
    /// More redundant copies in a layer than it may have.
    TooManySpares { layer: LayerIdx, spares: usize, redundant: u32 },
    /// Holders that fail together though another worker has room, and fails alone: those who are wanted, or only spares.
    SharedFate { layer: LayerIdx, expert: ExpertId, fate: Fate, spare: bool },
    /// The same holder twice.
    DuplicateHolder { layer: LayerIdx, expert: ExpertId, worker: WorkerId },
    /// A holder that is dead or leaving.
    UnknownWorker { worker: WorkerId, experts: usize },
    /// More experts than fit.
    OverBudget { worker: WorkerId, experts: usize, room: usize },
    /// What it lacks does not fit beside what it holds, so that it waits until others have taken that over.
    OverBudgetNow { worker: WorkerId, resident: usize, lacks: usize, room: usize },
    /// Equal workers without budgets that differ by more than one expert.
    Uneven { least: usize, most: usize },
}

/// What holders can share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The machine.
    Host,
    /// The rack, zone, or whatever fails together.
    Zone,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parent { version, parent } => write!(f, "plan {version} is not the next after its parent {parent}"),
            Self::Orphan { parent, previous } => write!(f, "the plan was made from {parent}, not from {previous}"),
            Self::MissingLayer { layer } => write!(f, "layer {layer} has routed experts and no plan"),
            Self::UnknownLayer { layer } => write!(f, "layer {layer} is planned and has no routed experts"),
            Self::ExpertCount { layer, planned, experts } => {
                write!(f, "layer {layer} plans {planned} experts, the model has {experts}")
            }
            Self::Unplaced { layer, expert } => write!(f, "expert {expert} of layer {layer} has no holder"),
            Self::TooFewReplicas { layer, expert, holders, wanted } => {
                write!(f, "expert {expert} of layer {layer} has {holders} of {wanted} holders though there is room")
            }
            Self::TooManyReplicas { layer, expert, holders, most } => {
                write!(f, "expert {expert} of layer {layer} has {holders} holders, at most {most} may be")
            }
            Self::TooManySpares { layer, spares, redundant } => {
                write!(f, "layer {layer} has {spares} redundant copies, it may have {redundant}")
            }
            Self::SharedFate { layer, expert, fate, spare } => {
                let fate = if *fate == Fate::Host { "host" } else { "zone" };
                let who = if *spare { "spare holders" } else { "holders" };
                write!(f, "{who} of expert {expert} of layer {layer} share a {fate} though another could be had")
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
            Self::OverBudgetNow { worker, resident, lacks, room } => {
                write!(f, "{worker} holds {resident} experts and lacks {lacks}, it has room for {room} at once")
            }
            Self::Uneven { least, most } => write!(f, "workers hold between {least} and {most} experts"),
        }
    }
}

impl Rule {
    fn severity(&self) -> Severity {
        match self {
            Self::Parent { .. } | Self::Orphan { .. } | Self::MissingLayer { .. } | Self::ExpertCount { .. } => {
                Severity::Error
            }
            Self::Unplaced { .. } | Self::OverBudget { .. } => Severity::Error,
            Self::UnknownLayer { .. } | Self::DuplicateHolder { .. } => Severity::Warning,
            Self::TooFewReplicas { .. } | Self::UnknownWorker { .. } => Severity::Warning,
            Self::SharedFate { spare: false, .. } => Severity::Warning,
            Self::SharedFate { spare: true, .. } => Severity::Advice,
            Self::OverBudgetNow { .. } => Severity::Warning,
            Self::TooManyReplicas { .. } | Self::TooManySpares { .. } | Self::Uneven { .. } => Severity::Advice,
        }
    }
}

/// All that can be said against the plan, at most [`MAX_NOTES`], the worst first.
///
/// With `previous`, the plan is judged as its successor: it must name it as its parent, and what a worker lacks already by
/// `previous` is not held against it.
pub fn lint(plan: &Plan, problem: &Problem<'_>, previous: Option<&Plan>) -> Vec<Note> {
    let mut rules = Vec::new();
    let next = plan.parent.0.checked_add(1) == Some(plan.version.0);
    if !next && (plan.parent != PlanVersion::NONE || plan.version == PlanVersion::NONE) {
        rules.push(Rule::Parent { version: plan.version, parent: plan.parent });
    }
    if let Some(previous) = previous.filter(|previous| previous.version != plan.parent) {
        rules.push(Rule::Orphan { parent: plan.parent, previous: previous.version });
    }
    layers(plan, problem, &mut rules);
    let held = Held::of(plan, problem);
    workers(plan, problem, previous, &held, &mut rules);
    uneven(problem, &held, &mut rules);
    experts(plan, problem, &held, &mut rules);
    let mut notes: Vec<Note> = rules.into_iter().map(|rule| Note { severity: rule.severity(), rule }).collect();
    notes.sort_by_key(|note| std::cmp::Reverse(note.severity));
    notes.truncate(MAX_NOTES);
    notes
}

/// The first rule that no planner may break on any cluster: all but what a lack of memory, or the past, excuses.
pub(crate) fn broken_invariant(plan: &Plan, problem: &Problem<'_>, previous: Option<&Plan>) -> Option<Rule> {
    let excused = |rule: &Rule| matches!(rule, Rule::Unplaced { .. } | Rule::Uneven { .. } | Rule::SharedFate { .. });
    lint(plan, problem, previous).into_iter().map(|note| note.rule).find(|rule| !excused(rule))
}

/// What each worker should hold.
struct Held<'a> {
    by_worker: BTreeMap<&'a WorkerId, Residency>,
    /// By the problem's workers: copies planned.
    planned: Vec<usize>,
    /// By the problem's workers: copies planned and not resident.
    lacks: Vec<usize>,
}

impl<'a> Held<'a> {
    fn of(plan: &'a Plan, problem: &Problem<'_>) -> Self {
        let mut by_worker: BTreeMap<&WorkerId, Residency> = BTreeMap::new();
        for (layer, expert, holders) in plan.iter() {
            for holder in holders {
                by_worker.entry(holder).or_default().insert(layer, expert);
            }
        }
        let of = |id| by_worker.get(id);
        let planned = problem.workers.iter().map(|worker| of(&worker.id).map_or(0, Residency::len)).collect();
        let lacks = problem.workers.iter().map(|worker| {
            let lacks = |planned: &Residency| {
                planned.iter().filter(|(layer, expert)| !worker.resident.contains(*layer, *expert)).count()
            };
            of(&worker.id).map_or(0, lacks)
        });
        Self { lacks: lacks.collect(), planned, by_worker }
    }
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
    for (layer, experts) in &plan.layers {
        if !model.moe_layers.contains(layer) {
            rules.push(Rule::UnknownLayer { layer: *layer });
        }
        let spares = experts.iter().map(|holders| holders.len().saturating_sub(problem.wanted())).sum();
        if spares > problem.redundant as usize {
            rules.push(Rule::TooManySpares { layer: *layer, spares, redundant: problem.redundant });
        }
    }
}

fn workers(plan: &Plan, problem: &Problem<'_>, previous: Option<&Plan>, held: &Held<'_>, rules: &mut Vec<Rule>) {
    let live: HashMap<&WorkerId, usize> =
        problem.workers.iter().enumerate().map(|(at, worker)| (&worker.id, at)).collect();
    // What a worker has already may be given to it whatever else it lacks: that takes no memory.
    let takes_memory = |change: &Move| {
        let resident = live.get(&change.worker).map(|at| &problem.workers[*at].resident);
        change.added.iter().any(|(layer, expert)| resident.is_none_or(|there| !there.contains(layer, expert)))
    };
    let adding: Vec<WorkerId> =
        plan.moves_from(previous).into_iter().filter(takes_memory).map(|change| change.worker).collect();
    for (id, experts) in &held.by_worker {
        let Some(&at) = live.get(id) else {
            rules.push(Rule::UnknownWorker { worker: (*id).clone(), experts: experts.len() });
            continue;
        };
        let worker = &problem.workers[at];
        let (room, resident, lacks) = (problem.room(worker), worker.resident.len(), held.lacks[at]);
        if experts.len() > room {
            rules.push(Rule::OverBudget { worker: (*id).clone(), experts: experts.len(), room });
        } else if lacks > 0 && resident + lacks > room && adding.binary_search(id).is_ok() {
            rules.push(Rule::OverBudgetNow { worker: (*id).clone(), resident, lacks, room });
        }
    }
}

/// Only where nothing asks for unevenness: neither budgets, speeds, localities nor load.
fn uneven(problem: &Problem<'_>, held: &Held<'_>, rules: &mut Vec<Rule>) {
    let speeds = relative_speeds(problem.workers).unwrap_or_default();
    let alike = speeds.iter().all(|speed| *speed == speeds[0])
        && problem.workers.iter().all(|worker| worker.memory_budget == 0)
        && !Fates::of(problem.workers).shared;
    if let (Some(least), Some(most)) = (held.planned.iter().min(), held.planned.iter().max())
        && alike
        && problem.load.is_none()
        && most - least > 1
    {
        rules.push(Rule::Uneven { least: *least, most: *most });
    }
}

fn experts(plan: &Plan, problem: &Problem<'_>, held: &Held<'_>, rules: &mut Vec<Rule>) {
    let wanted = problem.wanted();
    let fates = Fates::of(problem.workers);
    let live: HashMap<&WorkerId, usize> =
        problem.workers.iter().enumerate().map(|(at, worker)| (&worker.id, at)).collect();
    // Room for one more, beside all that is there and all that is still to come.
    let has_room = |at: &usize| {
        let (worker, room) = (&problem.workers[*at], problem.room(&problem.workers[*at]));
        held.planned[*at] < room && worker.resident.len() + held.lacks[*at] < room
    };
    let open: Vec<usize> = (0..problem.workers.len()).filter(has_room).collect();
    for (layer, expert, holders) in plan.iter() {
        if rules.len() > MAX_NOTES {
            return;
        }
        let twice = holders.iter().enumerate().find(|(at, worker)| holders[..*at].contains(worker));
        if let Some((_, worker)) = twice {
            rules.push(Rule::DuplicateHolder { layer, expert, worker: worker.clone() });
        }
        let most = wanted + problem.redundant as usize;
        if holders.len() > most {
            rules.push(Rule::TooManyReplicas { layer, expert, holders: holders.len(), most });
        }
        // Who is dead or leaving holds nothing.
        let mut holders: Vec<usize> = holders.iter().filter_map(|id| live.get(id).copied()).collect();
        holders.sort_unstable();
        holders.dedup();
        if holders.is_empty() {
            rules.push(Rule::Unplaced { layer, expert });
        }
        let able = |at: &usize| !holders.contains(at) && !problem.workers[*at].failing.contains(layer, expert);
        if holders.len() < wanted && open.iter().any(able) {
            rules.push(Rule::TooFewReplicas { layer, expert, holders: holders.len(), wanted });
        }
        if fates.shared {
            let of = |enough: usize| shared_fate(&fates, &holders, &open, enough);
            // Spares are looked at where those who are wanted are apart, as far as they can be.
            let shared = of(wanted).map(|fate| (fate, false)).or_else(|| of(holders.len()).map(|fate| (fate, true)));
            rules.extend(shared.map(|(fate, spare)| Rule::SharedFate { layer, expert, fate, spare }));
        }
    }
}

/// What those holders share that one of them, or one more, need not share on a worker among `open`.
fn shared_fate(fates: &Fates, holders: &[usize], open: &[usize], wanted: usize) -> Option<Fate> {
    let enough = wanted.min(holders.len());
    let Spread { hosts, zones } = fates.spread(holders.iter().copied(), enough);
    // Another zone is not worth a shared host.
    let another = |common: u8| open.iter().any(|worker| fates.common(holders, *worker) <= common);
    if hosts < enough && another(1) {
        return Some(Fate::Host);
    }
    (zones < enough && another(0)).then_some(Fate::Zone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planner::{PlannerWorker, Rebalance};
    use crate::state::{Locality, ModelIdentity};

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
        let worker = |(name, memory_budget, host): (&str, u64, &str)| PlannerWorker {
            id: id(name),
            memory_budget,
            speed: 0.0,
            locality: Locality { host: host.into(), zone: String::new() },
            resident: Residency::new(),
            failing: Residency::new(),
        };
        let mut workers = [("a", 20, "x"), ("b", 0, "x"), ("c", 0, ""), ("d", 30, "")].map(worker);
        workers[3].resident = [1, 2, 3].map(|expert| (LayerIdx(2), ExpertId(expert))).into_iter().collect();
        let rebalance = Rebalance::No;
        let problem = Problem { model: &model, workers: &workers, replicas: 2, redundant: 1, load: None, rebalance };
        let holders = |names: &[&str]| names.iter().map(|name| id(name)).collect::<Vec<_>>();
        let plan = Plan {
            version: PlanVersion(3),
            parent: PlanVersion(3),
            policy: "test".into(),
            reason: "test".into(),
            layers: BTreeMap::from([
                (
                    LayerIdx(1),
                    vec![holders(&["a", "b"]), holders(&["b", "b"]), holders(&["a"]), vec![], holders(&["dead"])],
                ),
                (LayerIdx(3), vec![holders(&["a", "b", "c", "d", "dead"])]),
            ]),
        };
        let previous = Plan { version: PlanVersion(2), layers: BTreeMap::new(), ..plan.clone() };
        let notes = lint(&plan, &problem, Some(&previous));
        let said: Vec<String> = notes.iter().map(|note| note.rule.to_string()).collect();
        for sentence in [
            "plan 3 is not the next after its parent 3",
            "layer 2 has routed experts and no plan",
            "layer 3 is planned and has no routed experts",
            "a should hold 3 experts and has room for 2",
            "layer 1 plans 5 experts, the model has 4",
            "dead should hold 2 experts and is not there, or is leaving",
            "expert 4 of layer 1 has no holder",
            "expert 4 of layer 1 has 0 of 2 holders though there is room",
            "expert 3 of layer 1 has no holder",
            "expert 1 of layer 1 names b twice",
            "expert 2 of layer 1 has 1 of 2 holders though there is room",
            "expert 0 of layer 3 has 5 holders, at most 3 may be",
            "layer 3 has 3 redundant copies, it may have 1",
            "holders of expert 0 of layer 1 share a host though another could be had",
            "d holds 3 experts and lacks 1, it has room for 3 at once",
            "the plan was made from 3, not from 2",
        ] {
            assert!(said.iter().any(|line| line == sentence), "{sentence} is not in {said:#?}");
        }
        assert!(notes.is_sorted_by_key(|note| std::cmp::Reverse(note.severity)));

        let equal = workers.clone().map(|worker| PlannerWorker {
            memory_budget: 0,
            locality: Locality::default(),
            resident: Residency::new(),
            failing: Residency::new(),
            ..worker
        });
        let notes = lint(&plan, &Problem { workers: &equal, ..problem }, None);
        assert!(notes.iter().any(|note| note.to_string() == "workers hold between 1 and 3 experts"), "{notes:#?}");
    }
}
