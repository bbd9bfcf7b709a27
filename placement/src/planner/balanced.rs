//! The balanced planner: every worker the same share, whatever the load.
//!
//! In: a [`Problem`] and the previous plan. Out: a plan that moves nothing it need not move. Never here: load figures;
//! a planner that follows the gate's favourites is another file.
//!
//! Three passes. *Keep*: what live workers have in the previous plan stays theirs. *Fill*: each expert that lacks holders
//! takes, all at once, the workers with the lowest share (experts held ÷ weight). Taking the k lowest at once is what keeps
//! counts within one of each other: filling first all first copies and then all second ones would not. *Rescue*: when
//! memory ran out and an expert has no holder, the spare copy of another one makes way.

use std::cmp::Reverse;
use std::collections::HashMap;

use crate::ids::{ExpertId, LayerIdx, PlanVersion, WorkerId};
use crate::plan::Plan;
use crate::planner::{Error, Problem};

/// The name this planner signs with.
pub const POLICY: &str = "balanced";

/// The next plan, or `None` when the previous one already is the answer.
///
/// Every expert of every layer with routed experts gets `min(replicas, workers)` distinct holders, fewer only where the
/// workers that do not hold it are full. An expert may end with none: see [`crate::lint::lint`].
pub fn plan(problem: &Problem<'_>, previous: Option<&Plan>) -> Result<Option<Plan>, Error> {
    problem.check()?;
    let parent = previous.map_or(PlanVersion::NONE, |plan| plan.version);
    let version = parent.0.checked_add(1).map(PlanVersion).ok_or(Error::VersionsExhausted)?;

    let mut draft = Draft::new(problem);
    let kept = previous.map_or(0, |plan| draft.keep(plan));
    draft.fill();
    draft.rescue();

    let layers = draft.layers();
    if previous.is_some_and(|plan| plan.layers == layers) {
        return Ok(None);
    }
    let reason = reason(problem, previous, draft.assignments() - kept.min(draft.assignments()));
    let plan = Plan { version, parent, policy: POLICY.to_owned(), reason, layers };
    debug_assert_eq!(crate::lint::broken_invariant(&plan, problem), None);
    Ok(Some(plan))
}

/// Holders under construction. Workers are indices into the problem's list, experts are counted over all layers.
struct Draft<'a> {
    problem: &'a Problem<'a>,
    wanted: usize,
    experts: usize,
    holders: Vec<Vec<usize>>,
    held: Vec<usize>,
    room: Vec<usize>,
    weight: Vec<u64>,
}

impl<'a> Draft<'a> {
    fn new(problem: &'a Problem<'a>) -> Self {
        let experts = problem.model.experts as usize;
        let largest = problem.workers.iter().map(|worker| worker.memory_budget).max();
        // A worker without a budget weighs as much as the largest with one.
        let unlimited = largest.filter(|bytes| *bytes > 0).unwrap_or(1);
        let weigh = |budget: u64| if budget == 0 { unlimited } else { budget };
        Self {
            problem,
            wanted: (problem.replicas as usize).min(problem.workers.len()),
            experts,
            holders: vec![Vec::new(); experts * problem.model.moe_layers.len()],
            held: vec![0; problem.workers.len()],
            room: problem.workers.iter().map(|worker| problem.room(worker)).collect(),
            weight: problem.workers.iter().map(|worker| weigh(worker.memory_budget)).collect(),
        }
    }

    fn has_room(&self, worker: usize) -> bool {
        self.held[worker] < self.room[worker]
    }

    fn give(&mut self, slot: usize, worker: usize) {
        self.holders[slot].push(worker);
        self.held[worker] += 1;
    }

    /// Returns how many assignments stay as they were.
    fn keep(&mut self, previous: &Plan) -> usize {
        let numbered = self.problem.workers.iter().enumerate();
        let index: HashMap<&WorkerId, usize> = numbered.map(|(worker, entry)| (&entry.id, worker)).collect();
        let mut kept = 0;
        for slot in 0..self.holders.len() {
            let (layer, expert) = self.expert_at(slot);
            for id in previous.holders(layer, expert) {
                let Some(&worker) = index.get(id) else { continue };
                let spare = self.holders[slot].len() < self.wanted && !self.holders[slot].contains(&worker);
                if spare && self.has_room(worker) {
                    self.give(slot, worker);
                    kept += 1;
                }
            }
        }
        kept
    }

