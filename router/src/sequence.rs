//! A request on its way through the router, and what comes back of it.
//!
//! In: what `api::validate` made of a client's message. Out: the types that the scheduler, the engine and the stream
//! hand each other. Never here: behaviour, prost types, tensors.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Instant,
};

use conclave_model::{grammar::Constraint, sampler::SamplingParams};
use conclave_proto::status::Failure;
use tokio::sync::mpsc;

/// A request in which every number was checked against its range and against this model. The only thing that the
/// scheduler accepts.
#[derive(Clone, Debug)]
pub struct ValidRequest {
    /// Visible ASCII, not empty; for logs and the client.
    pub request_id: Arc<str>,
    /// Token ids below the vocabulary's size; at least one; with `resumed` and one more fits into the context.
    pub prompt: Vec<u32>,
    /// Tokens of the answer that were delivered earlier; the answer goes on after them.
    pub resumed: Vec<u32>,
    /// Temperature, filters and penalties, seed included.
    pub sampling: SamplingParams,
    /// When to stop, as far as token ids tell. Stop strings are the stream's business.
    pub stop: StopRules,
    /// What the text must look like; has taken the resumed tokens. Each answer goes on with a fork of it.
    pub constraint: Option<Constraint>,
    /// What to report beside the tokens.
    pub logprobs: LogprobRules,
    /// How many answers; at least one, at most 16. Each is drawn with a seed of its own: the request's plus its index.
    pub answers: usize,
    /// A head start in the queue, in seconds.
    pub priority: i32,
    /// Prefixes are shared only with requests of the same salt.
    pub cache_salt: Arc<str>,
    /// When the client stops waiting.
    pub deadline: Instant,
}

/// When an answer ends, in token ids.
#[derive(Clone, Debug)]
pub struct StopRules {
    /// Length of the whole answer, resumed tokens included; prompt + this fits into the context.
    pub max_tokens: usize,
    /// No end or stop token is drawn before this length.
    pub min_tokens: usize,
    /// End-of-sequence and stop tokens together; empty with `ignore_eos` and no stop tokens.
    pub token_ids: Arc<[u32]>,
}

/// What to report beside the tokens.
#[derive(Clone, Copy, Debug)]
pub struct LogprobRules {
    /// Each drawn token's own.
    pub sampled: bool,
    /// The most probable ones at each position.
    pub top: usize,
    /// The prompt's tokens too.
    pub prompt: bool,
}

impl LogprobRules {
    /// Whether anything was asked about drawn tokens.
    pub fn any(&self) -> bool {
        self.sampled || self.top > 0
    }
}

/// A token's probability as the model gave it, before temperature and filters.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token itself.
    pub id: u32,
    /// Natural logarithm; `None` for a prompt's first token, which nothing predicts.
    pub logprob: Option<f32>,
    /// The most probable tokens at its position, most probable first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// This end or stop token was drawn; it is not part of the answer.
    StopToken(u32),
    /// Nothing can be added to a text that must have a form, and there is no end or stop token to say so.
    Complete,
    /// `max_tokens`, or the context is full.
    Length,
}

/// Where the time went, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timings {
    /// From submission to the first step that had this request in it.
    pub queue_us: u64,
    /// From there to the first drawn token.
    pub prefill_us: u64,
    /// From there to the last.
    pub decode_us: u64,
}

/// What the engine tells about one request, in this order: `Started`, then per answer any number of `Token` and one
/// `Finished`, those of several answers mixed; or `Failed`, after which nothing comes. The receiver dropping its end is
/// how a request is cancelled.
#[derive(Clone, Debug)]
pub enum Event {
    /// The prompt is computed.
    Started {
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
        /// From submission to the first step, in microseconds.
        queue_us: u64,
        /// One per prompt token where that was asked for, else empty.
        prompt_logprobs: Vec<TokenLogprob>,
    },
    /// One drawn token.
    Token {
        /// Of which answer, from 0.
        answer: usize,
        /// The token.
        token: TokenLogprob,
    },
    /// One answer is complete.
    Finished {
        /// Which, from 0.
        answer: usize,
        /// Why.
        reason: FinishReason,
        /// Drawn now, resumed ones not counted.
        completion_tokens: usize,
        /// Where the time went.
        timings: Timings,
    },
    /// The answer cannot be completed.
    Failed(Failure),
}

/// The engine's end of one request's events: bounded, so that a reader who stops reading is noticed, not buffered for.
pub type EventSender = mpsc::Sender<Event>;
/// The stream's end.
pub type EventReceiver = mpsc::Receiver<Event>;

/// The answers of one request that its stream has ended by itself, at a stop string: they are computed no further,
/// while the others go on.
#[derive(Debug, Default)]
pub struct Stopped(AtomicU32);

impl Stopped {
    /// Answer `answer` is not wanted any more.
    pub fn stop(&self, answer: usize) {
        self.0.fetch_or(1 << answer, Relaxed);
    }

    /// Whether it is not.
    pub fn is_stopped(&self, answer: usize) -> bool {
        self.0.load(Relaxed) & (1 << answer) != 0
    }
}
