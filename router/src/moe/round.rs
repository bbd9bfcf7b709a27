//! One layer's round of asking: parts leave, and what a worker did not compute, or is late with, is asked of another.
//!
//! In: assignments and who can be asked. Out: every row's sum, or why not by the deadline.
//! Never here: an answer without all its parts, one part counted twice, a worker asked again without a pause.
//!
//! A part that is *late* (by what answers of its size usually take, see `workers/pace.rs`) is *hedged*: asked of other
//! holders too, within a budget, and of others again if those are late or fail. The first whole answer counts; all are the
//! same, because expert calls are pure. As long as its answer is overdue a worker is avoided, so that one that hangs costs a
//! single wait and not one per layer.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use conclave_model::{
    gate::Routing,
    wire::{Encoded, Rows},
};
use conclave_placement::ids::WorkerId;
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::{
    combine::{self, Partial, Place},
    exchange::{Error, Exchange, Hedging, Mode},
    plan::{self, Assignment, Part, Standing},
};
use crate::phases::{Phase, Phases};
use crate::workers::{Contents, Dispatch, Reach, Refusal, Reply, Snapshot};

/// How long a worker that said BUSY is passed over: at least, and at most, whatever it asked for.
const BUSY_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// How long a worker that failed or refused is passed over, its stream apart: that has a backoff of its own.
const FAILED_PAUSE: Duration = Duration::from_millis(250);

/// Everything one layer's exchange has in hand.
pub(super) struct Round<'a> {
    exchange: &'a Exchange,
    layer: u32,
    rows: &'a Encoded,
    routing: &'a Routing,
    deadline: Instant,
    /// Assignments that are neither back nor on their way.
    todo: Vec<Assignment>,
    /// Parts that were sent, in the order they were.
    jobs: Vec<Job>,
    /// Of them, those that are not back.
    open: usize,
    /// Workers that did not compute what they were sent, and until when they are passed over.
    passed_over: Vec<(WorkerId, Instant)>,
    last_failure: Option<String>,
    /// The worker that called a batch invalid, and what was said when it was said again.
    invalid: Option<WorkerId>,
    condemned: Option<String>,
    /// Answers as they came, and of each slot where among them its row lies.
    answers: Vec<Rows>,
    slots: Vec<Place>,
    partials: Vec<Partial>,
}

/// A part that was sent.
struct Job {
    part: Part,
    /// The first, and hedges.
    attempts: Vec<Attempt>,
    /// When it is to be hedged, if it may be.
    late_at: Option<Instant>,
    done: bool,
}

/// The same assignments, sent to one worker or, as a hedge, to several.
struct Attempt {
    workers: Vec<WorkerId>,
    /// Parts that are not back; those that are.
    missing: usize,
    back: Vec<(Part, Rows)>,
    failed: bool,
}

impl Attempt {
    fn of<'f>(flights: impl Iterator<Item = &'f Flight> + Clone) -> Self {
        let workers = flights.clone().map(|flight| flight.to.id.clone()).collect();
        Self { workers, missing: flights.count(), back: Vec::new(), failed: false }
    }
}

impl Job {
    /// Whether that worker may still answer.
    fn waits_for(&self, worker: &WorkerId) -> bool {
        self.attempts.iter().any(|attempt| !attempt.failed && attempt.workers.contains(worker))
    }
}

/// One part about to leave; borrows nothing of the round.
struct Flight {
    job: usize,
    attempt: usize,
    part: Part,
    to: Reach,
    dispatch: Dispatch,
    late_at: Option<Instant>,
    patience: Duration,
    deadline: Instant,
}

impl Flight {
    async fn reply(self) -> Sent {
        let reply = self.to.link.call(self.dispatch, self.late_at, self.patience, self.deadline).await;
        Sent { job: self.job, attempt: self.attempt, part: self.part, worker: self.to.id, reply }
    }
}

