//! What must be: every expert has its holders, as memory allows, and no layer more spares than it may.
//!
//! In: a [`Draft`], and who held what. Out: the same draft, complete. Never here: a copy that moves though it could stay.
//!
//! In passes. *Keep*: what live workers have stays theirs. *Trim*: spares beyond the bound go, those first that carry least.
//! *Fill*: an expert that lacks holders takes, all at once, the best workers; taking them all at once is what keeps counts
//! within one of each other. *Rescue*: when memory ran out, the spare copy of another expert makes way. Where that copy is
//! still in memory its place is only promised: the next plan gives it, when the worker has let go. *Hope*: an expert that
//! only those could have that failed to load it stays with one of them.

use std::cmp::{Ordering, Reverse};

use super::draft::Draft;
use crate::planner::fate::Fates;

/// An idle expert weighs this much of its layer's mean when a worker is chosen for it, so that one worker does not get all
/// that were idle lately.
const IDLE: f64 = 0.05;

/// Brings the draft to completion.
pub(super) fn complete(draft: &mut Draft<'_>, fates: &Fates, before: &[Vec<usize>]) {
    keep(draft, before);
    trim(draft, fates);
    fill(draft, fates, 1);
    rescue(draft, 1);
    fill(draft, fates, draft.wanted);
    rescue(draft, draft.wanted);
    hope(draft, before);
    draft.short = draft.holders.iter().any(|holders| holders.len() < draft.wanted);
}

/// Only copies come first where a worker's memory has shrunk. A copy that its worker lacks, and has no memory for, is not
/// kept where another worker has it: the two may wait for each other, each with what the other should have.
fn keep(draft: &mut Draft<'_>, before: &[Vec<usize>]) {
    let mut order: Vec<usize> = (0..before.len()).collect();
    order.sort_by_key(|slot| before[*slot].len());
    for slot in order {
        for worker in before[slot].iter().copied() {
            let stuck = !draft.fits(slot, worker) && !draft.is_resident(slot, worker);
            let elsewhere = || (0..draft.workers).any(|other| other != worker && draft.is_resident(slot, other));
            if draft.has_room(worker) && !draft.fails(slot, worker) && !(stuck && elsewhere()) {
                draft.give(slot, worker);
            }
        }
    }
}

fn trim(draft: &mut Draft<'_>, fates: &Fates) {
    for layer in 0..draft.layers {
        let mut spares = draft.spares(layer);
        while spares > draft.problem.redundant as usize {
            let rich = draft.slots_of(layer).filter(|slot| draft.holders[*slot].len() > draft.wanted);
            let left = |slot: usize| draft.per_copy(slot, draft.holders[slot].len() - 1);
            let Some(slot) = rich.min_by(|a, b| {
                let copies = |slot: usize| Reverse(draft.holders[slot].len());
                left(*a).total_cmp(&left(*b)).then(copies(*a).cmp(&copies(*b))).then(b.cmp(a))
            }) else {
                return;
            };
            let Some(worker) = least_missed(draft, fates, slot) else { return };
            draft.take(slot, worker);
            spares -= 1;
        }
    }
}

/// The holder that an expert with a spare can best do without: one whose fate others share, then the most burdened.
pub(super) fn least_missed(draft: &Draft<'_>, fates: &Fates, slot: usize) -> Option<usize> {
    let (holders, layer) = (&draft.holders[slot], slot / draft.experts);
    let free = |worker: usize| fates.replacing(holders, worker, draft.wanted).nothing();
    let burden = |a: usize, b: usize| {
        let time = draft.time(layer, a, 0.0).total_cmp(&draft.time(layer, b, 0.0));
        time.then(draft.share(a, 0).total_cmp(&draft.share(b, 0))).then(a.cmp(&b))
    };
    holders.iter().copied().max_by(|a, b| free(*a).cmp(&free(*b)).then_with(|| burden(*a, *b)))
}

/// Gives holders to those that have fewer than `below`: first to those with fewest, and up to all that are wanted.
fn fill(draft: &mut Draft<'_>, fates: &Fates, below: usize) {
    for layer in 0..draft.layers {
        let mut lacking: Vec<usize> = draft.slots_of(layer).filter(|slot| draft.holders[*slot].len() < below).collect();
        if lacking.is_empty() {
            continue;
        }
        // The heaviest first: what is light fits into the gaps they leave.
        let weight = |slot: usize| draft.per_copy(slot, draft.wanted);
        lacking.sort_by(|a, b| {
            let count = |slot: usize| draft.holders[slot].len();
            count(*a).cmp(&count(*b)).then(weight(*b).total_cmp(&weight(*a))).then(a.cmp(b))
        });
        let mean = draft.ideal_copy(layer);
        for slot in lacking {
            place(draft, fates, slot, mean * IDLE);
        }
    }
}

