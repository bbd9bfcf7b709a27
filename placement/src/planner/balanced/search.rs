//! One layer, brought closer to balance.
//!
//! In: a [`Draft`] and one of its layers. Out: steps that each make the worker that takes longest take less, and nobody else
//! as long. Never here: a step that costs an expert a wanted holder, safety, or memory that is not there. A spare that shares
//! its fate with a holder is a step only where no other worker would gain by it.

use super::draft::{Draft, ROUNDING, Step};
use super::fill::least_missed;
use crate::planner::fate::Fates;

/// How many of the least busy workers are looked at that could take a copy if others relieved them.
const IDLEST: usize = 8;
/// How many copies one worker is relieved of at once.
const RELIEVED: usize = 8;

/// Steps that belong together, and the time of the slowest worker they touch, thereafter.
pub(super) struct Action {
    pub(super) steps: Vec<Step>,
    pub(super) time: f64,
}

/// The best thing to do for the slowest worker of a layer.
pub(super) fn best_action(draft: &Draft<'_>, fates: &Fates, layer: usize) -> Option<Action> {
    let search = Search::new(draft, fates, layer);
    let mut best: Option<Action> = None;
    // In the order of what they cost: an action must be better than a cheaper one to be chosen.
    for kind in [Search::drop_copy, Search::move_copy, Search::add_copy] {
        for slot in draft.held_in(layer, search.slowest).iter().copied().filter(|slot| draft.rows[*slot] > 0.0) {
            keep_better(&mut best, kind(&search, slot));
        }
    }
    best.filter(|action| search.helps(action.time)).or_else(|| search.make_way()).or_else(|| search.swap_copies())
}

fn keep_better(best: &mut Option<Action>, candidate: Option<Action>) {
    if let Some(candidate) = candidate
        && best.as_ref().is_none_or(|best| candidate.time < best.time * (1.0 - ROUNDING))
    {
        *best = Some(candidate);
    }
}

struct Search<'a> {
    draft: &'a Draft<'a>,
    fates: &'a Fates,
    layer: usize,
    slowest: usize,
    /// How long the slowest takes.
    most: f64,
    /// How long each would take if rows could be spread perfectly.
    ideal: f64,
    spares: usize,
    /// The worth of an average copy, in rows: a spare is for experts above it.
    ideal_copy: f64,
}

impl<'a> Search<'a> {
    fn new(draft: &'a Draft<'a>, fates: &'a Fates, layer: usize) -> Self {
        let (slowest, most) = draft.slowest(layer);
        let (spares, ideal_copy) = (draft.spares(layer), draft.ideal_copy(layer));
        Self { draft, fates, layer, slowest, most, ideal: draft.ideal(layer), spares, ideal_copy }
    }

    /// Whether it is better than it was once the workers concerned take that long.
    fn helps(&self, time: f64) -> bool {
        time < self.most * (1.0 - ROUNDING)
    }

    fn copies(&self, slot: usize) -> usize {
        self.draft.holders[slot].len()
    }

    /// The worker that would be done soonest with `rows` more, of those that can take the slot.
    fn soonest(&self, slot: usize, rows: f64, able: impl Fn(usize) -> bool) -> Option<(usize, f64)> {
        let total = |worker: usize| self.draft.total[worker] / self.draft.speed[worker];
        let mut best: Option<(usize, f64)> = None;
        for worker in 0..self.draft.workers {
            let time = self.draft.time(self.layer, worker, rows);
            let sooner = |(other, best): (usize, f64)| time < best || time == best && total(worker) < total(other);
            let able = || self.draft.fits(slot, worker) && !self.draft.holds(slot, worker) && able(worker);
            if best.is_none_or(sooner) && able() {
                best = Some((worker, time));
            }
        }
        best
    }

    /// The longest that the holders of a slot take once each carries `more` rows, `leaves` excepted.
    fn longest(&self, slot: usize, more: f64, leaves: usize) -> f64 {
        let stay = self.draft.holders[slot].iter().filter(|holder| **holder != leaves);
        stay.map(|holder| self.draft.time(self.layer, *holder, more)).fold(0.0, f64::max)
    }

    fn drop_copy(&self, slot: usize) -> Option<Action> {
        let copies = self.copies(slot);
        let holders = &self.draft.holders[slot];
        if copies <= self.draft.wanted || !self.fates.replacing(holders, self.slowest, self.draft.wanted).nothing() {
            return None;
        }
        let per = self.draft.per_copy(slot, copies);
        let others = self.longest(slot, self.draft.per_copy(slot, copies - 1) - per, self.slowest);
        let time = others.max(self.draft.time(self.layer, self.slowest, -per));
        Some(Action { steps: vec![Step::Take { slot, worker: self.slowest }], time })
    }

