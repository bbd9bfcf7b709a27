//! One step: the granted rows of all sequences through the model, in one or two micro-batches, then a token for each
//! sequence whose rows are all computed.
//!
//! In: the policy's step. Out: sequences further on, their readers told.
//! Never here: who takes part; a failure that harms more than the sequences it may come from.

use std::panic::AssertUnwindSafe;

use conclave_model::{Hidden, batch::Segment};
use conclave_proto::status::Failure;
use conclave_runtime::tensor_thread::panic_message;
use futures::FutureExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    Engine, RETRY_AFTER,
    draw::Scores,
    pass::{self, Spent},
    running::Running,
};
use crate::{
    moe::exchange,
    phases::Phase,
    scheduler::policy::{self, Grant},
    sequence::EventSender,
};

/// Rows of logits that exist at once where a prompt's are wanted.
const LOGITS_AT_ONCE: usize = 64;

/// Rows that go through the model together.
#[derive(Default)]
pub(super) struct MicroBatch {
    pub(super) members: Vec<Grant>,
    pub(super) segments: Vec<Segment>,
    tokens: Vec<u32>,
    deadline: Option<Instant>,
    readers: Vec<EventSender>,
}

/// What came of one.
enum Outcome {
    Computed(Hidden),
    /// The last of its deadlines passed.
    Late(Failure),
    /// Some sequence of it cannot be computed.
    Failed(String),
    /// Nobody waits for it any more.
    Abandoned,
}

impl Engine {
    pub(super) async fn step(&self, sequences: &mut Vec<Running>, planned: policy::Step, stop: &CancellationToken) {
        let began = Instant::now();
        for &index in &planned.preempted {
            sequences[index].preempt();
        }
        self.counters.preempted(planned.preempted.len());
        let grants = self.reserve(sequences, planned.grants);
        let micro_batches = self.divide(sequences, &grants, began);
        let spent = Spent::default();
        let run = |micro_batch| self.run_micro_batch(micro_batch, &spent, stop);
        let outcomes = match &micro_batches[..] {
            [one] => vec![run(one).await],
            // While one waits for its experts, the other computes.
            [first, second] => {
                let (first, second) = tokio::join!(run(first), run(second));
                vec![first, second]
            }
            _ => return,
        };
        for (micro_batch, outcome) in micro_batches.iter().zip(outcomes) {
            match outcome {
                Outcome::Computed(x) => {
                    spent.computing(|| self.draw(sequences, micro_batch, &x));
                    self.guess(sequences, micro_batch, &x, &spent).await;
                }
                Outcome::Late(failure) => late(sequences, micro_batch, &failure),
                Outcome::Failed(why) => failed(sequences, micro_batch, &why),
                Outcome::Abandoned => {}
            }
        }
        self.counters.stepped(began.elapsed(), &spent, micro_batches.len(), &grants);
    }

    /// Takes the blocks for all grants: first what the cache remembers, so that nothing of it is given to another.
    fn reserve(&self, sequences: &mut [Running], mut grants: Vec<Grant>) -> Vec<Grant> {
        for grant in &grants {
            if let Some((tokens, found)) = sequences[grant.index].find_prefix(&self.pool) {
                self.counters.looked_for_prefix(tokens, found);
            }
        }
        grants.retain(|grant| sequences[grant.index].reserve(grant.tokens, &self.pool, &self.cache));
        grants
    }

    /// One micro-batch, or two of about as many rows where the step is large enough.
    fn divide(&self, sequences: &mut [Running], grants: &[Grant], now: Instant) -> Vec<MicroBatch> {
        let rows: usize = grants.iter().map(|grant| grant.tokens).sum();
        let two = self.micro_batch_rows.is_some_and(|least| rows >= 2 * least) && grants.len() > 1;
        let mut micro_batches = vec![MicroBatch::default()];
        let mut placed = 0;
        for &grant in grants {
            if two && micro_batches.len() == 1 && placed > 0 && 2 * placed + grant.tokens > rows {
                micro_batches.push(MicroBatch::default());
            }
            placed += grant.tokens;
            if let Some(micro_batch) = micro_batches.last_mut() {
                micro_batch.add(&mut sequences[grant.index], grant, now);
            }
        }
        micro_batches.retain(|micro_batch| !micro_batch.members.is_empty());
        micro_batches
    }

    async fn run_micro_batch(&self, micro_batch: &MicroBatch, spent: &Spent, stop: &CancellationToken) -> Outcome {
        let MicroBatch { segments, tokens, deadline, readers, .. } = micro_batch;
        let Some(deadline) = *deadline else { return Outcome::Abandoned };
        // A step that nobody waits for any more is given up, whatever it was waiting for itself.
        let abandoned = async {
            for events in readers {
                events.closed().await;
            }
        };
        let forward = pass::forward(self.machine(), segments, tokens, deadline, spent);
        // libtorch's errors, a lack of memory among them, are panics: they end this step and not the engine.
        let passed = tokio::select! {
            passed = AssertUnwindSafe(forward).catch_unwind() => passed,
            () = abandoned => return Outcome::Abandoned,
            () = stop.cancelled() => return Outcome::Abandoned,
        };
        match passed {
            Ok(Ok(x)) => Outcome::Computed(x),
            Ok(Err(exchange::Error::Deadline { waiting_for, .. })) => {
                Outcome::Late(Failure::unavailable("NO_EXPERT_HOLDER", waiting_for, RETRY_AFTER))
            }
            Ok(Err(error)) => Outcome::Failed(error.to_string()),
            Err(panic) => Outcome::Failed(panic_message(&*panic)),
        }
    }

