//! Batches whose rows a GPU computes, or that are computed. In: rows of all of them on their way. Out: each one's own. Never here: a
//! wait, but in [`Started::finish`].

use super::{Computed, ExpertBatch, weigh};
use crate::{hidden::Hidden, transfer::Leaving};

/// What has been begun; [`finish`](Started::finish) has what comes of it.
#[derive(Debug)]
pub struct Started(State);

#[derive(Debug)]
enum State {
    Finished(Vec<Computed>),
    Leaving {
        /// Rows of all batches, one batch after the other.
        rows: Leaving<1>,
        hidden: usize,
        batches: Vec<Part>,
    },
}

/// What must be known of a batch when its rows are here.
#[derive(Debug)]
struct Part {
    assignments: usize,
    weighing: Option<Weighing>,
}

/// How assignments become one row each.
#[derive(Debug)]
struct Weighing {
    rows: usize,
    row_ids: Vec<u32>,
    weights: Vec<f32>,
}

impl Started {
    pub(super) fn finished(outputs: Vec<Computed>) -> Self {
        Self(State::Finished(outputs))
    }

    /// `rows` hold a row of `hidden` for each assignment of `batches`.
    pub(super) fn leaving(rows: Leaving<1>, batches: &[&ExpertBatch], hidden: usize) -> Self {
        let part = |batch: &&ExpertBatch| {
            let weighing = batch.weights.clone().map(|weights| {
                let row_ids = batch.row_ids.clone();
                Weighing { rows: batch.rows, row_ids, weights }
            });
            Part { assignments: batch.expert_ids.len(), weighing }
        };
        Self(State::Leaving { rows, hidden, batches: batches.iter().map(part).collect() })
    }

    /// Whether [`finish`](Self::finish) waits for nothing.
    pub fn is_ready(&self) -> bool {
        match &self.0 {
            State::Finished(_) => true,
            State::Leaving { rows, .. } => rows.have_arrived(),
        }
    }

    /// Per batch `[A, D]`, or `[n, D]` where it carries weights. Here a GPU is waited for.
    pub fn finish(self) -> Vec<Computed> {
        let (rows, hidden, batches) = match self.0 {
            State::Finished(outputs) => return outputs,
            State::Leaving { rows, hidden, batches } => (rows, hidden, batches),
        };
        let [rows] = rows.wait();
        let (rows, mut first) = (Hidden(rows), 0);
        let part = |Part { assignments, weighing }| {
            let computed = Computed::rows(rows.run(first, assignments));
            first += assignments;
            match weighing {
                Some(Weighing { rows, row_ids, weights }) => weigh(computed, rows, &row_ids, &weights, hidden),
                None => computed,
            }
        };
        batches.into_iter().map(part).collect()
    }
}
