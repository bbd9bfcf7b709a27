//! A plan under construction, over dense numbers.
//!
//! In: a [`Problem`], then copies given and taken one by one. Out: who holds what, what memory that takes at its worst, and
//! how many rows each worker carries. Never here: a choice. A *slot* is one expert of one layer, `layer * experts + expert`;
//! layers, experts and workers are indices into the problem's lists.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::ids::{ExpertId, LayerIdx, WorkerId};
use crate::plan::Plan;
use crate::planner::{Problem, relative_speeds};
use crate::state::Residency;

/// Differences below this share of a value are rounding, not improvement.
pub(super) const ROUNDING: f64 = 1e-9;

/// One change: the copy of a slot on a worker, given or taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Give { slot: usize, worker: usize },
    Take { slot: usize, worker: usize },
}

pub(super) struct Draft<'a> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) experts: usize,
    pub(super) layers: usize,
    pub(super) workers: usize,
    /// Holders that every expert should at least have.
    pub(super) wanted: usize,
    /// Whether anything is known of the load.
    pub(super) loaded: bool,
    /// Whether an expert lacks a wanted holder, for want of memory.
    pub(super) short: bool,
    /// Per slot, its rows; 0 where nothing is known.
    pub(super) rows: Vec<f64>,
    /// Per worker, its speed as a multiple of the mean.
    pub(super) speed: Vec<f64>,
    /// Per worker, the copies it should get while no load is known.
    pub(super) weight: Vec<f64>,
    /// Per slot, its holders.
    pub(super) holders: Vec<Vec<usize>>,
    /// Per worker, planned copies, promised ones included.
    pub(super) held: Vec<usize>,
    /// Per worker, rows over all layers.
    pub(super) total: Vec<f64>,
    /// Per layer and worker, the slots it holds.
    on: Vec<Vec<usize>>,
    /// Per layer and worker, rows.
    load: Vec<f64>,
    room: Vec<usize>,
    /// Per worker, copies planned or resident: what is in memory at the worst moment, before anything is given up.
    occupied: Vec<usize>,
    /// Per worker, a bit for each slot that is resident.
    resident: Vec<Vec<u64>>,
    /// Slots that a worker could not load; few or none.
    failing: HashSet<(usize, usize)>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(problem: &'a Problem<'a>) -> Self {
        let (experts, layers) = (problem.model.experts as usize, problem.model.moe_layers.len());
        let (workers, slots) = (problem.workers.len(), experts * layers);
        let speed = relative_speeds(problem.workers);
        let mut draft = Self {
            problem,
            experts,
            layers,
            workers,
            wanted: problem.wanted(),
            loaded: false,
            short: false,
            rows: vec![0.0; slots],
            weight: shares(problem, speed.clone().unwrap_or_else(|| memory_weights(problem))),
            speed: speed.unwrap_or_else(|| vec![1.0; workers]),
            holders: vec![Vec::new(); slots],
            held: vec![0; workers],
            total: vec![0.0; workers],
            on: vec![Vec::new(); layers * workers],
            load: vec![0.0; layers * workers],
            room: problem.workers.iter().map(|worker| problem.room(worker)).collect(),
            occupied: problem.workers.iter().map(|worker| worker.resident.len()).collect(),
            resident: Vec::new(),
            failing: HashSet::new(),
        };
        if let Some(load) = problem.load {
            for slot in 0..slots {
                let (layer, expert) = draft.named(slot);
                draft.rows[slot] = load.rows(layer, expert) as f64;
            }
            draft.loaded = draft.rows.iter().any(|rows| *rows > 0.0);
        }
        draft.resident = problem.workers.iter().map(|worker| draft.bits(&worker.resident)).collect();
        for (number, worker) in problem.workers.iter().enumerate().filter(|(_, worker)| !worker.failing.is_empty()) {
            let bits = draft.bits(&worker.failing);
            let set = (0..slots).filter(|slot| bits[slot / 64] >> (slot % 64) & 1 == 1);
            draft.failing.extend(set.map(|slot| (slot, number)));
        }
        draft
    }

    /// Takes everything back, so that no rounding or order of what was done remains.
    pub(super) fn clear(&mut self) {
        self.holders.iter_mut().for_each(Vec::clear);
        self.on.iter_mut().for_each(Vec::clear);
        self.held.fill(0);
        self.total.fill(0.0);
        self.load.fill(0.0);
        for (occupied, worker) in self.occupied.iter_mut().zip(self.problem.workers) {
            *occupied = worker.resident.len();
        }
    }

    fn bits(&self, resident: &Residency) -> Vec<u64> {
        let mut bits = vec![0; self.rows.len().div_ceil(64)];
        for (position, layer) in self.problem.model.moe_layers.iter().enumerate() {
            let experts = resident.0.get(layer).into_iter().flat_map(|set| set.iter());
            for expert in experts.map(|expert| usize::from(expert.0)).filter(|expert| *expert < self.experts) {
                let slot = position * self.experts + expert;
                bits[slot / 64] |= 1 << (slot % 64);
            }
        }
        bits
    }

    pub(super) fn named(&self, slot: usize) -> (LayerIdx, ExpertId) {
        // `Problem::check` bounds the experts by what a u16 counts.
        (self.problem.model.moe_layers[slot / self.experts], ExpertId((slot % self.experts) as u16))
    }

    pub(super) fn slots_of(&self, layer: usize) -> std::ops::Range<usize> {
        layer * self.experts..(layer + 1) * self.experts
    }

    /// Each slot's holders in another plan, as far as they are among the problem's workers, none twice.
    pub(super) fn live_holders(&self, plan: &Plan) -> Vec<Vec<usize>> {
        let numbered = self.problem.workers.iter().enumerate();
        let index: HashMap<&WorkerId, usize> = numbered.map(|(worker, entry)| (&entry.id, worker)).collect();
        let live = |slot: usize| {
            let (layer, expert) = self.named(slot);
            let mut live: Vec<usize> = Vec::new();
            for worker in plan.holders(layer, expert).iter().filter_map(|id| index.get(id)) {
                if !live.contains(worker) {
                    live.push(*worker);
                }
            }
            live
        };
        (0..self.holders.len()).map(live).collect()
    }

    pub(super) fn is_resident(&self, slot: usize, worker: usize) -> bool {
        self.resident[worker][slot / 64] >> (slot % 64) & 1 == 1
    }

    /// Whether the plan may give that worker one more.
    pub(super) fn has_room(&self, worker: usize) -> bool {
        self.held[worker] < self.room[worker]
    }

    /// Whether the worker can take that copy beside all it holds now and is to get.
    pub(super) fn fits(&self, slot: usize, worker: usize) -> bool {
        let beside = self.occupied[worker] < self.room[worker] || self.is_resident(slot, worker);
        self.has_room(worker) && beside && !self.fails(slot, worker)
    }

    /// Whether the worker does not have that copy and could, if there were room.
    pub(super) fn lacks(&self, slot: usize, worker: usize) -> bool {
        !self.holds(slot, worker) && !self.fails(slot, worker)
    }

    /// Whether the worker could not load that expert lately. What it holds it holds, whatever went wrong at another time.
    pub(super) fn fails(&self, slot: usize, worker: usize) -> bool {
        !self.failing.is_empty() && self.failing.contains(&(slot, worker)) && !self.is_resident(slot, worker)
    }

    pub(super) fn holds(&self, slot: usize, worker: usize) -> bool {
        self.holders[slot].contains(&worker)
    }

    pub(super) fn give(&mut self, slot: usize, worker: usize) {
        self.carry(slot, -1.0);
        self.holders[slot].push(worker);
        self.on[slot / self.experts * self.workers + worker].push(slot);
        self.held[worker] += 1;
        self.occupied[worker] += usize::from(!self.is_resident(slot, worker));
        self.carry(slot, 1.0);
    }

    pub(super) fn take(&mut self, slot: usize, worker: usize) {
        self.carry(slot, -1.0);
        self.holders[slot].retain(|holder| *holder != worker);
        self.on[slot / self.experts * self.workers + worker].retain(|held| *held != slot);
        self.held[worker] -= 1;
        self.occupied[worker] -= usize::from(!self.is_resident(slot, worker));
        self.carry(slot, 1.0);
    }

    /// Keeps one place of a worker for an expert that cannot come yet.
    pub(super) fn promise(&mut self, worker: usize) {
        self.held[worker] += 1;
    }

    pub(super) fn apply(&mut self, step: Step) {
        match step {
            Step::Give { slot, worker } => self.give(slot, worker),
            Step::Take { slot, worker } => self.take(slot, worker),
        }
    }

    pub(super) fn undo(&mut self, step: Step) {
        match step {
            Step::Give { slot, worker } => self.take(slot, worker),
            Step::Take { slot, worker } => self.give(slot, worker),
        }
    }

    /// Whether a step sends weights somewhere: nothing is on its way to where it already is.
    pub(super) fn moves(&self, step: &Step) -> usize {
        match step {
            Step::Give { slot, worker } => usize::from(!self.is_resident(*slot, *worker)),
            Step::Take { .. } => 0,
        }
    }

    /// Adds (or takes away) a slot's rows where it lives: each holder carries the same part.
    fn carry(&mut self, slot: usize, sign: f64) {
        let rows = sign * self.per_copy(slot, self.holders[slot].len());
        if rows == 0.0 {
            return;
        }
        let base = slot / self.experts * self.workers;
        for holder in &self.holders[slot] {
            self.load[base + holder] += rows;
            self.total[*holder] += rows;
        }
    }

    /// Rows that each of `copies` copies of an expert carries.
    pub(super) fn per_copy(&self, slot: usize, copies: usize) -> f64 {
        self.rows[slot] / copies.max(1) as f64
    }

    /// The slots of a layer that a worker holds.
    pub(super) fn held_in(&self, layer: usize, worker: usize) -> &[usize] {
        &self.on[layer * self.workers + worker]
    }

    /// How long that worker takes for that layer, with `more` rows: in rows per relative speed.
    pub(super) fn time(&self, layer: usize, worker: usize, more: f64) -> f64 {
        (self.load[layer * self.workers + worker] + more) / self.speed[worker]
    }

    /// The worker that takes longest for a layer, and how long.
    pub(super) fn slowest(&self, layer: usize) -> (usize, f64) {
        let times = (0..self.workers).map(|worker| (worker, self.time(layer, worker, 0.0)));
        times.fold((0, f64::NEG_INFINITY), |most, next| if next.1 > most.1 { next } else { most })
    }

    /// How long a layer would take if its rows could be spread perfectly.
    pub(super) fn ideal(&self, layer: usize) -> f64 {
        let placed = self.slots_of(layer).filter(|slot| !self.holders[*slot].is_empty());
        placed.map(|slot| self.rows[slot]).sum::<f64>() / self.speed.iter().sum::<f64>()
    }

    /// Rows per copy of a layer, were all the copies it may have made and all equally busy.
    pub(super) fn ideal_copy(&self, layer: usize) -> f64 {
        let copies = self.experts * self.wanted + self.problem.redundant as usize;
        self.slots_of(layer).map(|slot| self.rows[slot]).sum::<f64>() / copies.max(1) as f64
    }

    /// Copies of a layer beyond those wanted.
    pub(super) fn spares(&self, layer: usize) -> usize {
        self.slots_of(layer).map(|slot| self.holders[slot].len().saturating_sub(self.wanted)).sum()
    }

    /// How full a worker is of its share, with `more` copies.
    pub(super) fn share(&self, worker: usize, more: usize) -> f64 {
        (self.held[worker] + more) as f64 / self.weight[worker]
    }

    /// Under their names. Those that stay come first, as they were, so that nothing seems to change that does not.
    pub(super) fn into_layers(self, before: &[Vec<usize>]) -> BTreeMap<LayerIdx, Vec<Vec<WorkerId>>> {
        let name = |worker: usize| self.problem.workers[worker].id.clone();
        let mut slots = self.holders.iter().zip(before).map(|(now, before)| {
            let mut fresh: Vec<usize> = now.iter().copied().filter(|worker| !before.contains(worker)).collect();
            fresh.sort_unstable();
            let stay = before.iter().copied().filter(|worker| now.contains(worker));
            stay.chain(fresh).map(name).collect()
        });
        let layers = self.problem.model.moe_layers.iter();
        layers.map(|layer| (*layer, slots.by_ref().take(self.experts).collect())).collect()
    }
}