    fn move_copy(&self, slot: usize) -> Option<Action> {
        let per = self.draft.per_copy(slot, self.copies(slot));
        let holders = &self.draft.holders[slot];
        // First so that all holders stay as far apart as they are, then those who are wanted.
        let found = [holders.len().max(self.draft.wanted), self.draft.wanted].into_iter().filter_map(|spread| {
            let need = self.fates.replacing(holders, self.slowest, spread);
            let able = |worker| need.nothing() || self.fates.meets(need, holders, self.slowest, worker);
            self.soonest(slot, per, able)
        });
        let leaves = self.draft.time(self.layer, self.slowest, -per);
        let mut found = found.map(|(worker, time)| (worker, time.max(leaves)));
        let (worker, time) = found.find(|(_, time)| self.helps(*time))?;
        let steps = vec![Step::Give { slot, worker }, Step::Take { slot, worker: self.slowest }];
        Some(Action { steps, time })
    }

    /// One more copy of a busy expert; the spare that carries least makes way where there are as many as may be.
    fn add_copy(&self, slot: usize) -> Option<Action> {
        let copies = self.copies(slot);
        let (per, after) = (self.draft.per_copy(slot, copies), self.draft.per_copy(slot, copies + 1));
        if !self.may_add(slot) {
            return None;
        }
        let mut steps = Vec::new();
        let mut time = self.draft.time(self.layer, self.slowest, after - per);
        if self.spares >= self.draft.problem.redundant as usize {
            let (step, longest) = self.least_spare(slot, after)?;
            steps.push(step);
            time = time.max(longest);
        }
        // First among those who share nothing with its holders, then nothing but a zone.
        let apart = [0, 1, u8::MAX].into_iter().filter_map(|common| {
            let able = |worker| self.fates.common(&self.draft.holders[slot], worker) <= common;
            self.soonest(slot, after, able).map(|(worker, soonest)| (worker, time.max(soonest)))
        });
        let mut apart = apart.take(if self.fates.shared { 3 } else { 1 });
        let (worker, time) = apart.find(|(_, time)| self.helps(*time))?;
        steps.push(Step::Give { slot, worker });
        Some(Action { steps, time })
    }

    /// Whether an expert may have a spare: no wanted copy lacks memory anywhere, and its copies are above the average.
    fn may_add(&self, slot: usize) -> bool {
        let copies = self.copies(slot);
        !self.draft.short && copies >= self.draft.wanted && self.draft.per_copy(slot, copies) > self.ideal_copy
    }

    /// The spare copy of another expert that is missed least: without it, its expert's copies still carry fewer than `rows`.
    fn least_spare(&self, except: usize, rows: f64) -> Option<(Step, f64)> {
        let spare = |slot: &usize| *slot != except && self.copies(*slot) > self.draft.wanted;
        let left = |slot: usize| self.draft.per_copy(slot, self.copies(slot) - 1);
        let slots = self.draft.slots_of(self.layer).filter(spare).filter(|slot| left(*slot) < rows);
        let slot = slots.min_by(|a, b| left(*a).total_cmp(&left(*b)))?;
        let worker = least_missed(self.draft, self.fates, slot)?;
        let more = left(slot) - self.draft.per_copy(slot, self.copies(slot));
        Some((Step::Take { slot, worker }, self.longest(slot, more, worker)))
    }

    /// A busy expert for an idle one. Both workers must have memory for both until each has its own.
    fn swap_copies(&self) -> Option<Action> {
        let (draft, layer, slow) = (self.draft, self.layer, self.slowest);
        let mut best: Option<Action> = None;
        for slot in draft.held_in(layer, slow).iter().copied() {
            let per = draft.per_copy(slot, self.copies(slot));
            for worker in (0..draft.workers).filter(|worker| *worker != slow) {
                if draft.holds(slot, worker) || !draft.fits(slot, worker) || !self.may_replace(slot, slow, worker) {
                    continue;
                }
                for other in draft.held_in(layer, worker).iter().copied() {
                    let back = per - draft.per_copy(other, self.copies(other));
                    if back <= 0.0 || draft.holds(other, slow) || !draft.fits(other, slow) {
                        continue;
                    }
                    let time = draft.time(layer, slow, -back).max(draft.time(layer, worker, back));
                    let better = best.as_ref().map_or(self.most, |best| best.time) * (1.0 - ROUNDING);
                    if time < better && self.may_replace(other, worker, slow) {
                        best = Some(Action { steps: swap(slot, slow, other, worker), time });
                    }
                }
            }
        }
        best
    }

