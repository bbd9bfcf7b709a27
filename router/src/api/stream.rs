//! What the engine tells about a request becomes what its client reads.
//!
//! In: a request's events, in order. Out: `GenerateResponse`s (Started, Tokens, Finished) or one status at the end.
//! Never here: waiting beyond the deadline, for an engine or for a client that does not read; a stream that ends well
//! without Finished.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use conclave_proto::{
    inference::v1::{self as pb, finished::MatchedStop, generate_response::Event as Told},
    status::Failure,
};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{answer_text::AnswerText, deadline};
use crate::sequence::{Event, EventReceiver, FinishReason, LogprobRules, Timings, TokenLogprob};

/// The body of a `Generate` call.
pub(super) type Responses = ReceiverStream<Result<pb::GenerateResponse, Status>>;

/// Messages that wait for a client to read them; beyond that the engine is made to wait too.
const UNREAD_MAX: usize = 16;
/// Tokens that were drawn while the client was busy travel together, at most this many.
const TOKENS_PER_MESSAGE: usize = 32;

/// One answer on its way out: everything but the waiting.
#[derive(Debug)]
pub(super) struct Answer {
    /// Echoed.
    pub(super) request_id: Arc<str>,
    /// Length of the prompt.
    pub(super) prompt_tokens: usize,
    /// Told to the client, who may need it to resume.
    pub(super) seed: u64,
    /// What to report beside the tokens.
    pub(super) logprobs: LogprobRules,
    /// The drawn tokens' text.
    pub(super) text: AnswerText,
    /// The prompt's, token by token, where its logprobs were asked for.
    pub(super) prompt_text: Vec<String>,
    /// When the request came in.
    pub(super) arrived: Instant,
    /// What has been told so far.
    pub(super) progress: Progress,
}

/// What an answer's stream has told so far.
#[derive(Debug, Default)]
pub(super) struct Progress {
    cached_tokens: usize,
    drawn: usize,
    started: Option<Instant>,
}

/// Why an answer is over, as the client sees it.
struct End {
    reason: pb::FinishReason,
    matched: Option<MatchedStop>,
    trailing_text: String,
    timings: Timings,
}

impl Answer {
    /// Puts into words what the engine told; `true` when the answer is complete and nothing may follow.
    fn tell(&mut self, event: Event, words: &mut Vec<Told>) -> Result<bool, Failure> {
        match event {
            Event::Started { cached_tokens, prompt_logprobs } => {
                words.push(self.started(cached_tokens, prompt_logprobs));
                Ok(false)
            }
            Event::Token(token) => {
                self.progress.drawn += 1;
                let released = self.text.push(token.id)?;
                let token = spoken(token, released.text, self.logprobs.sampled);
                match words.last_mut() {
                    Some(Told::Tokens(last)) => last.tokens.push(token),
                    _ => words.push(Told::Tokens(pb::Tokens { tokens: vec![token] })),
                }
                let Some(stop) = released.stop else { return Ok(false) };
                words.push(self.stopped_by(stop, String::new()));
                Ok(true)
            }
            Event::Finished { reason, completion_tokens, timings } => {
                self.progress.drawn = completion_tokens;
                words.push(self.finished(reason, timings)?);
                Ok(true)
            }
            Event::Failed(failure) => Err(failure),
        }
    }

    /// For an answer that its resumed tokens complete already, so that no engine needs to see it. `stop` is the stop
    /// string that they end with, `None` when they are as many as were asked for.
    pub(super) fn already_complete(mut self, stop: Option<String>) -> Result<Responses, Failure> {
        let started = self.started(0, Vec::new());
        let finished = match stop {
            Some(stop) => self.stopped_by(stop, String::new()),
            None => self.finished(FinishReason::Length, Timings::default())?,
        };
        let (out, responses) = mpsc::channel(2);
        for told in [started, finished] {
            // Both fit into the channel just made.
            let _ = out.try_send(Ok(pb::GenerateResponse { event: Some(told) }));
        }
        Ok(ReceiverStream::new(responses))
    }

