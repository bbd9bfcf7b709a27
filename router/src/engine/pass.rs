//! One forward pass: embed, then per layer attention here and experts elsewhere.
//!
//! In: segments of sequences with their tokens. Out: the residual stream behind the last layer.
//! Never here: drawing, choosing, blocks. A pass that fails leaves rows behind in its blocks; nobody counts them as
//! computed, and the next pass writes over them.

use std::cell::Cell;

use conclave_model::{
    Hidden,
    batch::{Batch, Segment},
    cache::KvCache,
    transformer::{Block, FeedForward, Transformer},
};
use tokio::time::{Duration, Instant};

use crate::{
    moe::{Exchange, exchange},
    phases::{Phase, Phases},
};

/// What a pass computes with.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// The router's half of the model.
    pub transformer: &'a Transformer,
    /// The way to the other half.
    pub exchange: &'a Exchange,
    /// Where latents go.
    pub cache: &'a KvCache,
}

/// Where a step's time went. Two passes that run at once add up to more than the time that passes: that is the overlap.
#[derive(Debug, Default)]
pub struct Spent {
    compute: Cell<Duration>,
    away: Cell<Duration>,
}

impl Spent {
    /// On this thread.
    pub fn compute(&self) -> Duration {
        self.compute.get()
    }

    /// From when rows are routed to when the last has come back, and the shared expert is computed too.
    pub fn away(&self) -> Duration {
        self.away.get()
    }

    /// Runs and times what this thread computes.
    pub fn computing<T>(&self, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = work();
        self.compute.set(self.compute.get() + began.elapsed());
        done
    }

    /// The same, counted to a phase too.
    pub fn in_phase<T>(&self, phases: &Phases, phase: Phase, work: impl FnOnce() -> T) -> T {
        self.computing(|| phases.timed(phase, work))
    }
}

impl Machine<'_> {
    /// Where this router counts its time.
    pub fn phases(&self) -> &Phases {
        &self.exchange.workers.counters().phases
    }
}

/// Computes the rows of `segments`, whose tokens are `tokens` one after the other, complete or not at all, before
/// `deadline`. `[T, D]`.
pub async fn forward(
    machine: Machine<'_>,
    segments: &[Segment],
    tokens: &[u32],
    deadline: Instant,
    spent: &Spent,
) -> Result<Hidden, exchange::Error> {
    let Machine { transformer, .. } = machine;
    let (batch, mut x) = spent.computing(|| (transformer.batch(segments), transformer.embed(tokens)));
    for block in transformer.blocks() {
        x = layer(machine, block, x, &batch, deadline, spent).await?;
    }
    Ok(x)
}

/// One layer of it.
pub async fn layer(
    machine: Machine<'_>,
    block: &Block,
    x: Hidden,
    batch: &Batch,
    deadline: Instant,
    spent: &Spent,
) -> Result<Hidden, exchange::Error> {
    let phases = machine.phases();
    let (x, normed) = spent.in_phase(phases, Phase::Attention, || {
        let x = block.attend(&x, batch, machine.cache);
        let normed = block.normed(&x);
        (x, normed)
    });
    let moe = match block.feed_forward() {
        FeedForward::Dense(dense) => return Ok(spent.in_phase(phases, Phase::Dense, || dense.forward(&x, &normed))),
        FeedForward::Moe(moe) => moe,
    };
    let (routing, rows) = spent.in_phase(phases, Phase::Gate, || moe.route(&normed));
    let sent = Instant::now();
    let routed = machine.exchange.routed(block.layer() as u32, &rows, &routing, deadline);
    let shared = || spent.in_phase(phases, Phase::Shared, || moe.shared(&normed));
    let (routed, shared) = if machine.exchange.workers.snapshot().all_beside {
        // On the same processors the two would only wait for each other, and be moved about.
        let shared = shared();
        (routed.await, shared)
    } else {
        // The exchange is polled first: its rows are on their way while the shared expert is computed here.
        tokio::join!(biased; routed, async { shared() })
    };
    spent.away.set(spent.away.get() + sent.elapsed());
    let routed = routed?;
    Ok(spent.in_phase(phases, Phase::Combine, || moe.finish(&x, &routed, shared)))
}
