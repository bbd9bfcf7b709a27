//! What may be: copies follow the load, as far as that is worth the moves.
//!
//! In: a complete [`Draft`], the least gain, and how many copies may move. Out: the same draft, better balanced. Never here:
//! a search whose gain is below the floor.
//!
//! In this order: copies that share a fate part; copies that carry no more than an average one go; each layer is brought
//! closer to balance, the worst first; and the workers' sums over layers are evened out, for whoever joined above all.

use super::draft::{Draft, ROUNDING, Step};
use super::even;
use super::fill::least_missed;
use super::journal::{Budget, Journal};
use super::search::best_action;
use crate::planner::fate::Fates;

/// The least gain that counts as one, where the floor is 0.
const LEAST: f64 = 1e-4;

/// Balances the draft, as far as the budget allows.
pub(super) fn rebalance(draft: &mut Draft<'_>, fates: &Fates, mut budget: Budget) {
    budget.least = budget.least.max(LEAST);
    part(draft, fates, &mut budget);
    for layer in worst_first(draft) {
        if budget.moves > 0 {
            balance_layer(draft, fates, layer, &mut budget);
        }
    }
    even::join(draft, fates, &mut budget);
    even::even_out(draft, fates, &mut budget);
}

/// The layers with load, those first that lose most time by imbalance.
fn worst_first(draft: &Draft<'_>) -> Vec<usize> {
    let excess = |layer: usize| draft.slowest(layer).1 - draft.ideal(layer);
    let mut layers: Vec<(usize, f64)> = (0..draft.layers).map(|layer| (layer, excess(layer))).collect();
    layers.retain(|(_, excess)| *excess > 0.0);
    layers.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    layers.into_iter().map(|(layer, _)| layer).collect()
}

/// Moves copies off workers that share a host or zone with another holder, to such as do not. Whether that is worth it is no
/// question of load.
fn part(draft: &mut Draft<'_>, fates: &Fates, budget: &mut Budget) {
    if !fates.shared {
        return;
    }
    let possible = fates.spread(0..draft.workers, draft.wanted);
    for slot in 0..draft.holders.len() {
        while budget.moves > 0 {
            let Some((leaves, joins)) = apart(draft, fates, slot, possible.hosts, possible.zones) else { break };
            let step = Step::Give { slot, worker: joins };
            budget.moves -= draft.moves(&step);
            draft.apply(step);
            draft.take(slot, leaves);
        }
    }
}

/// Which holder should make way for whom, so that an expert's holders are on more hosts, or in more zones.
fn apart(draft: &Draft<'_>, fates: &Fates, slot: usize, hosts: usize, zones: usize) -> Option<(usize, usize)> {
    let (holders, layer) = (&draft.holders[slot], slot / draft.experts);
    let enough = draft.wanted.min(holders.len());
    let (hosts, zones) = (hosts.min(enough), zones.min(enough));
    let now = fates.spread(holders.iter().copied(), enough);
    if now.hosts >= hosts && now.zones >= zones {
        return None;
    }
    let burden = |worker: usize| (draft.time(layer, worker, 0.0), draft.share(worker, 0));
    let mut best: Option<(usize, usize)> = None;
    for leaves in holders.iter().copied() {
        let stay: Vec<usize> = holders.iter().copied().filter(|holder| *holder != leaves).collect();
        let left = fates.spread(stay.iter().copied(), enough);
        for joins in (0..draft.workers).filter(|worker| !draft.holds(slot, *worker) && draft.fits(slot, *worker)) {
            let common = fates.common(&stay, joins);
            let after = (left.hosts + usize::from(common & 2 == 0), left.zones + usize::from(common & 1 == 0));
            let after = (after.0.min(hosts), after.1.min(zones));
            let before = (now.hosts.min(hosts), now.zones.min(zones));
            let apart = after.0 >= before.0 && after.1 >= before.1 && after != before;
            if apart && best.is_none_or(|(_, other)| burden(joins) < burden(other)) {
                best = Some((leaves, joins));
            }
        }
    }
    best
}

/// Mean over maximum of the workers' times, see [`crate::load::balancedness`].
fn balance(draft: &Draft<'_>, layer: usize) -> f64 {
    draft.ideal(layer) / draft.slowest(layer).1
}

/// Removes what is not worth its memory, then improves what is left; or, if the layer is worse off so, improves it as it is.
fn balance_layer(draft: &mut Draft<'_>, fates: &Fates, layer: usize, budget: &mut Budget) {
    let (before, untouched) = (balance(draft, layer), *budget);
    let mut steps = prune(draft, fates, layer);
    let pruned = !steps.is_empty();
    steps.extend(climb(draft, fates, layer, budget));
    if !pruned || balance(draft, layer) >= before * (1.0 - ROUNDING) {
        return;
    }
    for step in steps.into_iter().rev() {
        draft.undo(step);
    }
    *budget = untouched;
    climb(draft, fates, layer, budget);
}

/// Takes away spares without which their expert's copies still carry no more than an average copy: no search adds such.
fn prune(draft: &mut Draft<'_>, fates: &Fates, layer: usize) -> Vec<Step> {
    let average = draft.ideal_copy(layer);
    let mut steps = Vec::new();
    for slot in draft.slots_of(layer) {
        while draft.holders[slot].len() > draft.wanted
            && draft.per_copy(slot, draft.holders[slot].len() - 1) <= average
            && let Some(worker) = least_missed(draft, fates, slot)
        {
            draft.take(slot, worker);
            steps.push(Step::Take { slot, worker });
        }
    }
    steps
}

/// Does the best thing for the slowest worker, again and again. Returns the steps that were worth it.
fn climb(draft: &mut Draft<'_>, fates: &Fates, layer: usize, budget: &mut Budget) -> Vec<Step> {
    let ideal = draft.ideal(layer);
    let start = ideal / draft.slowest(layer).1;
    if 1.0 - start < budget.least {
        return Vec::new();
    }
    let copies: usize = draft.slots_of(layer).map(|slot| draft.holders[slot].len()).sum();
    // Each step leaves fewer workers as slow as the slowest, so this ends by itself; the bound is for rounding's sake.
    let bound = 8 * (copies + draft.problem.redundant as usize + draft.workers);
    let mut journal = Journal::new(start);
    while journal.marks() < bound {
        let Some(action) = best_action(draft, fates, layer) else { break };
        let most = draft.slowest(layer).1 * (1.0 - ROUNDING);
        let as_slow = |draft: &Draft<'_>| (0..draft.workers).filter(|at| draft.time(layer, *at, 0.0) >= most).count();
        let before = as_slow(draft);
        journal.act(draft, &action.steps);
        if as_slow(draft) >= before {
            // Rows of an expert that lost its spare went where the new copy went, too.
            journal.undo_unmarked(draft);
            break;
        }
        let balance = ideal / draft.slowest(layer).1;
        journal.mark(draft, balance);
        // What is left to gain would not be kept.
        if 1.0 - balance <= budget.least / 2.0 {
            break;
        }
    }
    journal.settle(draft, budget)
}