    /// A busy expert, or one more copy of it, for a worker that others first relieve of some of its own.
    fn make_way(&self) -> Option<Action> {
        let (draft, layer) = (self.draft, self.layer);
        let mut idle: Vec<usize> =
            (0..draft.workers).filter(|worker| *worker != self.slowest && draft.has_room(*worker)).collect();
        let time = |worker: usize| draft.time(layer, worker, 0.0);
        idle.sort_by(|a, b| time(*a).total_cmp(&time(*b)).then(a.cmp(b)));
        // A spare where it shares nothing with the holders, or else where it may share all.
        let ways = [0, u8::MAX].into_iter().map(|common| self.way(&idle, common));
        ways.take(if self.fates.shared { 2 } else { 1 }).flatten().next()
    }

    /// The best way to make for one of `idle`; for a spare, for one that shares no more than `common` with the holders.
    fn way(&self, idle: &[usize], common: u8) -> Option<Action> {
        let (draft, layer) = (self.draft, self.layer);
        let mut best: Option<Action> = None;
        for slot in draft.held_in(layer, self.slowest).iter().copied().filter(|slot| draft.rows[*slot] > 0.0) {
            let adds = self.may_add(slot) && self.spares < draft.problem.redundant as usize;
            let able = |worker: &usize| !draft.holds(slot, *worker) && draft.fits(slot, *worker);
            for worker in idle.iter().copied().filter(able).take(IDLEST) {
                if adds && self.fates.common(&draft.holders[slot], worker) <= common {
                    keep_better(&mut best, self.relieve(slot, worker, true, idle));
                }
                if self.may_replace(slot, self.slowest, worker) {
                    keep_better(&mut best, self.relieve(slot, worker, false, idle));
                }
            }
        }
        best
    }

    /// The slot for that worker, in addition to the slowest or in its stead, and as many of its own for others of `idle` as
    /// that takes: until nobody needs longer than half way from what the slowest will need, or all would if rows could be
    /// spread perfectly, to what the slowest needs now.
    fn relieve(&self, slot: usize, worker: usize, adds: bool, idle: &[usize]) -> Option<Action> {
        let (draft, layer, copies) = (self.draft, self.layer, self.copies(slot));
        let per = draft.per_copy(slot, copies);
        let (rows, less) = if adds {
            let after = draft.per_copy(slot, copies + 1);
            (after, after - per)
        } else {
            (per, -per)
        };
        let mut longest = draft.time(layer, self.slowest, less);
        let goal = (longest.max(self.ideal) + self.most) / 2.0;
        let mut own: Vec<(usize, f64)> =
            draft.held_in(layer, worker).iter().map(|own| (*own, draft.per_copy(*own, self.copies(*own)))).collect();
        own.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let (mut more, mut relieved, mut steps) = (rows, Vec::new(), Vec::new());
        for (own, rows) in own {
            if draft.time(layer, worker, more) <= goal || relieved.len() == RELIEVED {
                break;
            }
            let takes = |to: &usize| {
                let free = *to != worker && !relieved.contains(to) && draft.time(layer, *to, rows) <= goal;
                free && !draft.holds(own, *to) && draft.fits(own, *to) && self.may_replace(own, worker, *to)
            };
            let Some(to) = idle.iter().copied().find(takes) else { continue };
            steps.extend([Step::Give { slot: own, worker: to }, Step::Take { slot: own, worker }]);
            longest = longest.max(draft.time(layer, to, rows));
            more -= rows;
            relieved.push(to);
        }
        let time = longest.max(draft.time(layer, worker, more));
        steps.push(Step::Give { slot, worker });
        steps.extend((!adds).then_some(Step::Take { slot, worker: self.slowest }));
        (time <= goal).then_some(Action { steps, time })
    }

    fn may_replace(&self, slot: usize, leaves: usize, joins: usize) -> bool {
        let holders = &self.draft.holders[slot];
        let need = self.fates.replacing(holders, leaves, self.draft.wanted);
        self.fates.meets(need, holders, leaves, joins)
    }
}

fn swap(slot: usize, slow: usize, other: usize, worker: usize) -> Vec<Step> {
    vec![
        Step::Give { slot, worker },
        Step::Give { slot: other, worker: slow },
        Step::Take { slot, worker: slow },
        Step::Take { slot: other, worker },
    ]
}
