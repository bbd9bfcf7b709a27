//! One sequence while it is computed: its tokens, its cache, its events.
//!
//! In: a submission; then the logits of each step it took part in. Out: drawn tokens, as events.
//! Never here: other sequences. What is drawn depends on this request alone.

use conclave_model::{
    cache::SequenceCache,
    sampler::{self, Context, Logprobs},
    wire,
};
use conclave_proto::status::Failure;
use tokio::time::Instant;

use crate::{
    scheduler::Submission,
    sequence::{Event, EventSender, FinishReason, Timings, TokenLogprob, ValidRequest},
};

/// The logits a step computed for one sequence.
#[derive(Debug)]
pub(super) struct StepLogits {
    /// f32 `[n, vocab]`: of the last row alone, or of all rows of this step where prompt logprobs are wanted.
    pub values: Vec<f32>,
    /// Vocabulary's size.
    pub vocab: usize,
}

/// A sequence in the engine.
#[derive(Debug)]
pub(super) struct Running {
    request: ValidRequest,
    pub events: EventSender,
    pub cache: SequenceCache,
    /// Resumed tokens, then drawn ones.
    answer: Vec<u32>,
    /// Rows in the cache that are final.
    computed: usize,
    prompt_logprobs: Vec<TokenLogprob>,
    submitted: Instant,
    first_step: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    isolated: bool,
    over: bool,
}

impl Running {
    pub(super) fn new(submission: Submission, cache: SequenceCache) -> Self {
        let Submission { request, events, submitted } = submission;
        Self {
            answer: request.resumed.clone(),
            request,
            events,
            cache,
            computed: 0,
            prompt_logprobs: Vec::new(),
            submitted,
            first_step: None,
            first_token: None,
            last_token: None,
            isolated: false,
            over: false,
        }
    }

    /// Finished, failed, out of time, or with nobody listening.
    pub(super) fn is_over(&mut self) -> bool {
        if !self.over && self.deadline() <= Instant::now() {
            self.fail(Failure::deadline("the request's deadline passed"));
        }
        self.over || self.events.is_closed()
    }

    pub(super) fn deadline(&self) -> Instant {
        self.request.deadline.into()
    }

    pub(super) fn priority(&self) -> i32 {
        self.request.priority
    }

    /// Tokens whose rows are not computed yet.
    pub(super) fn pending(&self) -> usize {
        self.request.prompt.len() + self.answer.len() - self.computed
    }

    pub(super) fn is_decoding(&self) -> bool {
        self.first_token.is_some()
    }

    /// Whether what a step brings can be told: the finish may take one event more than the token.
    pub(super) fn reader_keeps_up(&self) -> bool {
        self.events.capacity() >= 3
    }

    pub(super) fn joined(&mut self, now: Instant) {
        self.first_step.get_or_insert(now);
    }

    /// The first `count` pending tokens and the position of the first of them.
    pub(super) fn next_tokens(&self, count: usize) -> (usize, Vec<u32>) {
        let all = self.request.prompt.iter().chain(&self.answer);
        (self.computed, all.skip(self.computed).take(count).copied().collect())
    }

    /// Whether logits of every row of this step are wanted, not of the last alone.
    pub(super) fn wants_all_logits(&self) -> bool {
        self.request.logprobs.prompt && self.computed < self.request.prompt.len()
    }

    /// Whether rows of it are, or were, in the cache.
    pub(super) fn has_started(&self) -> bool {
        self.first_step.is_some()
    }

    /// A step with this sequence in it failed, and it may be the reason: its next step is its own.
    pub(super) fn isolate(&mut self) {
        self.isolated = true;
    }

    pub(super) fn is_isolated(&self) -> bool {
        self.isolated
    }

    /// Forgets rows of a step that did not finish.
    pub(super) fn rewind(&mut self) {
        self.cache.truncate(self.computed);
    }

    pub(super) fn fail(&mut self, failure: Failure) {
        if self.over {
            return;
        }
        // Room is there or the reader is gone: a sequence without room is not computed.
        let _ = self.events.try_send(Event::Failed(failure));
        self.over = true;
    }

    /// `count` more rows are computed; draws a token once none is pending.
    pub(super) fn advance(&mut self, count: usize, logits: &StepLogits) {
        self.isolated = false;
        if !wire::all_finite(&logits.values) {
            return self.fail(Failure::internal("the model's logits are no numbers"));
        }
        let first = self.computed;
        if self.wants_all_logits() {
            self.note_prompt_logprobs(first, count, logits);
        }
        self.computed += count;
        if self.pending() > 0 {
            return;
        }
        let last = &logits.values[logits.values.len() - logits.vocab..];
        if self.first_token.is_none() {
            let prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
            self.tell(Event::Started { cached_tokens: 0, prompt_logprobs });
        }
        self.draw(last);
    }

    /// The row at position p predicts the token at p + 1.
    fn note_prompt_logprobs(&mut self, first: usize, count: usize, logits: &StepLogits) {
        let prompt = &self.request.prompt;
        if first == 0 {
            self.prompt_logprobs.push(TokenLogprob { id: prompt[0], logprob: None, top: Vec::new() });
        }
        for (row, logits) in logits.values.chunks_exact(logits.vocab).enumerate().take(count) {
            if let Some(&next) = prompt.get(first + row + 1) {
                let logprobs = Logprobs::new(logits);
                let top = logprobs.top(self.request.logprobs.top);
                self.prompt_logprobs.push(TokenLogprob { id: next, logprob: Some(logprobs.of(next)), top });
            }
        }
    }

    fn draw(&mut self, logits: &[f32]) {
        let stop = &self.request.stop;
        let forbidden: &[u32] = if self.answer.len() < stop.min_tokens { &stop.token_ids } else { &[] };
        let context = Context { prompt: &self.request.prompt, answer: &self.answer, forbidden };
        let token = sampler::sample(logits, &self.request.sampling, context);
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        if stop.token_ids.contains(&token) {
            return self.finish(FinishReason::StopToken(token));
        }
        let rules = self.request.logprobs;
        let (logprob, top) = if rules.any() {
            let logprobs = Logprobs::new(logits);
            (Some(logprobs.of(token)), logprobs.top(rules.top))
        } else {
            (None, Vec::new())
        };
        self.answer.push(token);
        self.tell(Event::Token(TokenLogprob { id: token, logprob, top }));
        if self.answer.len() >= self.request.stop.max_tokens {
            self.finish(FinishReason::Length);
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        let completion_tokens = self.answer.len() - self.request.resumed.len();
        let micros = |from: Option<Instant>, to: Option<Instant>| {
            let span = from.zip(to).map(|(from, to)| to.saturating_duration_since(from));
            span.map_or(0, |span| u64::try_from(span.as_micros()).unwrap_or(u64::MAX))
        };
        let timings = Timings {
            queue_us: micros(Some(self.submitted), self.first_step),
            prefill_us: micros(self.first_step, self.first_token),
            decode_us: micros(self.first_token, self.last_token),
        };
        self.tell(Event::Finished { reason, completion_tokens, timings });
        self.over = true;
    }

    fn tell(&mut self, event: Event) {
        // There is room, or the reader is gone and the sequence over with it.
        if self.events.try_send(event).is_err() {
            self.over = true;
        }
    }
}
