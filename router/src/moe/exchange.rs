//! Sends a layer's rows to the workers that hold their experts, and stays until every row is back.
//!
//! In: normed rows and their routing. Out: each row's weighted sum, f32 `[T, D]`.
//! Never here: an answer without all its parts. What a worker did not compute is planned again on another, or the step
//! waits for a holder until its deadline.

use std::{sync::Arc, time::Duration};

use conclave_model::{
    gate::Routing,
    wire::{self, Encoding},
};
use conclave_placement::ids::WorkerId;
use conclave_runtime::channel::MAX_INTERNAL_MESSAGE;
use futures::{StreamExt, stream::FuturesUnordered};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::{
    combine,
    plan::{self, Assignment, Most, Part},
};
use crate::{
    stall::Stall,
    workers::{Dispatch, Reach, Refusal, Reply, Snapshot, Workers},
};

/// How long a worker that said BUSY is passed over: at least, and at most, whatever it asked for.
const BUSY_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// How long a worker that failed or refused is passed over, its stream apart: that has a backoff of its own.
const FAILED_PAUSE: Duration = Duration::from_millis(250);

/// What comes back from a worker, and so who does the weighted sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One unweighted row per assignment; the router sums in gate order, so placement does not show in the result.
    PerAssignment,
    /// One weighted row per row sent: fewest bytes.
    PartialSum,
}

/// The router's end of dispatch and combine.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// Who can be asked.
    pub workers: Workers,
    /// What comes back.
    pub mode: Mode,
    /// How rows go out.
    pub encoding: Encoding,
    /// D.
    pub hidden: usize,
    /// How long a worker may take for one batch before it is suspect.
    pub patience: Duration,
    /// Where it is told that a step waits.
    pub stall: Arc<Stall>,
}

/// Why a layer's sum is not complete.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The deadline came first.
    #[error("layer {layer} was not complete at its deadline: {waiting_for}")]
    Deadline {
        /// Where the step stood.
        layer: u32,
        /// What it waited for.
        waiting_for: String,
    },
    /// Rows that are no numbers must not leave: every worker's answer would be none either, and all would be distrusted.
    #[error("layer {layer} was reached with values that are no numbers")]
    NotFinite {
        /// Where the step stood.
        layer: u32,
    },
    /// A worker calls the batch itself wrong; no other would think better of it.
    #[error("layer {layer}: {message}")]
    Invalid {
        /// Where the step stood.
        layer: u32,
        /// As the worker put it.
        message: String,
    },
}

/// Everything one layer's exchange has in hand.
struct Round<'a> {
    exchange: &'a Exchange,
    layer: u32,
    rows: &'a [f32],
    routing: &'a Routing,
    deadline: Instant,
    /// Assignments that are neither back nor on their way.
    todo: Vec<Assignment>,
    /// Workers that did not compute what they were sent, and until when they are passed over.
    passed_over: Vec<(WorkerId, Instant)>,
    last_failure: Option<String>,
    invalid: Option<String>,
    /// Rows by slot, or complete parts, as they come back.
    slots: Vec<f32>,
    partials: Vec<(Vec<u32>, u32, Vec<f32>)>,
}

/// One part on its way, with what is needed to plan it again.
struct Sent {
    part: Part,
    worker: WorkerId,
    reply: Reply,
}

impl Exchange {
    /// The sum over each row's experts for `rows` `[T, D]` of `layer`, before `deadline`.
    pub async fn routed(
        &self,
        layer: u32,
        rows: &[f32],
        routing: &Routing,
        deadline: Instant,
    ) -> Result<Vec<f32>, Error> {
        if !wire::all_finite(rows) || !wire::all_finite(&routing.weights) {
            return Err(Error::NotFinite { layer });
        }
        let per_row = routing.experts_per_row;
        let todo = (0u32..)
            .zip(&routing.expert_ids)
            .map(|(slot, &expert)| Assignment { slot, row: slot / per_row as u32, expert })
            .collect();
        let slots = match self.mode {
            Mode::PerAssignment => vec![0.0; routing.expert_ids.len() * self.hidden],
            Mode::PartialSum => Vec::new(),
        };
        let round = Round {
            exchange: self,
            layer,
            rows,
            routing,
            deadline,
            todo,
            passed_over: Vec::new(),
            last_failure: None,
            invalid: None,
            slots,
            partials: Vec::new(),
        };
        // What a failed step waited for stays told, for requests whose deadline passes at the same moment; the next step
        // that can be planned clears it.
        round.run().await
    }
}