/// Gives one expert all the holders it lacks and can have. `idle` is what an idle copy weighs, in rows.
fn place(draft: &mut Draft<'_>, fates: &Fates, slot: usize, idle: f64) {
    let layer = slot / draft.experts;
    let missing = draft.wanted.saturating_sub(draft.holders[slot].len());
    let more = draft.per_copy(slot, draft.wanted);
    let mut candidates: Vec<Candidate> = (0..draft.workers)
        .filter(|worker| !draft.holds(slot, *worker) && draft.fits(slot, *worker))
        .map(|worker| Candidate {
            worker,
            resident: draft.is_resident(slot, worker),
            time: draft.time(layer, worker, more + idle * draft.held_in(layer, worker).len() as f64),
            share: draft.share(worker, 1),
            // Ties go round robin, one further with each layer, so that the same expert of neighbouring layers lives on
            // different workers.
            turn: (worker + draft.workers - layer % draft.workers) % draft.workers,
        })
        .collect();
    if !fates.shared && candidates.len() > missing && missing > 0 {
        candidates.select_nth_unstable_by(missing - 1, Candidate::order);
        candidates.truncate(missing);
    }
    candidates.sort_unstable_by(Candidate::order);
    for _ in 0..missing {
        // The first of those that share least with the holders there are by now.
        let next = (0..candidates.len()).min_by_key(|at| fates.common(&draft.holders[slot], candidates[*at].worker));
        let Some(next) = next else { return };
        let chosen = candidates.remove(next);
        draft.give(slot, chosen.worker);
    }
}

struct Candidate {
    worker: usize,
    resident: bool,
    time: f64,
    share: f64,
    turn: usize,
}

impl Candidate {
    /// The best first: who has it already, then who is done soonest, then who has the smallest share.
    fn order(&self, other: &Self) -> Ordering {
        let burden = || self.time.total_cmp(&other.time).then(self.share.total_cmp(&other.share));
        other.resident.cmp(&self.resident).then_with(burden).then(self.turn.cmp(&other.turn))
    }
}

/// Those with fewer than `enough` copies take the place of one that others have beyond `enough`: one expert's second copy
/// is worth less than another's first, and a spare less than one that is wanted.
fn rescue(draft: &mut Draft<'_>, enough: usize) {
    let slots = 0..draft.holders.len();
    let mut rich: Vec<usize> = slots.clone().filter(|slot| draft.holders[*slot].len() > enough).collect();
    rich.sort_by_key(|slot| Reverse((draft.holders[*slot].len(), *slot)));
    let spare = |slot: usize| std::iter::repeat_n(slot, draft.holders[slot].len() - enough);
    let mut donors: Vec<usize> = rich.into_iter().flat_map(spare).collect();
    donors.reverse();
    for slot in slots.filter(|slot| draft.holders[*slot].len() < enough).collect::<Vec<_>>() {
        for _ in draft.holders[slot].len()..enough {
            if let Some(worker) =
                (0..draft.workers).find(|worker| draft.has_room(*worker) && draft.lacks(slot, *worker))
            {
                draft.promise(worker);
                continue;
            }
            let usable = |donor: &usize| donated(draft, *donor, slot).is_some();
            let Some(at) = donors.iter().rposition(usable) else { break };
            let donor = donors.remove(at);
            let Some(worker) = donated(draft, donor, slot) else { break };
            draft.take(donor, worker);
            if draft.fits(slot, worker) {
                draft.give(slot, worker);
            } else {
                draft.promise(worker);
            }
        }
    }
}

/// An expert that is nobody's is left to who could not load it, who may the next time: to the one that had it to do before.
fn hope(draft: &mut Draft<'_>, before: &[Vec<usize>]) {
    for (slot, before) in before.iter().enumerate() {
        let able = |worker: &usize| draft.fails(slot, *worker) && draft.has_room(*worker);
        let first = || before.iter().copied().find(able).or_else(|| (0..draft.workers).find(able));
        if draft.holders[slot].is_empty()
            && let Some(worker) = first()
        {
            draft.give(slot, worker);
        }
    }
}

/// Whose copy of `donor` makes way for one of `slot`: a copy that is not in memory yet makes way at once.
fn donated(draft: &Draft<'_>, donor: usize, slot: usize) -> Option<usize> {
    let able = draft.holders[donor].iter().rev().copied().filter(|worker| draft.lacks(slot, *worker));
    able.min_by_key(|worker| draft.is_resident(donor, *worker))
}