    /// A token for each sequence that is computed as far as it is known; siblings for those that are to have some.
    fn draw(&self, sequences: &mut Vec<Running>, micro_batch: &MicroBatch, x: &Hidden) {
        let drawn = std::panic::catch_unwind(AssertUnwindSafe(|| self.try_draw(sequences, micro_batch, x)));
        if let Err(panic) = drawn {
            failed(sequences, micro_batch, &panic_message(&*panic));
        }
    }

    fn try_draw(&self, sequences: &mut Vec<Running>, micro_batch: &MicroBatch, x: &Hidden) {
        let vocab = self.transformer.config().vocab_size;
        let (mut first, mut rows, mut takers) = (0, Vec::new(), Vec::new());
        let mut greatest_will_do = true;
        for grant in &micro_batch.members {
            let sequence = &mut sequences[grant.index];
            if sequence.wants_prompt_logprobs() {
                self.note_prompt(sequence, x, first, grant.tokens);
            }
            let known = grant.tokens.min(sequence.pending());
            if known == sequence.pending() {
                // The last known token's row, and the draft's behind it.
                takers.push((grant.index, rows.len(), known < grant.tokens));
                rows.extend(first + known - 1..first + grant.tokens);
                greatest_will_do &= sequence.takes_greatest();
            }
            sequence.advance(known);
            first += grant.tokens;
        }
        if takers.is_empty() {
            return;
        }
        // One product for all: the head is as large as the vocabulary, and is read whole where one of them wants all logits.
        let logits;
        let scores: Vec<Scores<'_>> = if greatest_will_do {
            let greatest = self.machine().phases().timed(Phase::Head, || self.transformer.greatest(x, &rows));
            greatest.into_iter().map(Scores::Greatest).collect()
        } else {
            logits = self.machine().phases().timed(Phase::Head, || self.transformer.logits(x, &rows));
            logits.chunks_exact(vocab).map(Scores::All).collect()
        };
        self.machine().phases().timed(Phase::Sample, || {
            for (index, row, has_draft) in takers {
                self.draw_answers(sequences, index, scores[row], has_draft.then(|| scores[row + 1]));
            }
        });
    }

    /// Draws for one sequence; at its first token also for the request's other answers, which begin here.
    fn draw_answers(&self, sequences: &mut Vec<Running>, index: usize, scores: Scores<'_>, behind: Option<Scores<'_>>) {
        let sequence = &sequences[index];
        let answers = sequence.request.answers;
        let siblings = if sequence.answer == 0 && sequence.times.first_token.is_none() { 1..answers } else { 1..1 };
        let siblings: Vec<Running> = siblings.map(|answer| sequence.sibling(answer, &self.pool, &self.cache)).collect();
        let right = sequences[index].draw(scores, behind);
        self.counters.drafted(right);
        for mut sibling in siblings {
            sibling.draw(scores, behind);
            sequences.push(sibling);
        }
    }

    /// The prompt's own logprobs, some rows at a time.
    fn note_prompt(&self, sequence: &mut Running, x: &Hidden, first: usize, rows: usize) {
        let vocab = self.transformer.config().vocab_size;
        let start = sequence.computed;
        for part in (0..rows).step_by(LOGITS_AT_ONCE) {
            let here = LOGITS_AT_ONCE.min(rows - part);
            let logits = self.transformer.logits(x, &(first + part..first + part + here).collect::<Vec<_>>());
            if !conclave_model::wire::all_finite(&logits) {
                return sequence.fail_not_finite();
            }
            sequence.note_prompt_logprobs(start + part, &logits, vocab);
        }
    }
}

impl MicroBatch {
    fn add(&mut self, sequence: &mut Running, grant: Grant, now: Instant) {
        self.segments.push(sequence.segment(grant.tokens, now, &mut self.tokens));
        self.deadline = self.deadline.max(Some(sequence.deadline()));
        self.readers.push(sequence.reader.events.clone());
        self.members.push(grant);
    }
}

fn late(sequences: &mut [Running], micro_batch: &MicroBatch, failure: &Failure) {
    warn!(why = failure.message, sequences = micro_batch.members.len(), "step failed");
    micro_batch.members.iter().for_each(|grant| sequences[grant.index].fail(failure.clone()));
}

fn failed(sequences: &mut [Running], micro_batch: &MicroBatch, why: &str) {
    warn!(why, sequences = micro_batch.members.len(), "step failed");
    // Which sequence of several is at fault only computing each alone can tell.
    let alone = micro_batch.members.len() == 1;
    for grant in &micro_batch.members {
        let sequence = &mut sequences[grant.index];
        if alone {
            // What libtorch says of its insides is for the log, not for clients.
            sequence.fail(Failure::internal("this request could not be computed"));
        } else {
            sequence.isolate();
        }
    }
}