impl Exchange {
    /// What fits into one message and its answer, with room for ids and weights.
    fn most(&self) -> Most {
        let room = MAX_INTERNAL_MESSAGE / 2;
        let out = self.encoding.row_bytes(self.hidden) + self.encoding.scale_bytes(self.hidden);
        // Answers are at most f32.
        let back = Encoding::F32.row_bytes(self.hidden);
        match self.mode {
            Mode::PerAssignment => Most { rows: (room / out).max(1), assignments: (room / back).max(1) },
            Mode::PartialSum => Most { rows: (room / back.max(out)).max(1), assignments: room / 16 },
        }
    }
}

impl Round<'_> {
    async fn run(mut self) -> Result<Vec<f32>, Error> {
        let mut snapshots = self.exchange.workers.watch();
        let mut flying = FuturesUnordered::new();
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            for part in self.plan(&snapshot) {
                flying.push(self.send(&snapshot, part));
            }
            if self.todo.is_empty() && flying.is_empty() {
                return Ok(self.sum());
            }
            let waits = !self.todo.is_empty();
            let again = self.passed_over.iter().map(|(_, until)| *until).min();
            tokio::select! {
                Some(sent) = flying.next() => {
                    self.receive(sent);
                    if let Some(message) = self.invalid.take() {
                        return Err(Error::Invalid { layer: self.layer, message });
                    }
                }
                // The pool lives as long as this handle; were it gone, the deadline would end the wait.
                Ok(()) = snapshots.changed(), if waits => {}
                () = sleep_until(again.unwrap_or(self.deadline)), if waits && again.is_some() => {}
                () = sleep_until(self.deadline) => return Err(self.late()),
            }
        }
    }

    /// Parts for all that is to do, or none while an expert has no holder that may be asked now.
    fn plan(&mut self, snapshot: &Snapshot) -> Vec<Part> {
        if self.todo.is_empty() {
            return Vec::new();
        }
        let now = Instant::now();
        self.passed_over.retain(|(_, until)| *until > now);
        let passed_over = |reach: &Reach| self.passed_over.iter().any(|(worker, _)| *worker == reach.id);
        let excluded: Vec<u32> =
            (0u32..).zip(&snapshot.workers).filter(|(_, reach)| passed_over(reach)).map(|(index, _)| index).collect();
        let most = self.exchange.most();
        match plan::plan(&self.todo, |expert| snapshot.holders(self.layer, expert), &excluded, most) {
            Ok(parts) => {
                self.todo.clear();
                self.exchange.stall.clear();
                parts
            }
            Err(plan::NoHolder { expert }) => {
                let absent = if snapshot.workers.is_empty() {
                    "no expert worker can be reached".to_owned()
                } else {
                    format!("expert {expert} of layer {} has no holder", self.layer)
                };
                self.exchange.stall.set(match &self.last_failure {
                    Some(failure) if !excluded.is_empty() => failure.clone(),
                    Some(failure) => format!("{absent} ({failure})"),
                    None => absent,
                });
                Vec::new()
            }
        }
    }

    /// One part to its worker, as a future that borrows nothing of the round.
    fn send(&self, snapshot: &Snapshot, part: Part) -> impl Future<Output = Sent> + use<> {
        let Reach { id, link } = snapshot.workers[part.worker as usize].clone();
        let dispatch = self.dispatch(snapshot, &part);
        let (patience, deadline) = (self.exchange.patience, self.deadline);
        async move {
            let reply = link.call(&dispatch, patience, deadline).await;
            Sent { part, worker: id, reply }
        }
    }

    fn dispatch(&self, snapshot: &Snapshot, part: &Part) -> Dispatch {
        let hidden = self.exchange.hidden;
        let mut gathered = Vec::with_capacity(part.rows.len() * hidden);
        for &row in &part.rows {
            let start = row as usize * hidden;
            gathered.extend_from_slice(&self.rows[start..start + hidden]);
        }
        let (values, scales) = wire::encode(&gathered, hidden, self.exchange.encoding);
        let weight = |assignment: &Assignment| self.routing.weights[assignment.slot as usize];
        Dispatch {
            layer: self.layer,
            plan_version: snapshot.plan_version.0,
            encoding: self.exchange.encoding,
            rows: part.rows.len(),
            hidden: values,
            scales,
            expert_ids: part.assignments.iter().map(|assignment| assignment.expert).collect(),
            row_ids: part.row_ids.clone(),
            weights: match self.exchange.mode {
                Mode::PerAssignment => None,
                Mode::PartialSum => Some(part.assignments.iter().map(weight).collect()),
            },
        }
    }

    /// Keeps what is back; puts what is not on the list again.
    fn receive(&mut self, Sent { part, worker, reply }: Sent) {
        let hidden = self.exchange.hidden;
        match reply {
            Reply::Rows(rows) => match self.exchange.mode {
                Mode::PerAssignment => {
                    for (assignment, row) in part.assignments.iter().zip(rows.chunks_exact(hidden)) {
                        let start = assignment.slot as usize * hidden;
                        self.slots[start..start + hidden].copy_from_slice(row);
                    }
                }
                Mode::PartialSum => {
                    let first = part.assignments.first().map_or(0, |assignment| assignment.slot);
                    self.partials.push((part.rows, first, rows));
                }
            },
            Reply::Refused(Refusal::Invalid(message)) => self.invalid = Some(format!("worker {worker}: {message}")),
            Reply::Refused(refusal) => {
                let pause = match &refusal {
                    Refusal::Busy(after) => (*after).clamp(BUSY_PAUSE.0, BUSY_PAUSE.1),
                    _ => FAILED_PAUSE,
                };
                self.again(part, worker.clone(), pause, format!("worker {worker} refused: {refusal}"));
            }
            Reply::Lost(failure) => self.again(part, worker, FAILED_PAUSE, failure),
        }
    }

    /// Puts a part on the list again. Its worker is passed over for a while: another holder is asked at once, and where
    /// there is none it is asked again after the pause.
    fn again(&mut self, part: Part, worker: WorkerId, pause: Duration, failure: String) {
        debug!(layer = self.layer, rows = part.rows.len(), %failure, "planning rows again");
        self.passed_over.push((worker, Instant::now() + pause));
        self.last_failure = Some(failure);
        self.todo.extend(part.assignments);
        self.todo.sort_unstable_by_key(|assignment| assignment.slot);
    }

    fn sum(mut self) -> Vec<f32> {
        let (hidden, routing) = (self.exchange.hidden, self.routing);
        match self.exchange.mode {
            Mode::PerAssignment => {
                combine::per_assignment(&self.slots, &routing.weights, routing.experts_per_row, hidden)
            }
            Mode::PartialSum => {
                let mut sums = vec![0.0; self.rows.len()];
                // In an order that does not depend on who answered first.
                self.partials.sort_unstable_by_key(|(_, first_slot, _)| *first_slot);
                for (indices, _, rows) in &self.partials {
                    combine::add_partial(&mut sums, indices, rows, hidden);
                }
                sums
            }
        }
    }

    fn late(&self) -> Error {
        let waiting_for = self.exchange.stall.reason().unwrap_or_else(|| "answers from expert workers".to_owned());
        Error::Deadline { layer: self.layer, waiting_for }
    }
}
