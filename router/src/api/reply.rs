//! What the engine tells about a request, put into the words that its client reads.
//!
//! In: a request's events, those of its answers mixed. Out: Started, Tokens and Finished, each of one answer; which
//! answers are wanted no further. Never here: waiting; a word about an answer after its Finished.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use conclave_proto::{
    inference::v1::{self as pb, finished::MatchedStop, generate_response::Event as Told},
    status::Failure,
};

use super::answer_text::AnswerText;
use crate::sequence::{Event, FinishReason, LogprobRules, Stopped, Timings, TokenLogprob};

/// All answers to one request on their way out: everything but the waiting.
#[derive(Debug)]
pub(super) struct Reply {
    /// Echoed.
    pub(super) request_id: Arc<str>,
    /// Length of the prompt.
    pub(super) prompt_tokens: usize,
    /// Told to the client, who may need it to resume.
    pub(super) seed: u64,
    /// What to report beside the tokens.
    pub(super) logprobs: LogprobRules,
    /// The answers, in the order of their indices; at least one.
    pub(super) answers: Vec<Answer>,
    /// The prompt's text, token by token, where its logprobs were asked for.
    pub(super) prompt_text: Vec<String>,
    /// When the request came in.
    pub(super) arrived: Instant,
    /// What was told of the prompt.
    pub(super) prefill: Prefill,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Answer {
    text: AnswerText,
    drawn: usize,
    over: bool,
}

/// What `Started` said.
#[derive(Debug, Default)]
pub(super) struct Prefill {
    cached_tokens: usize,
    queue_us: u64,
    ended: Option<Instant>,
}

/// Why an answer is over, as the client sees it.
struct End {
    reason: pb::FinishReason,
    matched: Option<MatchedStop>,
    trailing_text: String,
    timings: Timings,
}

impl Answer {
    /// An answer of which nothing was told; `text` knows of what was delivered earlier.
    pub(super) fn new(text: AnswerText) -> Self {
        Self { text, drawn: 0, over: false }
    }
}

impl Reply {
    /// Puts into words what the engine told; `true` when every answer is complete and nothing may follow. An answer that
    /// ends here, at a stop string, is `stopped`; what the engine had told of it in the meantime is passed over.
    ///
    /// # Errors
    /// What the engine says has failed; `Internal` for a token that cannot be decoded.
    pub(super) fn tell(&mut self, event: Event, words: &mut Vec<Told>, stopped: &Stopped) -> Result<bool, Failure> {
        match event {
            Event::Started { cached_tokens, queue_us, prompt_logprobs } => {
                words.push(self.started(cached_tokens, queue_us, prompt_logprobs));
            }
            Event::Token { answer: index, token } => {
                let Some(answer) = self.open(index)? else { return Ok(false) };
                answer.drawn += 1;
                let released = answer.text.push(token.id)?;
                let token = spoken(token, released.text, self.logprobs.sampled);
                match words.last_mut() {
                    Some(Told::Tokens(last)) if last.index as usize == index => last.tokens.push(token),
                    _ => words.push(Told::Tokens(pb::Tokens { tokens: vec![token], index: narrow(index) })),
                }
                if let Some(stop) = released.stop {
                    stopped.stop(index);
                    words.push(self.stopped_by(index, stop, String::new()));
                }
            }
            Event::Finished { answer: index, reason, completion_tokens, timings } => {
                let Some(answer) = self.open(index)? else { return Ok(false) };
                answer.drawn = completion_tokens;
                words.push(self.finished(index, reason, timings)?);
            }
            Event::Failed(failure) => return Err(failure),
        }
        Ok(self.answers.iter().all(|answer| answer.over))
    }

    /// For the one answer that its resumed tokens complete already, so that no engine needs to see it. `stop` is the
    /// stop string that they end with, `None` when they are as many as were asked for.
    ///
    /// # Errors
    /// `Internal` for a token that cannot be decoded.
    pub(super) fn already_complete(mut self, stop: Option<String>) -> Result<[Told; 2], Failure> {
        let started = self.started(0, 0, Vec::new());
        let finished = match stop {
            Some(stop) => self.stopped_by(0, stop, String::new()),
            None => self.finished(0, FinishReason::Length, Timings::default())?,
        };
        Ok([started, finished])
    }

