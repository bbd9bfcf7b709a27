//! The workers' sums over all layers, evened out.
//!
//! In: a [`Draft`] whose layers are balanced as far as they can be. Out: the same draft with copies moved from those who have
//! most in all to those who have least. Never here: a move that makes a layer slower.
//!
//! A worker's level is its rows over all layers by its speed, or, while no load is known, its copies by its share.

use super::draft::{Draft, ROUNDING, Step};
use super::journal::{Budget, Journal};
use crate::planner::fate::Fates;

/// A worker below this part of its share has joined lately, or come back: the floor on gains is not for it, because one
/// worker among hundreds adds less than any floor.
const JOINED: f64 = 0.5;

struct Levels<'a> {
    fates: &'a Fates,
    /// How long each layer takes: no move makes it longer.
    limits: Vec<f64>,
}

struct Move {
    slot: usize,
    to: usize,
    /// The higher level of the two workers, afterwards.
    level: f64,
}

/// Gives those that joined their share.
pub(super) fn join(draft: &mut Draft<'_>, fates: &Fates, budget: &mut Budget) {
    let levels = Levels::new(draft, fates);
    let ideal = ideal(draft);
    // While no load is known, few copies may be what load had asked for: then only who has nothing has joined.
    let has_joined = |worker: &usize| match draft.loaded {
        true => level(draft, *worker) < ideal * JOINED,
        false => draft.held[*worker] == 0,
    };
    let mut joined: Vec<usize> = (0..draft.workers).filter(has_joined).collect();
    joined.sort_by(|a, b| level(draft, *a).total_cmp(&level(draft, *b)).then(a.cmp(b)));
    for worker in joined {
        while budget.moves > 0 && level(draft, worker) < ideal * (1.0 - ROUNDING) {
            let sources = highest_first(draft);
            let sources = sources.into_iter().filter(|source| level(draft, *source) > ideal);
            let found = sources.into_iter().find_map(|source| Some((source, levels.best(draft, source, &[worker])?)));
            let Some((source, found)) = found else { break };
            let steps = steps(&found, source);
            budget.moves = budget.moves.saturating_sub(draft.moves(&steps[0]));
            steps.iter().for_each(|step| draft.apply(*step));
        }
    }
}

/// Evens everybody out, if that is worth the floor.
pub(super) fn even_out(draft: &mut Draft<'_>, fates: &Fates, budget: &mut Budget) {
    let ideal = ideal(draft);
    let balance = |draft: &Draft<'_>| ideal / level(draft, highest(draft));
    let start = balance(draft);
    if !start.is_finite() || 1.0 - start < budget.least {
        return;
    }
    let levels = Levels::new(draft, fates);
    let bound = 4 * draft.held.iter().sum::<usize>();
    let mut journal = Journal::new(start);
    while journal.marks() < bound {
        let source = highest(draft);
        let mut targets = highest_first(draft);
        targets.reverse();
        let Some(found) = levels.best(draft, source, &targets) else { break };
        journal.act(draft, &steps(&found, source));
        let balance = balance(draft);
        journal.mark(draft, balance);
    }
    journal.settle(draft, budget);
}

fn steps(found: &Move, source: usize) -> [Step; 2] {
    [Step::Give { slot: found.slot, worker: found.to }, Step::Take { slot: found.slot, worker: source }]
}

/// What one copy adds to a level of capacity 1.
fn cost(draft: &Draft<'_>, slot: usize) -> f64 {
    if draft.loaded { draft.per_copy(slot, draft.holders[slot].len()) } else { 1.0 }
}

fn capacity(draft: &Draft<'_>, worker: usize) -> f64 {
    if draft.loaded { draft.speed[worker] } else { draft.weight[worker] }
}

fn level(draft: &Draft<'_>, worker: usize) -> f64 {
    let sum = if draft.loaded { draft.total[worker] } else { draft.held[worker] as f64 };
    sum / capacity(draft, worker)
}

/// The level that all would have if copies could be cut.
fn ideal(draft: &Draft<'_>) -> f64 {
    let workers = 0..draft.workers;
    let sum: f64 = workers.clone().map(|worker| level(draft, worker) * capacity(draft, worker)).sum();
    sum / workers.map(|worker| capacity(draft, worker)).sum::<f64>()
}

fn highest(draft: &Draft<'_>) -> usize {
    let workers = 0..draft.workers;
    workers.rev().max_by(|a, b| level(draft, *a).total_cmp(&level(draft, *b))).unwrap_or(0)
}

fn highest_first(draft: &Draft<'_>) -> Vec<usize> {
    let mut workers: Vec<(f64, usize)> = (0..draft.workers).map(|worker| (level(draft, worker), worker)).collect();
    workers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    workers.into_iter().map(|(_, worker)| worker).collect()
}

impl<'a> Levels<'a> {
    fn new(draft: &Draft<'_>, fates: &'a Fates) -> Self {
        Self { fates, limits: (0..draft.layers).map(|layer| draft.slowest(layer).1).collect() }
    }

    /// The copy on `source` whose move to the first able of `targets` leaves the higher of both levels lowest. Of equal
    /// ones that of a layer which the target has little of, and the source much.
    fn best(&self, draft: &Draft<'_>, source: usize, targets: &[usize]) -> Option<Move> {
        let from = level(draft, source);
        let mut best: Option<(Move, (usize, usize))> = None;
        for layer in 0..draft.layers {
            let here = draft.held_in(layer, source);
            for slot in here.iter().copied() {
                let cost = cost(draft, slot);
                let Some(to) = targets.iter().copied().find(|to| self.able(draft, slot, source, *to, cost)) else {
                    continue;
                };
                let after = level(draft, to) + cost / capacity(draft, to);
                let found = Move { slot, to, level: after.max(from - cost / capacity(draft, source)) };
                let tie = (draft.held_in(layer, to).len(), usize::MAX - here.len());
                let better = |(best, other): &(Move, (usize, usize))| {
                    found.level.total_cmp(&best.level).then(tie.cmp(other)).is_lt()
                };
                if found.level < from * (1.0 - ROUNDING) && best.as_ref().is_none_or(better) {
                    best = Some((found, tie));
                }
            }
        }
        best.map(|(found, _)| found)
    }

    fn able(&self, draft: &Draft<'_>, slot: usize, source: usize, to: usize, cost: f64) -> bool {
        if draft.holds(slot, to) || !draft.fits(slot, to) {
            return false;
        }
        let (layer, holders) = (slot / draft.experts, &draft.holders[slot]);
        let slower = draft.loaded && draft.time(layer, to, cost) > self.limits[layer] * (1.0 + ROUNDING);
        let need = self.fates.replacing(holders, source, draft.wanted);
        !slower && (need.nothing() || self.fates.meets(need, holders, source, to))
    }
}