    fn started(&mut self, cached_tokens: usize, prompt_logprobs: Vec<TokenLogprob>) -> Told {
        self.progress.cached_tokens = cached_tokens;
        self.progress.started = Some(Instant::now());
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

    fn finished(&mut self, reason: FinishReason, timings: Timings) -> Result<Told, Failure> {
        // Bytes that never became a character may still complete a stop string.
        let rest = self.text.finish()?;
        if let Some(stop) = rest.stop {
            return Ok(self.stopped_by(stop, rest.text));
        }
        let (reason, matched) = match reason {
            FinishReason::StopToken(id) => (pb::FinishReason::Stop, Some(MatchedStop::StopTokenId(id))),
            FinishReason::Length => (pb::FinishReason::Length, None),
        };
        Ok(self.end(End { reason, matched, trailing_text: rest.text, timings }))
    }

    /// The engine does not know of stop strings: the times are those that were seen from here, where waiting in the
    /// queue and computing the prompt look the same.
    fn stopped_by(&mut self, stop: String, trailing_text: String) -> Told {
        let started = self.progress.started.unwrap_or(self.arrived);
        let timings =
            Timings { queue_us: 0, prefill_us: micros(started - self.arrived), decode_us: micros(started.elapsed()) };
        let matched = Some(MatchedStop::StopString(stop));
        self.end(End { reason: pb::FinishReason::Stop, matched, trailing_text, timings })
    }

    fn end(&self, end: End) -> Told {
        Told::Finished(pb::Finished {
            reason: end.reason.into(),
            usage: Some(pb::Usage {
                prompt_tokens: narrow(self.prompt_tokens),
                cached_tokens: narrow(self.progress.cached_tokens),
                completion_tokens: narrow(self.progress.drawn),
            }),
            timings: Some(pb::Timings {
                queue_us: end.timings.queue_us,
                prefill_us: end.timings.prefill_us,
                decode_us: end.timings.decode_us,
                total_us: micros(self.arrived.elapsed()),
            }),
            matched_stop: end.matched,
            trailing_text: end.trailing_text,
        })
    }
}

/// Starts the task that carries one answer from the engine to its client. It ends, and with it the request, when the
/// answer is complete, when it fails, when `deadline` passes, or when the client is gone: dropping `events` is how the
/// engine hears of it. `waiting_for` says what the engine waits for, when the deadline passes.
pub(super) fn open(
    answer: Answer,
    events: EventReceiver,
    deadline: Instant,
    waiting_for: impl Fn() -> Option<String> + Send + 'static,
) -> Responses {
    // One seat is kept for the last status, so that it is told even to a client that has not read the rest.
    let (out, responses) = mpsc::channel(UNREAD_MAX + 1);
    tokio::spawn(async move {
        let Ok(last_seat) = out.clone().reserve_owned().await else { return };
        let request_id = answer.request_id.clone();
        let outcome = tokio::select! {
            () = out.closed() => Err(Failure::cancelled("the client is gone")),
            outcome = time::timeout_at(deadline.into(), relay(answer, events, &out)) => {
                outcome.unwrap_or_else(|_| Err(deadline::passed(waiting_for())))
            }
        };
        if let Err(failure) = outcome {
            tracing::info!(%request_id, reason = failure.reason, %failure, "answer not completed");
            last_seat.send(Err(failure.into()));
        }
    });
    ReceiverStream::new(responses)
}

/// Tells event after event until the last.
async fn relay(
    mut answer: Answer,
    mut events: EventReceiver,
    out: &mpsc::Sender<Result<pb::GenerateResponse, Status>>,
) -> Result<(), Failure> {
    let mut batch = Vec::with_capacity(TOKENS_PER_MESSAGE);
    let mut words = Vec::new();
    loop {
        if events.recv_many(&mut batch, TOKENS_PER_MESSAGE).await == 0 {
            let message = "the router stopped before the answer was complete";
            return Err(Failure::unavailable("ROUTER_STOPPED", message, Duration::from_secs(1)));
        }
        // What came before the end of an answer is told before it, whatever the end is.
        let told = batch.drain(..).map(|event| answer.tell(event, &mut words)).find(|told| !matches!(told, Ok(false)));
        for event in words.drain(..) {
            if out.send(Ok(pb::GenerateResponse { event: Some(event) })).await.is_err() {
                return Err(Failure::cancelled("the client is gone"));
            }
        }
        if let Some(told) = told {
            tracing::debug!(request_id = %answer.request_id, tokens = answer.progress.drawn, "answer ended");
            return told.map(|_| ());
        }
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

#[cfg(test)]
mod tests;
