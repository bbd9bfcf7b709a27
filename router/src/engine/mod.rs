//! The engine: one OS thread that owns the model's router half and every sequence's cache.
//!
//! In: submissions from the scheduler's queue. Out: events to each request's stream.
//! Never here: a socket, a lock held over a step, an unbounded wait. A step ends with its latest deadline at the latest.

mod running;
mod step;

use std::{panic::AssertUnwindSafe, time::Duration};

use conclave_model::{cache::SequenceCache, transformer::Transformer};
use conclave_proto::status::Failure;
use conclave_runtime::tensor_thread::panic_message;
use futures::FutureExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    moe::{Exchange, exchange},
    scheduler::{Queue, Scheduler, Submission, policy::Candidate, policy::Grant},
};

use running::Running;

/// Sequences, computing or waiting, that the engine looks at; more wait in the queue, and that is bounded too.
const SEQUENCES_HELD: usize = 256;
/// How often a reader that fell behind is looked at again while nothing else is to do.
const READER_CHECK: Duration = Duration::from_millis(5);
/// What a client is told to wait whose request met an expert without a holder.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Everything a step needs.
#[derive(Debug)]
pub struct Engine {
    /// Embedding, attention, gates, shared experts, head.
    pub transformer: Transformer,
    /// The way to the routed experts.
    pub exchange: Exchange,
    /// Chooses each step's sequences.
    pub scheduler: Scheduler,
}

impl Engine {
    /// Runs until `stop`, which fails what is not finished, or until every handle is gone.
    pub async fn run(self, mut queue: Queue, stop: CancellationToken) {
        let mut sequences: Vec<Running> = Vec::new();
        loop {
            self.admit(&mut queue, &mut sequences);
            sequences.retain_mut(|sequence| !sequence.is_over());
            if stop.is_cancelled() {
                let stopped = || Failure::unavailable("ROUTER_STOPPED", "this router has stopped", RETRY_AFTER);
                sequences.iter_mut().for_each(|sequence| sequence.fail(stopped()));
                return;
            }
            if let Some(grants) = self.scheduler.next(&candidates(&sequences, self.scheduler.limits.sequences)) {
                self.step(&mut sequences, &grants, &stop).await;
                // Other tasks of this thread get their turn even when every exchange was answered at once.
                tokio::task::yield_now().await;
            } else if !sequences.is_empty() {
                tokio::time::sleep(READER_CHECK).await;
            } else {
                self.exchange.stall.clear();
                tokio::select! {
                    submission = queue.recv() => match submission {
                        Some(submission) => sequences.push(self.open(submission)),
                        None => return,
                    },
                    () = stop.cancelled() => return,
                }
            }
        }
    }

    fn admit(&self, queue: &mut Queue, sequences: &mut Vec<Running>) {
        while sequences.len() < SEQUENCES_HELD {
            match queue.try_recv() {
                Ok(submission) => sequences.push(self.open(submission)),
                Err(_) => return,
            }
        }
    }

    fn open(&self, submission: Submission) -> Running {
        debug!(request = %submission.request.request_id, tokens = submission.request.prompt.len(), "admitted");
        Running::new(submission, SequenceCache::new(self.transformer.config(), self.transformer.compute()))
    }

    /// One forward pass over the granted rows, then a token for each sequence whose rows are all computed.
    async fn step(&self, sequences: &mut [Running], grants: &[Grant], stop: &CancellationToken) {
        let started = Instant::now();
        let mut batch: Vec<(&mut Running, usize)> = Vec::with_capacity(grants.len());
        for (index, sequence) in sequences.iter_mut().enumerate() {
            if let Some(grant) = grants.iter().find(|grant| grant.index == index) {
                sequence.joined(started);
                batch.push((sequence, grant.tokens));
            }
        }
        let deadline = batch.iter().map(|(sequence, _)| sequence.deadline()).max().unwrap_or(started);
        // A step that nobody waits for any more is given up, whatever it was waiting for itself.
        let readers: Vec<_> = batch.iter().map(|(sequence, _)| sequence.events.clone()).collect();
        let abandoned = async {
            for events in &readers {
                events.closed().await;
            }
        };
        let forward = step::forward(&self.transformer, &self.exchange, &mut batch, deadline);
        // libtorch's errors, a lack of memory among them, are panics: they end this step and not the engine.
        let passed = tokio::select! {
            passed = AssertUnwindSafe(forward).catch_unwind() => passed,
            () = abandoned => return rewind(&mut batch),
            () = stop.cancelled() => return rewind(&mut batch),
        };
        let failed = match passed {
            Ok(Ok(logits)) => {
                for ((sequence, tokens), logits) in batch.iter_mut().zip(logits) {
                    sequence.advance(*tokens, &logits);
                }
                return;
            }
            Ok(Err(exchange::Error::Deadline { waiting_for, .. })) => {
                Failed::Waiting(Failure::unavailable("NO_EXPERT_HOLDER", waiting_for, RETRY_AFTER))
            }
            Ok(Err(error)) => Failed::Computing(error.to_string()),
            Err(panic) => Failed::Computing(panic_message(&*panic)),
        };
        rewind(&mut batch);
        fail(&mut batch, &failed);
    }
}

/// Why a step came to nothing.
#[derive(Debug)]
enum Failed {
    /// The last of its deadlines passed.
    Waiting(Failure),
    /// Some sequence of it cannot be computed.
    Computing(String),
}

/// Forgets the rows of a step that did not finish.
fn rewind(batch: &mut [(&mut Running, usize)]) {
    batch.iter_mut().for_each(|(sequence, _)| sequence.rewind());
}

fn fail(batch: &mut [(&mut Running, usize)], failed: &Failed) {
    let (Failed::Waiting(Failure { message: why, .. }) | Failed::Computing(why)) = failed;
    warn!(%why, sequences = batch.len(), "step failed");
    // Which sequence of several is at fault only computing each alone can tell.
    let alone = batch.len() == 1;
    for (sequence, _) in batch {
        match failed {
            Failed::Waiting(failure) => sequence.fail(failure.clone()),
            // What libtorch says of its insides is for the log, not for clients.
            Failed::Computing(_) if alone => sequence.fail(Failure::internal("this request could not be computed")),
            Failed::Computing(_) => sequence.isolate(),
        }
    }
}

/// Sequences that could take part in the next step. No more than `most` have a cache at a time; and one that a step failed
/// with is computed alone.
fn candidates(sequences: &[Running], most: usize) -> Vec<Candidate> {
    let ready = || sequences.iter().enumerate().filter(|(_, sequence)| sequence.reader_keeps_up());
    let candidate = |(index, sequence): (usize, &Running)| Candidate {
        index,
        pending: sequence.pending(),
        decoding: sequence.is_decoding(),
        priority: sequence.priority(),
    };
    if let Some(alone) = ready().find(|(_, sequence)| sequence.is_isolated()) {
        return vec![candidate(alone)];
    }
    let started = sequences.iter().filter(|sequence| sequence.has_started()).count();
    let mut newcomers: Vec<_> = ready().filter(|(_, sequence)| !sequence.has_started()).collect();
    newcomers.sort_by_key(|(_, sequence)| std::cmp::Reverse(sequence.priority()));
    newcomers.truncate(most.saturating_sub(started));
    ready().filter(|(_, sequence)| sequence.has_started()).chain(newcomers).map(candidate).collect()
}