    /// Tokens drawn so far, of all answers.
    pub(super) fn drawn(&self) -> usize {
        self.answers.iter().map(|answer| answer.drawn).sum()
    }

    /// The answer that an event is about; `None` where it has ended here.
    fn open(&mut self, index: usize) -> Result<Option<&mut Answer>, Failure> {
        match self.answers.get_mut(index) {
            Some(answer) => Ok(Some(answer).filter(|answer| !answer.over)),
            None => Err(Failure::internal("the engine told of an answer that nobody asked for")),
        }
    }

    fn started(&mut self, cached_tokens: usize, queue_us: u64, prompt_logprobs: Vec<TokenLogprob>) -> Told {
        self.prefill = Prefill { cached_tokens, queue_us, ended: Some(Instant::now()) };
        let texts = std::mem::take(&mut self.prompt_text).into_iter().chain(std::iter::repeat(String::new()));
        let prompt_logprobs =
            prompt_logprobs.into_iter().zip(texts).map(|(token, text)| spoken(token, text, true)).collect();
        Told::Started(pb::Started {
            request_id: self.request_id.to_string(),
            prompt_tokens: narrow(self.prompt_tokens),
            cached_tokens: narrow(cached_tokens),
            prompt_logprobs,
            seed: self.seed,
        })
    }

    fn finished(&mut self, index: usize, reason: FinishReason, timings: Timings) -> Result<Told, Failure> {
        // Bytes that never became a character may still complete a stop string.
        let rest = self.answers[index].text.finish()?;
        if let Some(stop) = rest.stop {
            return Ok(self.stopped_by(index, stop, rest.text));
        }
        let (reason, matched) = match reason {
            FinishReason::Complete => (pb::FinishReason::Stop, None),
            FinishReason::StopToken(id) => (pb::FinishReason::Stop, Some(MatchedStop::StopTokenId(id))),
            FinishReason::Length => (pb::FinishReason::Length, None),
        };
        Ok(self.end(index, End { reason, matched, trailing_text: rest.text, timings }))
    }

    /// The engine does not know of stop strings: what follows its queue is measured from here.
    fn stopped_by(&mut self, index: usize, stop: String, trailing_text: String) -> Told {
        let Prefill { queue_us, ended, .. } = self.prefill;
        let ended = ended.unwrap_or(self.arrived);
        let timings = Timings {
            queue_us,
            prefill_us: micros(ended - self.arrived).saturating_sub(queue_us),
            decode_us: micros(ended.elapsed()),
        };
        let matched = Some(MatchedStop::StopString(stop));
        self.end(index, End { reason: pb::FinishReason::Stop, matched, trailing_text, timings })
    }

    fn end(&mut self, index: usize, end: End) -> Told {
        let answer = &mut self.answers[index];
        answer.over = true;
        Told::Finished(pb::Finished {
            reason: end.reason.into(),
            usage: Some(pb::Usage {
                prompt_tokens: narrow(self.prompt_tokens),
                cached_tokens: narrow(self.prefill.cached_tokens),
                completion_tokens: narrow(answer.drawn),
            }),
            timings: Some(pb::Timings {
                queue_us: end.timings.queue_us,
                prefill_us: end.timings.prefill_us,
                decode_us: end.timings.decode_us,
                total_us: micros(self.arrived.elapsed()),
            }),
            matched_stop: end.matched,
            trailing_text: end.trailing_text,
            index: narrow(index),
        })
    }
}

fn spoken(token: TokenLogprob, text: String, with_logprob: bool) -> pb::Token {
    let top = token.top.into_iter().map(|(id, logprob)| pb::TopLogprob { id, logprob }).collect();
    pb::Token { id: token.id, text, logprob: token.logprob.filter(|_| with_logprob), top }
}

/// Counts of tokens fit: a context is far below `u32::MAX`.
fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
