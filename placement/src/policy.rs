//! Which plan should follow the present one, if any. Pure.
//!
//! In: the cluster's state, its load, and whether experts may move because of it. Out: a linted plan, or nothing.
//! Never here: a clock, the store, or a plan with a mistake in it.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::ids::{PlanVersion, WorkerId};
use crate::lint::{Note, Rule, Severity, lint};
use crate::load::{Load, balancedness};
use crate::plan::Plan;
use crate::planner::{self, PlannerWorker, Problem, Rebalance, balanced, eplb};
use crate::state::{ClusterState, ModelIdentity};

/// Copies that one plan may move at most: moving is paced by plans, so that a better idea need not wait long.
pub const MOVES: usize = 256;
/// Rows that must be known per expert, on average, before load says anything.
const ENOUGH_ROWS: u64 = 8;

/// How plans are made. Routers tell it in their records, so that who asks for a plan by hand gets what the leader would make.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// Who plans.
    pub planner: Planner,
    /// Workers that should at least hold each expert.
    pub replicas: u32,
    /// Further copies per layer; `None` is an eighth of a layer's experts.
    pub redundant: Option<u32>,
    /// The first plan waits a while for this many workers, so that it need not be made again as each joins.
    pub min_workers: usize,
    /// When experts move because of their load.
    pub rebalance: Rebalancing,
}

/// Who plans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planner {
    /// Conclave's own: load and capacity, as few moves as the gain is worth.
    Balanced,
    /// DeepSeek's: from the load alone, for equal workers.
    Eplb {
        /// The gate's number of groups of experts, for whole groups to be on one host; 1 where it has none.
        groups: usize,
    },
}

/// When experts move because of their load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rebalancing {
    /// How often at most; zero is never.
    pub period: Duration,
    /// Sooner than that where balancedness is below.
    pub below: f64,
    /// What balancedness must gain.
    pub gain: f64,
}

/// A plan, and what the linter says of it.
#[derive(Debug)]
pub struct Linted {
    /// The plan.
    pub plan: Plan,
    /// The worst first.
    pub notes: Vec<Note>,
}

/// What the state says of moving experts because of their load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Urge {
    /// So many planned copies are still on their way.
    Unsettled(usize),
    /// Nothing new.
    None,
    /// Some workers have far more to do than others: balancedness is so low.
    Uneven(f64),
    /// A worker has joined and holds nothing.
    Newcomer,
}

