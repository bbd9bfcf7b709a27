//! Which plan should follow the present one, if any. Pure.
//!
//! In: the cluster's state, and whether experts may move because of their load. Out: a linted plan, or nothing.
//! Never here: a clock, the store, or a plan with a mistake in it.

use std::{collections::BTreeSet, time::Duration};

use conclave_placement::{
    ids::WorkerId,
    lint::{Rule, Severity, lint},
    load::{Load, balancedness},
    plan::Plan,
    planner::{self, Problem, Rebalance, balanced},
    state::ClusterState,
};
use tracing::warn;

/// Copies that one plan may move at most: moving is paced by plans, so that a better idea need not wait long.
const MOVES: usize = 256;
/// What the linter says of one plan, in the log.
const NOTES_LOGGED: usize = 5;
/// Rows that must be known per expert, on average, before load says anything.
const ENOUGH_ROWS: u64 = 8;

/// How plans are made here.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Workers that should at least hold each expert.
    pub replicas: u32,
    /// Further copies per layer; `None` is an eighth of a layer's experts.
    pub redundant: Option<u32>,
    /// The first plan waits for this many workers, so that it need not be made again as each joins.
    pub min_workers: usize,
    /// When experts move because of their load.
    pub rebalance: Rebalancing,
}

/// When experts move because of their load.
#[derive(Clone, Copy, Debug)]
pub struct Rebalancing {
    /// How often at most; zero is never.
    pub period: Duration,
    /// Sooner than that where balancedness is below.
    pub below: f64,
    /// What balancedness must gain.
    pub gain: f64,
}

/// What the state says of moving experts because of their load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Urge {
    /// Something planned is still on its way.
    Unsettled,
    /// Nothing new.
    None,
    /// Some workers have far more to do than others.
    Uneven,
    /// A worker has joined and holds nothing.
    Newcomer,
}

impl Policy {
    /// The plan that should follow the present one. With `may_move`, also one that is only better.
    pub(super) fn due(&self, state: &ClusterState, may_move: bool) -> Result<Option<Plan>, planner::Error> {
        let Some(model) = &state.model else { return Ok(None) };
        let workers = planner::candidates(state);
        if state.plan.is_none() && workers.len() < self.min_workers {
            return Ok(None);
        }
        let load = known_load(state);
        let rebalance = match may_move {
            true => Rebalance::IfGain { least: self.rebalance.gain, moves: MOVES },
            false => Rebalance::No,
        };
        let redundant = self.redundant.unwrap_or_else(|| planner::redundant_by_default(model));
        let replicas = self.replicas;
        let problem = Problem { model, workers: &workers, replicas, redundant, load: load.as_ref(), rebalance };
        let Some(plan) = balanced::plan(&problem, state.plan.as_deref())? else { return Ok(None) };
        let notes = lint(&plan, &problem, state.plan.as_deref());
        let grave = notes.iter().filter(|note| note.severity >= Severity::Warning);
        for note in grave.clone().take(NOTES_LOGGED) {
            warn!(version = plan.version.0, %note, "plan");
        }
        if let Some(more) = grave.count().checked_sub(NOTES_LOGGED).filter(|more| *more > 0) {
            warn!(version = plan.version.0, more, "plan: see `conclave placement lint`");
        }
        // A plan with a mistake in it is worse than none; one that cannot place everything is still the best there is.
        let mistaken = |rule: &Rule| !matches!(rule, Rule::Unplaced { .. });
        let mistake = notes.iter().any(|note| note.severity == Severity::Error && mistaken(&note.rule));
        Ok((!mistake).then_some(plan))
    }

    /// Whether there is a reason to look for a better plan now.
    pub(super) fn urge(&self, state: &ClusterState) -> Urge {
        let Some(plan) = &state.plan else { return Urge::None };
        if !is_settled(plan, state) {
            return Urge::Unsettled;
        }
        let holders: BTreeSet<&WorkerId> = plan.iter().flat_map(|(.., holders)| holders).collect();
        let workers = planner::candidates(state);
        if workers.iter().any(|worker| !holders.contains(&worker.id)) {
            return Urge::Newcomer;
        }
        let balance = known_load(state).and_then(|load| balancedness(plan, &load, &workers));
        match balance {
            Some(balance) if balance < self.rebalance.below => Urge::Uneven,
            _ => Urge::None,
        }
    }
}

/// The load, where enough is known to plan by it.
pub(super) fn known_load(state: &ClusterState) -> Option<Load> {
    let model = state.model.as_ref()?;
    let experts = u64::from(model.experts) * model.moe_layers.len() as u64;
    let load = state.load();
    (load.total() >= ENOUGH_ROWS * experts.max(1)).then_some(load)
}

/// Whether every worker that lives holds what `plan` gives it.
fn is_settled(plan: &Plan, state: &ClusterState) -> bool {
    plan.iter().all(|(layer, expert, holders)| {
        holders.iter().all(|id| state.workers.get(id).is_none_or(|worker| worker.resident.contains(layer, expert)))
    })
}

#[cfg(test)]
mod tests;