    fn fill(&mut self) {
        for slot in 0..self.holders.len() {
            let missing = self.wanted - self.holders[slot].len();
            if missing == 0 {
                continue;
            }
            let free = |worker: &usize| self.has_room(*worker) && !self.holders[slot].contains(worker);
            let mut candidates: Vec<usize> = (0..self.held.len()).filter(free).collect();
            if candidates.len() > missing {
                candidates.select_nth_unstable_by(missing - 1, |a, b| self.by_share(slot, *a, *b));
                candidates.truncate(missing);
            }
            candidates.sort_unstable_by(|a, b| self.by_share(slot, *a, *b));
            for worker in candidates {
                self.give(slot, worker);
            }
        }
    }

    /// Lowest share first, as it would be with one expert more. Ties go round robin, one further with each layer, so that the same expert of neighbouring
    /// layers lives on different workers.
    fn by_share(&self, slot: usize, a: usize, b: usize) -> std::cmp::Ordering {
        let share = |worker: usize, other: usize| (self.held[worker] as u128 + 1) * u128::from(self.weight[other]);
        let workers = self.held.len();
        let turn = |worker: usize| (worker + workers - (slot / self.experts) % workers) % workers;
        share(a, b).cmp(&share(b, a)).then(turn(a).cmp(&turn(b)))
    }

    /// An expert without a holder means that every worker is full; a second copy is worth less than a first one.
    fn rescue(&mut self) {
        let mut rich: Vec<usize> = (0..self.holders.len()).filter(|slot| self.holders[*slot].len() > 1).collect();
        rich.sort_by_key(|slot| Reverse((self.holders[*slot].len(), *slot)));
        let spare = |slot: usize| std::iter::repeat_n(slot, self.holders[slot].len() - 1);
        let donors: Vec<usize> = rich.into_iter().flat_map(spare).collect();
        let mut donors = donors.into_iter();
        for slot in 0..self.holders.len() {
            if !self.holders[slot].is_empty() {
                continue;
            }
            let Some(donor) = donors.next() else { return };
            if let Some(worker) = self.holders[donor].pop() {
                self.holders[slot].push(worker);
            }
        }
    }

    fn expert_at(&self, slot: usize) -> (LayerIdx, ExpertId) {
        // `Problem::check` bounds the experts by what a u16 counts.
        (self.problem.model.moe_layers[slot / self.experts], ExpertId((slot % self.experts) as u16))
    }

    fn assignments(&self) -> usize {
        self.holders.iter().map(Vec::len).sum()
    }

    fn layers(&self) -> std::collections::BTreeMap<LayerIdx, Vec<Vec<WorkerId>>> {
        let name = |worker: &usize| self.problem.workers[*worker].id.clone();
        let named: Vec<Vec<WorkerId>> = self.holders.iter().map(|holders| holders.iter().map(name).collect()).collect();
        let mut rest = named.into_iter();
        let layers = self.problem.model.moe_layers.iter();
        layers.map(|layer| (*layer, rest.by_ref().take(self.experts).collect())).collect()
    }
}

fn reason(problem: &Problem<'_>, previous: Option<&Plan>, placed: usize) -> String {
    let workers = problem.workers.len();
    let Some(previous) = previous else {
        return format!("first plan, {workers} workers, {} replicas", problem.replicas);
    };
    let before: std::collections::BTreeSet<&WorkerId> = previous.iter().flat_map(|(_, _, holders)| holders).collect();
    let lives = |id: &WorkerId| problem.workers.iter().any(|worker| worker.id == *id);
    let gone: Vec<&str> = before.into_iter().filter(|id| !lives(id)).map(WorkerId::as_str).collect();
    match gone.as_slice() {
        [] => format!("{placed} copies placed on {workers} workers"),
        [only] => format!("{only} left, {placed} copies placed again"),
        [first, rest @ ..] => format!("{first} and {} more left, {placed} copies placed again", rest.len()),
    }
}

#[cfg(test)]
#[path = "balanced_tests.rs"]
mod tests;