impl Policy {
    /// What a planner is to solve. With `may_move`, copies may move though they need not.
    pub fn problem<'a>(
        &self,
        model: &'a ModelIdentity,
        workers: &'a [PlannerWorker],
        load: Option<&'a Load>,
        may_move: bool,
    ) -> Problem<'a> {
        let rebalance = match (may_move, load) {
            (true, Some(_)) => Rebalance::IfGain { least: self.rebalance.gain, moves: MOVES },
            // Whoever has joined gets a share. For the rest, what a lull says is no reason to undo what load had asked for:
            // no gain is this large.
            (true, None) => Rebalance::IfGain { least: 1.0, moves: MOVES },
            (false, _) => Rebalance::No,
        };
        let redundant = self.redundant.unwrap_or_else(|| planner::redundant_by_default(model));
        Problem { model, workers, replicas: self.replicas, redundant, load, rebalance }
    }

    /// The plan that should follow the present one. With `may_move`, also one that is only better.
    pub fn due(
        &self,
        state: &ClusterState,
        load: Option<&Load>,
        may_move: bool,
    ) -> Result<Option<Linted>, planner::Error> {
        let Some(model) = &state.model else { return Ok(None) };
        let workers = planner::candidates(state);
        if state.plan.is_none() && workers.is_empty() {
            return Ok(None);
        }
        let problem = self.problem(model, &workers, load, may_move);
        let previous = state.plan.as_deref();
        let plan = match self.planner {
            Planner::Balanced => balanced::plan(&problem, previous)?,
            Planner::Eplb { groups } => self.eplb(&problem, groups, state)?,
        };
        Ok(plan.map(|mut plan| {
            if previous.is_none() {
                plan.version = plan.version.max(PlanVersion(last_known(state).0.saturating_add(1)));
            }
            Linted { notes: lint(&plan, &problem, previous), plan }
        }))
    }

    /// EPLB places everything anew each time: only where something must be, or where it is worth that.
    fn eplb(&self, problem: &Problem<'_>, groups: usize, state: &ClusterState) -> Result<Option<Plan>, planner::Error> {
        let previous = state.plan.as_deref();
        let Some(plan) = eplb::policy::plan(problem, groups, previous)? else { return Ok(None) };
        let live = |id: &WorkerId| problem.workers.iter().any(|worker| worker.id == *id);
        let lacks = |plan: &Plan| plan.iter().any(|(.., holders)| holders.is_empty() || !holders.iter().all(live));
        let Some(previous) = previous.filter(|previous| !lacks(previous)) else { return Ok(Some(plan)) };
        let balance = |plan: &Plan| problem.load.and_then(|load| balancedness(plan, load, problem.workers));
        let gains = matches!(problem.rebalance, Rebalance::IfGain { least, .. }
            if balance(&plan).zip(balance(previous)).is_some_and(|(after, before)| after - before >= least));
        Ok(gains.then_some(plan))
    }

    /// Whether the first plan is due and fewer workers are there than it should wait for.
    pub fn lacks_workers(&self, state: &ClusterState) -> bool {
        state.plan.is_none() && planner::candidates(state).len() < self.min_workers
    }

    /// Whether there is a reason to look for a better plan now.
    pub fn urge(&self, state: &ClusterState, load: Option<&Load>) -> Urge {
        let Some(plan) = &state.plan else { return Urge::None };
        let on_their_way = on_their_way(plan, state);
        if on_their_way > 0 {
            return Urge::Unsettled(on_their_way);
        }
        let holders: BTreeSet<&WorkerId> = plan.iter().flat_map(|(.., holders)| holders).collect();
        let workers = planner::candidates(state);
        if workers.iter().any(|worker| !holders.contains(&worker.id)) {
            return Urge::Newcomer;
        }
        match load.and_then(|load| balancedness(plan, load, &workers)) {
            Some(balance) if balance < self.rebalance.below => Urge::Uneven(balance),
            _ => Urge::None,
        }
    }
}

impl Linted {
    /// Whether the plan may be published. One with a mistake is worse than none; one that cannot place everything, or not as
    /// often as wanted, may still be the best there is.
    pub fn is_sound(&self) -> bool {
        let mistaken = |rule: &Rule| !matches!(rule, Rule::Unplaced { .. });
        !self.notes.iter().any(|note| note.severity == Severity::Error && mistaken(&note.rule))
    }
}

/// The load, where enough is known to plan by it.
pub fn known_load(state: &ClusterState) -> Option<Load> {
    let model = state.model.as_ref()?;
    let experts = u64::from(model.experts) * model.moe_layers.len() as u64;
    let load = state.load();
    (load.total() >= ENOUGH_ROWS * experts.max(1)).then_some(load)
}

/// The newest plan that anybody has acted on. Where the store has lost the plan, the next one must be newer: a version that
/// comes again would be taken for done by all who did the first of that number.
fn last_known(state: &ClusterState) -> PlanVersion {
    let workers = state.workers.values().map(|worker| worker.plan_version);
    workers.chain(state.routers.values().map(|router| router.plan_version)).max().unwrap_or(PlanVersion::NONE)
}

/// Copies that living workers are to hold and do not hold yet. One that its worker could not load is not coming.
pub fn on_their_way(plan: &Plan, state: &ClusterState) -> usize {
    let comes = |layer, expert, id: &WorkerId| {
        state
            .workers
            .get(id)
            .is_some_and(|worker| !worker.resident.contains(layer, expert) && !worker.failing.contains(layer, expert))
    };
    plan.iter().map(|(layer, expert, holders)| holders.iter().filter(|id| comes(layer, expert, id)).count()).sum()
}

/// Whether most of the workers that a plan counts on, and more than one, went at once: then a store that lost their leases is
/// likelier than so many deaths, and a plan made before they are back would give all experts to those that come first.
pub fn is_decimated(state: &ClusterState) -> bool {
    let Some(plan) = &state.plan else { return false };
    let planned: BTreeSet<&WorkerId> = plan.iter().flat_map(|(.., holders)| holders).collect();
    let missing = planned.iter().filter(|id| !state.workers.contains_key(**id)).count();
    missing > 1 && missing * 2 > planned.len()
}

#[cfg(test)]
mod tests;
