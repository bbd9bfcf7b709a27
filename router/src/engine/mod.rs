//! The engine: one OS thread that owns the model's router half and the latent cache.
//!
//! In: submissions from the scheduler's queue. Out: events to each request's stream.
//! Never here: a socket, a lock held over a step, an unbounded wait. A step ends with its latest deadline at the latest.

mod running;
mod draw;
pub mod pass;
mod step;
mod draft;

use std::{sync::Arc, time::Duration};

use conclave_model::{cache::KvCache, transformer::Transformer};
use conclave_proto::status::Failure;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::{
    metrics::EngineCounters,
    moe::Exchange,
    scheduler::{
        Queue,
        blocks::BlockPool,
        policy::{self, Candidate, Limits},
    },
};

pub use draft::Drafter;
use pass::Machine;
use running::Running;

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
    /// The latents of all sequences.
    pub cache: KvCache,
    /// Who holds which block of it; as many as it has.
    pub pool: BlockPool,
    /// What one step may hold.
    pub limits: Limits,
    /// A step of at least twice as many rows is computed as two micro-batches, one of them computing here while the other
    /// waits for its experts; `None` where no step is.
    pub micro_batch_rows: Option<usize>,
    /// Guesses tokens ahead; `None` where nothing is guessed.
    pub drafter: Option<Drafter>,
    /// What is told to whoever scrapes.
    pub counters: Arc<EngineCounters>,
}

impl Engine {
    /// Runs until `stop`, which fails what is not finished, or until every handle is gone.
    pub async fn run(self, mut queue: Queue, stop: CancellationToken) {
        let epoch = Instant::now();
        let mut sequences: Vec<Running> = Vec::new();
        loop {
            // Whoever waits is bounded where it enters the queue.
            while let Ok(submission) = queue.try_recv() {
                sequences.push(Running::new(submission));
            }
            sequences.retain_mut(|sequence| !sequence.is_over());
            if stop.is_cancelled() {
                let stopped = || Failure::unavailable("ROUTER_STOPPED", "this router has stopped", RETRY_AFTER);
                sequences.iter_mut().for_each(|sequence| sequence.fail(stopped()));
                return;
            }
            let candidates = self.candidates(&mut sequences, epoch);
            self.counters.observe(&candidates, &self.pool);
            let planned = policy::choose(&candidates, self.limits, self.pool.free());
            if !planned.grants.is_empty() || !planned.preempted.is_empty() {
                self.step(&mut sequences, planned, &stop).await;
                // Other tasks of this thread get their turn even when every exchange was answered at once.
                tokio::task::yield_now().await;
            } else if !sequences.is_empty() {
                tokio::time::sleep(READER_CHECK).await;
            } else {
                self.exchange.stall.clear();
                tokio::select! {
                    submission = queue.recv() => match submission {
                        Some(submission) => {
                            debug!(request = %submission.request.request_id, "the first to come");
                            sequences.push(Running::new(submission));
                        }
                        None => return,
                    },
                    () = stop.cancelled() => return,
                }
            }
        }
    }

    /// All sequences as the policy sees them. One that a step failed with is computed alone: nobody else is ready then.
    fn candidates(&self, sequences: &mut [Running], epoch: Instant) -> Vec<Candidate> {
        let alone = sequences.iter().position(Running::is_isolated);
        let mut candidates: Vec<Candidate> = sequences
            .iter_mut()
            .enumerate()
            .map(|(index, sequence)| sequence.candidate(index, epoch, &self.pool))
            .collect();
        if let Some(alone) = alone.filter(|&alone| candidates[alone].ready) {
            candidates.iter_mut().for_each(|candidate| candidate.ready = candidate.index == alone);
        }
        candidates
    }

    fn machine(&self) -> Machine<'_> {
        Machine { transformer: &self.transformer, exchange: &self.exchange, cache: &self.cache }
    }
}
