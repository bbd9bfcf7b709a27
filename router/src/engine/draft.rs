//! Guesses of the tokens after the next, by the checkpoint's multi-token-prediction module.
//!
//! In: what a micro-batch computed, after its tokens were drawn. Out: a draft for each sequence that decodes; the next step
//! checks it by drawing as it would have without. Never here: a drawn token; a request that fails for want of a guess.

use std::{cell::Cell, panic::AssertUnwindSafe};

use conclave_model::{Hidden, batch::Segment, head::Greatest, mtp::Mtp};
use futures::FutureExt;
use tokio::time::{Duration, Instant};
use tracing::warn;

use super::{
    Engine,
    pass::{self, Spent},
    running::Running,
    step::MicroBatch,
};

/// How long a step waits for the experts of a guess.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long nothing is guessed after a guess that could not be computed.
const PAUSE: Duration = Duration::from_secs(10);

/// The module, and whether it may be asked.
#[derive(Debug)]
pub struct Drafter {
    mtp: Mtp,
    paused_until: Cell<Option<Instant>>,
}

/// Rows whose next token is known.
#[derive(Default)]
struct Known {
    segments: Vec<Segment>,
    /// Of the micro-batch.
    rows: Vec<usize>,
    next_tokens: Vec<u32>,
    positions: Vec<usize>,
    /// Sequences that take a guess, and the last of their rows among these.
    takers: Vec<(usize, usize)>,
}

impl Drafter {
    /// Over a loaded module.
    pub fn new(mtp: Mtp) -> Self {
        Self { mtp, paused_until: Cell::new(None) }
    }
}

impl Engine {
    /// Guesses for the sequences of `micro_batch`, whose residual stream is `x`. The module's own latents are written for
    /// every row, of prompts too: later guesses look back at them.
    pub(super) async fn guess(&self, sequences: &mut [Running], micro_batch: &MicroBatch, x: &Hidden, spent: &Spent) {
        let Some(drafter) = &self.drafter else { return };
        if drafter.paused_until.get().is_some_and(|until| Instant::now() < until) {
            return;
        }
        let known = known(sequences, micro_batch);
        if known.segments.is_empty() {
            return;
        }
        let guessed = AssertUnwindSafe(self.run_module(drafter, &known, x, spent)).catch_unwind().await;
        let Ok(Some(guesses)) = guessed else {
            warn!("guesses could not be computed; none are made for a while");
            drafter.paused_until.set(Some(Instant::now() + PAUSE));
            return;
        };
        for ((index, _), guess) in known.takers.iter().zip(guesses) {
            if guess.logit.is_finite() {
                sequences[*index].draft = Some(guess.token);
            }
        }
    }

    async fn run_module(&self, drafter: &Drafter, known: &Known, x: &Hidden, spent: &Spent) -> Option<Vec<Greatest>> {
        let Drafter { mtp, .. } = drafter;
        let (batch, input) = spent.computing(|| {
            let hidden = self.transformer.final_norm(&x.at(&known.rows));
            let input = mtp.input(&hidden, &known.next_tokens, &known.positions);
            (self.transformer.batch(&known.segments), input)
        });
        let deadline = Instant::now() + PATIENCE;
        let x = pass::layer(self.machine(), mtp.block(), input, &batch, deadline, spent).await.ok()?;
        let last: Vec<usize> = known.takers.iter().map(|(_, row)| *row).collect();
        Some(if last.is_empty() { Vec::new() } else { spent.computing(|| mtp.greatest(&x, &last)) })
    }
}

fn known(sequences: &[Running], micro_batch: &MicroBatch) -> Known {
    let mut known = Known::default();
    let mut first = 0;
    for (grant, segment) in micro_batch.members.iter().zip(&micro_batch.segments) {
        let sequence = &sequences[grant.index];
        // Rows that did not become final, a wrong draft's among them, are not there to look back at.
        let end = sequence.computed.min(sequence.tokens.len() - 1).min(segment.start + segment.rows);
        let rows = end.saturating_sub(segment.start);
        if rows > 0 && !sequence.over {
            known.segments.push(Segment { rows, ..segment.clone() });
            known.rows.extend(first..first + rows);
            known.next_tokens.extend(&sequence.tokens[segment.start + 1..=end]);
            known.positions.extend(segment.start..end);
            if sequence.wants_draft() {
                known.takers.push((grant.index, known.rows.len() - 1));
            }
        }
        first += grant.tokens;
    }
    known
}