/// What became of a part, with what is needed to plan it again.
struct Sent {
    job: usize,
    attempt: usize,
    part: Part,
    worker: WorkerId,
    reply: Reply,
}

impl<'a> Round<'a> {
    pub(super) fn new(
        exchange: &'a Exchange,
        layer: u32,
        rows: &'a Encoded,
        routing: &'a Routing,
        deadline: Instant,
        todo: Vec<Assignment>,
    ) -> Self {
        let slots = match exchange.mode {
            Mode::PerAssignment => vec![Place::default(); routing.expert_ids.len()],
            Mode::PartialSum => Vec::new(),
        };
        Self {
            exchange,
            layer,
            rows,
            routing,
            deadline,
            todo,
            jobs: Vec::new(),
            open: 0,
            passed_over: Vec::new(),
            last_failure: None,
            invalid: None,
            condemned: None,
            answers: Vec::new(),
            slots,
            partials: Vec::new(),
        }
    }

    pub(super) async fn run(mut self) -> Result<Vec<f32>, Error> {
        let mut snapshots = self.exchange.workers.watch();
        let mut flying = FuturesUnordered::new();
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            for part in self.plan(&snapshot) {
                flying.push(self.begin(&snapshot, part).reply());
            }
            flying.extend(self.hedge(&snapshot).into_iter().map(Flight::reply));
            if self.todo.is_empty() && self.open == 0 {
                let exchange = self.exchange;
                return Ok(exchange.workers.counters().phases.timed(Phase::Combine, || self.sum()));
            }
            let (waits, wake) = (!self.todo.is_empty(), self.wake());
            tokio::select! {
                Some(sent) = flying.next() => {
                    self.receive(sent);
                    if let Some(message) = self.condemned.take() {
                        return Err(Error::Invalid { layer: self.layer, message });
                    }
                }
                // The pool lives as long as this handle; were it gone, the deadline would end the wait.
                Ok(()) = snapshots.changed(), if waits => {}
                () = sleep_until(wake.unwrap_or(self.deadline)), if wake.is_some() => {}
                () = sleep_until(self.deadline) => return Err(self.late()),
            }
        }
    }

    /// When to look again without any news: a worker need no longer be passed over, or a part is late.
    fn wake(&self) -> Option<Instant> {
        let waits = !self.todo.is_empty();
        let again = self.passed_over.iter().filter(|_| waits).map(|(_, until)| *until);
        again.chain(self.jobs.iter().filter(|job| !job.done).filter_map(|job| job.late_at)).min()
    }

    /// Parts for all that is to do, or none while an expert has no holder that may be asked now.
    fn plan(&mut self, snapshot: &Snapshot) -> Vec<Part> {
        if self.todo.is_empty() {
            return Vec::new();
        }
        let now = Instant::now();
        self.passed_over.retain(|(_, until)| *until > now);
        let standing = |worker: u32| {
            let reach = &snapshot.workers[worker as usize];
            match self.is_passed_over(reach, now) {
                true => Standing::Excluded,
                false if reach.link.is_overdue(now) => Standing::Avoided,
                false => Standing::Ready,
            }
        };
        let planned = self.phases().timed(Phase::Plan, || self.plan_by(snapshot, &self.todo, standing));
        match planned {
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
                    Some(failure) if !self.passed_over.is_empty() => failure.clone(),
                    Some(failure) => format!("{absent} ({failure})"),
                    None => absent,
                });
                Vec::new()
            }
        }
    }

    fn plan_by(
        &self,
        snapshot: &Snapshot,
        assignments: &[Assignment],
        standing: impl Fn(u32) -> Standing,
    ) -> Result<Vec<Part>, plan::NoHolder> {
        let holders = |expert| snapshot.holders(self.layer, expert);
        let speed = |worker: u32| snapshot.workers[worker as usize].speed;
        // Any number will do that is not in step with the layers.
        let batches = self.exchange.workers.counters().batches.load(Relaxed);
        let turn = (batches.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32;
        plan::plan(assignments, holders, standing, speed, turn, self.exchange.most())
    }

    fn phases(&self) -> &Phases {
        &self.exchange.workers.counters().phases
    }

    fn is_passed_over(&self, reach: &Reach, now: Instant) -> bool {
        self.passed_over.iter().any(|(worker, until)| *worker == reach.id && *until > now)
    }

    /// Sends a part for the first time.
    fn begin(&mut self, snapshot: &Snapshot, part: Part) -> Flight {
        let hedging = self.exchange.hedging.as_ref().inspect(|hedging| hedging.sent());
        let flight = self.send(snapshot, part, self.jobs.len(), 0);
        let job = Job {
            part: flight.part.clone(),
            attempts: vec![Attempt::of(std::iter::once(&flight))],
            late_at: flight.late_at.filter(|_| hedging.is_some()),
            done: false,
        };
        self.jobs.push(job);
        self.open += 1;
        flight
    }

    /// What is late and can be asked of others.
    fn hedge(&mut self, snapshot: &Snapshot) -> Vec<Flight> {
        let now = Instant::now();
        let mut sent = Vec::new();
        for index in 0..self.jobs.len() {
            let job = &self.jobs[index];
            if job.done || job.late_at.is_none_or(|late_at| late_at > now) {
                continue;
            }
            let standing = |worker: u32| {
                let reach = &snapshot.workers[worker as usize];
                match job.waits_for(&reach.id) || self.is_passed_over(reach, now) || reach.link.is_overdue(now) {
                    true => Standing::Excluded,
                    false => Standing::Ready,
                }
            };
            let parts = self.plan_by(snapshot, &job.part.assignments, standing).ok();
            let may = |_: &Vec<Part>| self.exchange.hedging.as_ref().is_some_and(Hedging::may);
            let Some(parts) = parts.filter(may) else {
                // There may be another holder later, or a budget.
                self.jobs[index].late_at = Some(now + FAILED_PAUSE);
                continue;
            };
            debug!(layer = self.layer, attempts = job.attempts.len(), "a batch is late, asking others too");
            self.exchange.workers.counters().hedged();
            let attempt = job.attempts.len();
            let flights: Vec<Flight> =
                parts.into_iter().map(|part| self.send(snapshot, part, index, attempt)).collect();
            let job = &mut self.jobs[index];
            job.attempts.push(Attempt::of(flights.iter()));
            job.late_at = flights.iter().filter_map(|flight| flight.late_at).max();
            sent.extend(flights);
        }
        sent
    }

    fn send(&self, snapshot: &Snapshot, part: Part, job: usize, attempt: usize) -> Flight {
        let late_after = self.exchange.workers.pace().late_after(part.assignments.len());
        Flight {
            job,
            attempt,
            to: snapshot.workers[part.worker as usize].clone(),
            dispatch: self.phases().timed(Phase::Encode, || self.dispatch(snapshot, &part)),
            part,
            late_at: late_after.map(|after| Instant::now() + after),
            patience: self.exchange.patience,
            deadline: self.deadline,
        }
    }

    /// The message that goes out.
    fn dispatch(&self, snapshot: &Snapshot, part: &Part) -> Dispatch {
        let contents = Contents {
            layer: self.layer,
            plan_version: snapshot.plan_version.0,
            source: self.rows,
            rows: &part.rows,
            row_ids: &part.row_ids,
        };
        let weight = |assignment: &Assignment| self.routing.weights[assignment.slot as usize];
        let weights = (self.exchange.mode == Mode::PartialSum).then(|| part.assignments.iter().map(weight));
        Dispatch::new(contents, part.assignments.iter().map(|assignment| assignment.expert), weights)
    }

    /// Keeps what is back; puts what is not on the list again.
    fn receive(&mut self, Sent { job, attempt, part, worker, reply }: Sent) {
        let (failure, pause) = match reply {
            Reply::Rows(rows) => return self.returned(job, attempt, part, rows),
            Reply::Refused(refusal) => {
                let pause = match &refusal {
                    Refusal::Busy(after) => (*after).clamp(BUSY_PAUSE.0, BUSY_PAUSE.1),
                    _ => FAILED_PAUSE,
                };
                if let Refusal::Invalid(message) = &refusal {
                    self.called_invalid(&worker, message);
                }
                (format!("worker {worker} refused: {refusal}"), pause)
            }
            Reply::Lost(failure) => (failure, FAILED_PAUSE),
        };
        // Another holder is asked at once, and where there is none this one is asked again after the pause.
        self.passed_over.push((worker, Instant::now() + pause));
        self.failed(job, attempt, failure);
    }

    /// One worker that calls a batch invalid may be out of its mind. If it says so twice, there is nobody else to ask; if two
    /// say so, it is the batch.
    fn called_invalid(&mut self, worker: &WorkerId, message: &str) {
        if self.invalid.is_some() {
            self.condemned = Some(format!("worker {worker}: {message}"));
        } else {
            self.invalid = Some(worker.clone());
        }
    }

    fn returned(&mut self, index: usize, attempt: usize, part: Part, rows: Rows) {
        let job = &mut self.jobs[index];
        let back = &mut job.attempts[attempt];
        if job.done || back.failed {
            return;
        }
        back.missing -= 1;
        back.back.push((part, rows));
        if back.missing > 0 {
            return;
        }
        if attempt > 0 {
            self.exchange.workers.counters().hedge_won();
        }
        let whole = std::mem::take(&mut back.back);
        job.done = true;
        self.open -= 1;
        for (part, rows) in whole {
            self.keep(part, rows);
        }
    }

    fn keep(&mut self, part: Part, rows: Rows) {
        match self.exchange.mode {
            Mode::PerAssignment => {
                let answer = self.answers.len() as u32;
                for (row, assignment) in (0..).zip(&part.assignments) {
                    self.slots[assignment.slot as usize] = Place { answer, row };
                }
                self.answers.push(rows);
            }
            Mode::PartialSum => {
                let first_slot = part.assignments.first().map_or(0, |assignment| assignment.slot);
                self.partials.push(Partial { first_slot, rows: part.rows, answer: rows });
            }
        }
    }

    /// Puts a part on the list again once nobody computes it any more.
    fn failed(&mut self, index: usize, attempt: usize, failure: String) {
        let job = &mut self.jobs[index];
        if job.done || job.attempts[attempt].failed {
            return;
        }
        debug!(layer = self.layer, rows = job.part.rows.len(), %failure, "rows were not computed");
        self.last_failure = Some(failure);
        job.attempts[attempt].failed = true;
        if job.attempts.iter().any(|attempt| !attempt.failed) {
            // The one that was late enough for this attempt to be made still is.
            if attempt > 0 && attempt + 1 == job.attempts.len() {
                job.late_at = Some(Instant::now());
            }
            return;
        }
        job.done = true;
        self.open -= 1;
        self.todo.append(&mut job.part.assignments);
        self.todo.sort_unstable_by_key(|assignment| assignment.slot);
    }

    fn sum(self) -> Vec<f32> {
        let (hidden, routing) = (self.exchange.hidden, self.routing);
        match self.exchange.mode {
            Mode::PerAssignment => {
                combine::per_assignment(&self.answers, &self.slots, &routing.weights, routing.experts_per_row, hidden)
            }
            Mode::PartialSum => combine::partial_sums(self.partials, self.rows.count(), hidden),
        }
    }

    fn late(&self) -> Error {
        let waiting_for = self.exchange.stall.reason().unwrap_or_else(|| "answers from expert workers".to_owned());
        Error::Deadline { layer: self.layer, waiting_for }
    }
}
