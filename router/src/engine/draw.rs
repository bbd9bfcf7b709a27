//! From a sequence's logits to what its reader is told.
//!
//! In: what a step computed of the next token for one sequence: logits, or the greatest of them alone. Out: drawn tokens, as events.
//! Never here: other sequences, blocks. What is drawn depends on this request alone.

use conclave_model::{
    grammar,
    head::Greatest,
    sampler::{self, Context, Logprobs},
    wire,
};
use conclave_proto::status::Failure;
use tokio::time::Instant;

use super::running::Running;
use crate::sequence::{Event, FinishReason, Timings, TokenLogprob};

/// What the model says of the next token.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scores<'a> {
    /// The logits, `[vocab]`.
    All(&'a [f32]),
    /// Enough for a sequence that [takes it](Running::takes_greatest).
    Greatest(Greatest),
}

impl Scores<'_> {
    fn finite(self) -> bool {
        match self {
            Self::All(logits) => wire::all_finite(logits),
            Self::Greatest(greatest) => greatest.logit.is_finite(),
        }
    }
}

impl Running {
    /// Whether the token with the greatest logit is all that it wants to know.
    pub(super) fn takes_greatest(&self) -> bool {
        let stop = &self.request.stop;
        let may_stop = stop.token_ids.is_empty() || self.answered().len() >= stop.min_tokens;
        self.sampling.takes_greatest() && may_stop && self.constraint.is_none() && !self.request.logprobs.any()
    }

    /// Draws the next token from `scores`; and where it is the one that the draft module took it to be, the one after it from
    /// those behind. Whether a draft was right, if there was one.
    pub(super) fn draw(&mut self, scores: Scores<'_>, behind: Option<Scores<'_>>) -> Option<bool> {
        if self.reader.failed.get() {
            return None;
        }
        if !scores.finite() || !behind.is_none_or(Scores::finite) {
            self.fail_not_finite();
            return None;
        }
        if self.times.first_token.is_none() && self.answer == 0 {
            let prompt_logprobs = std::mem::take(&mut self.prompt_logprobs);
            let queue_us = micros(Some(self.times.submitted), self.times.first_step);
            self.tell(Event::Started { cached_tokens: self.cached_tokens.unwrap_or(0), queue_us, prompt_logprobs });
        }
        let draft = self.draft.take();
        let token = self.draw_one(scores);
        let (draft, second) = draft.zip(behind)?;
        let right = token == Some(draft);
        if right && !self.over {
            self.advance(1);
            self.draw_one(second);
        }
        Some(right)
    }

    pub(super) fn fail_not_finite(&mut self) {
        self.fail(Failure::internal("the model's logits are no numbers"));
    }

    /// Notes what `logits` `[n, vocab]` say of the prompt: the row at position p, the first of them being `first`, predicts
    /// the token at p + 1.
    pub(super) fn note_prompt_logprobs(&mut self, first: usize, logits: &[f32], vocab: usize) {
        let prompt = &self.request.prompt;
        if first == 0 {
            self.prompt_logprobs.push(TokenLogprob { id: prompt[0], logprob: None, top: Vec::new() });
        }
        for (row, logits) in logits.chunks_exact(vocab).enumerate() {
            if let Some(&next) = prompt.get(first + row + 1) {
                let logprobs = Logprobs::new(logits);
                let top = logprobs.top(self.request.logprobs.top);
                self.prompt_logprobs.push(TokenLogprob { id: next, logprob: Some(logprobs.of(next)), top });
            }
        }
    }

    /// Draws one token and tells it, or that the answer ends. The token, where it is part of the answer.
    fn draw_one(&mut self, scores: Scores<'_>) -> Option<u32> {
        let stop = &self.request.stop;
        let forbidden: &[u32] = if self.answered().len() < stop.min_tokens { &stop.token_ids } else { &[] };
        let allowed = match self.constraint.as_mut().map(|constraint| constraint.allowed(&stop.token_ids)) {
            Some(Err(error)) => return self.no_token(&error),
            Some(Ok(mask)) if mask.is_empty() => return self.finish(FinishReason::Complete),
            Some(Ok(mask)) => Some(mask),
            None => None,
        };
        let answer = self.answered();
        let context = Context { prompt: &self.request.prompt, answer, forbidden, allowed: allowed.as_ref() };
        let token = match scores {
            Scores::All(logits) => sampler::sample(logits, &self.sampling, context),
            Scores::Greatest(greatest) => greatest.token,
        };
        let now = Instant::now();
        self.times.first_token.get_or_insert(now);
        self.times.last_token = Some(now);
        if stop.token_ids.contains(&token) {
            return self.finish(FinishReason::StopToken(token));
        }
        let rules = self.request.logprobs;
        let (logprob, top) = match scores {
            Scores::All(logits) if rules.any() => {
                let logprobs = Logprobs::new(logits);
                (Some(logprobs.of(token)), logprobs.top(rules.top))
            }
            _ => (None, Vec::new()),
        };
        self.tokens.push(token);
        self.tell(Event::Token { answer: self.answer, token: TokenLogprob { id: token, logprob, top } });
        match self.follow(token) {
            Err(error) => return self.no_token(&error),
            Ok(true) => self.finish(FinishReason::Complete),
            Ok(false) if self.answered().len() >= self.request.stop.max_tokens => self.finish(FinishReason::Length),
            Ok(false) => None,
        };
        Some(token)
    }

    /// Takes `token` into the answer's form. Whether the text is complete with it, with no end token left to draw.
    fn follow(&mut self, token: u32) -> Result<bool, grammar::Error> {
        let Some(constraint) = &mut self.constraint else { return Ok(false) };
        constraint.take(token)?;
        Ok(constraint.is_complete() && self.request.stop.token_ids.is_empty())
    }

    fn no_token(&mut self, error: &grammar::Error) -> Option<u32> {
        self.fail(match error {
            grammar::Error::Failed(_) | grammar::Error::Unfit { .. } => Failure::internal(error.to_string()),
            // A bound of the grammar's, met only now.
            _ => Failure::invalid("structured", error.to_string()),
        });
        None
    }

    /// The answer ends, without a further token.
    fn finish(&mut self, reason: FinishReason) -> Option<u32> {
        let completion_tokens = self.answered().len() - self.request.resumed.len();
        let times = self.times;
        let timings = Timings {
            queue_us: micros(Some(times.submitted), times.first_step),
            prefill_us: micros(times.first_step, times.first_token),
            decode_us: micros(times.first_token, times.last_token),
        };
        self.tell(Event::Finished { answer: self.answer, reason, completion_tokens, timings });
        self.over = true;
        None
    }

    fn tell(&mut self, event: Event) {
        // There is room, or the reader is gone and the sequence over with it.
        if self.reader.events.try_send(event).is_err() {
            self.over = true;
        }
    }
}

fn micros(from: Option<Instant>, to: Option<Instant>) -> u64 {
    let span = from.zip(to).map(|(from, to)| to.saturating_duration_since(from));
    span.map_or(0, |span| u64::try_from(span.as_micros()).unwrap_or(u64::MAX))
}