/// How many copies each worker should have: as its weight says, but no more than fit, nor than there are experts; what that
/// leaves over is shared out among the others, by weight again.
fn shares(problem: &Problem<'_>, weights: Vec<f64>) -> Vec<f64> {
    let slots = problem.model.experts as usize * problem.model.moe_layers.len();
    let caps: Vec<f64> = problem.workers.iter().map(|worker| problem.room(worker).min(slots) as f64).collect();
    let mut shares: Vec<Option<f64>> = vec![None; weights.len()];
    loop {
        let (mut left, mut free) = ((slots * problem.wanted()) as f64, 0.0);
        for (share, weight) in shares.iter().zip(&weights) {
            match share {
                Some(share) => left -= share,
                None => free += weight,
            }
        }
        let each = left.max(0.0) / free;
        let mut full =
            (0..weights.len()).filter(|at| shares[*at].is_none() && weights[*at] * each > caps[*at]).peekable();
        if full.peek().is_none() {
            // Above 0, since it is divided by.
            let share =
                |(share, weight): (&Option<f64>, &f64)| share.unwrap_or(weight * each).max(f64::MIN_POSITIVE.sqrt());
            return shares.iter().zip(&weights).map(share).collect();
        }
        for at in full.collect::<Vec<_>>() {
            shares[at] = Some(caps[at]);
        }
    }
}

/// Shares by memory. A worker without a budget weighs as much as the largest with one.
fn memory_weights(problem: &Problem<'_>) -> Vec<f64> {
    let largest = problem.workers.iter().map(|worker| worker.memory_budget).max();
    let unlimited = largest.filter(|bytes| *bytes > 0).unwrap_or(1);
    let weigh = |budget: u64| if budget == 0 { unlimited as f64 } else { budget as f64 };
    problem.workers.iter().map(|worker| weigh(worker.memory_budget)).collect()
}
