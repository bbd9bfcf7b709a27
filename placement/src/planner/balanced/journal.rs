//! Steps tried on a draft, until it is clear how many of them are worth it.
//!
//! In: steps, and the balancedness after each few. Out: those that are kept, done; the rest, undone. Never here: a step of
//! its own.

use super::draft::{Draft, Step};

/// How much may still change.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// The floor on gains in balancedness.
    pub(super) least: f64,
    /// Copies that may yet be sent on their way.
    pub(super) moves: usize,
}

pub(super) struct Journal {
    start: f64,
    steps: Vec<Step>,
    marks: Vec<Mark>,
}

struct Mark {
    steps: usize,
    moves: usize,
    balance: f64,
}

impl Journal {
    /// Of a draft with that balancedness.
    pub(super) fn new(start: f64) -> Self {
        Self { start, steps: Vec::new(), marks: Vec::new() }
    }

    /// Does some steps, which count as one.
    pub(super) fn act(&mut self, draft: &mut Draft<'_>, steps: &[Step]) {
        for step in steps {
            draft.apply(*step);
        }
        self.steps.extend_from_slice(steps);
    }

    /// Ends what counts as one, with the balancedness it led to.
    pub(super) fn mark(&mut self, draft: &Draft<'_>, balance: f64) {
        let done = self.marks.last().map_or((0, 0), |mark| (mark.steps, mark.moves));
        let moves = done.1 + self.steps[done.0..].iter().map(|step| draft.moves(step)).sum::<usize>();
        self.marks.push(Mark { steps: self.steps.len(), moves, balance });
    }

    /// How often there was something to mark.
    pub(super) fn marks(&self) -> usize {
        self.marks.len()
    }

    /// Keeps all if the whole is worth the floor, but for the last of it, which gains less than half the floor and would
    /// not be worth doing later either; and no more than the budget allows, from which it is taken. Returns what is kept.
    pub(super) fn settle(mut self, draft: &mut Draft<'_>, budget: &mut Budget) -> Vec<Step> {
        let end = self.marks.last().map_or(self.start, |mark| mark.balance);
        let mut kept = 0;
        if end - self.start >= budget.least {
            let enough = self.marks.iter().position(|mark| end - mark.balance <= budget.least / 2.0);
            kept = enough.map_or(0, |last| last + 1);
            while kept > 0 && self.marks[kept - 1].moves > budget.moves {
                kept -= 1;
            }
        }
        let (steps, moves) =
            kept.checked_sub(1).map_or((0, 0), |last| (self.marks[last].steps, self.marks[last].moves));
        self.undo_to(draft, steps);
        budget.moves = budget.moves.saturating_sub(moves);
        self.steps
    }

    /// Undoes what was done since the last mark.
    pub(super) fn undo_unmarked(&mut self, draft: &mut Draft<'_>) {
        let steps = self.marks.last().map_or(0, |mark| mark.steps);
        self.undo_to(draft, steps);
    }

    fn undo_to(&mut self, draft: &mut Draft<'_>, steps: usize) {
        for step in self.steps.drain(steps..).rev() {
            draft.undo(step);
        }
    }
}
