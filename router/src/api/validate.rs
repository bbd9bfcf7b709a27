//! A client's message becomes a [`ValidRequest`], once, or the failure that names the field at fault.
//!
//! In: a `GenerateRequest`, the served model's bounds, a way to turn its input into token ids. Out: numbers all
//! inside their ranges, with the checkpoint's defaults filled in, and the stop strings for the stream. Never here: I/O,
//! the tokenizer itself, a client's text in an error's message.

use std::{collections::HashMap, sync::Arc, time::Instant};

use conclave_model::{generation::GenerationConfig, sampler::SamplingParams};
use conclave_proto::{
    inference::v1::{self as pb, generate_request::Input},
    status::Failure,
};

use crate::sequence::{LogprobRules, StopRules, ValidRequest};

/// Answers to one request.
pub(super) const ANSWERS_MAX: usize = 16;
const REQUEST_ID_BYTES_MAX: usize = 128;
const PRIORITY_MAX: i32 = 100;
const CACHE_SALT_BYTES_MAX: usize = 128;
const TEMPERATURE_MAX: f32 = 2.0;
const REPETITION_PENALTY_MAX: f32 = 2.0;
const PENALTY_MAX: f32 = 2.0;
const LOGIT_BIASES_MAX: usize = 1_024;
const LOGIT_BIAS_MAX: f32 = 100.0;
const STOP_STRINGS_MAX: usize = 16;
const STOP_STRING_BYTES_MAX: usize = 256;
const STOP_TOKENS_MAX: usize = 64;
const TOP_LOGPROBS_MAX: u32 = 20;
/// Prompt tokens × (2 + top): at some 11 bytes each, and twice that for the token itself, `Started` stays below the
/// largest message that this service sends.
const PROMPT_LOGPROBS_MAX: usize = 4 << 20;

/// What the served model allows and suggests.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    /// The model's name.
    pub(super) name: String,
    /// Tokens of prompt and answer together.
    pub(super) context_tokens: usize,
    /// Token ids are below this.
    pub(super) vocab_size: usize,
    /// Answers to one request that this router can compute at once; 1 to [`ANSWERS_MAX`].
    pub(super) answers_max: usize,
    /// Without a tokenizer there is no text to find a stop string in.
    pub(super) has_tokenizer: bool,
    /// Tokens that end an answer.
    pub(super) eos_token_ids: Vec<u32>,
    /// The checkpoint's sampling, where the client names none.
    pub(super) defaults: Defaults,
}

/// Sampling where the client names none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Defaults {
    temperature: f32,
    top_p: f32,
    top_k: u32,
    repetition_penalty: f32,
}

impl Defaults {
    /// What a checkpoint's authors suggest, moved to the edge of our ranges where it lies outside them; what they leave
    /// open is off.
    pub(super) fn new(suggested: &GenerationConfig) -> Self {
        let or_off = |value: Option<f64>, low: f32, high: f32| (value.unwrap_or(1.0) as f32).clamp(low, high);
        Self {
            temperature: or_off(suggested.temperature, 0.0, TEMPERATURE_MAX),
            top_p: or_off(suggested.top_p, f32::MIN_POSITIVE, 1.0),
            top_k: suggested.top_k.unwrap_or(0),
            repetition_penalty: or_off(suggested.repetition_penalty, f32::MIN_POSITIVE, REPETITION_PENALTY_MAX),
        }
    }
}

/// A request that may go to the scheduler, and what its stream needs beside it.
#[derive(Clone, Debug)]
pub(super) struct Accepted {
    /// The scheduler's part.
    pub(super) request: ValidRequest,
    /// The stream's part: each 1 to 256 bytes.
    pub(super) stop_strings: Vec<String>,
}

/// Checks everything, the cheap first; `encode` turns the input into token ids and is called at most once.
///
/// # Errors
/// `NotFound` for another model's name, `FailedPrecondition` for stop strings without a tokenizer, whatever `encode`
/// says, else `InvalidArgument` with the field's path.
pub(super) fn accept(
    request: pb::GenerateRequest,
    bounds: &Bounds,
    deadline: Instant,
    encode: impl FnOnce(Input) -> Result<Vec<u32>, Failure>,
) -> Result<Accepted, Failure> {
    if !request.model.is_empty() && request.model != bounds.name {
        return Err(Failure::not_found("MODEL_NOT_FOUND", format!("the model served here is {:?}", bounds.name)));
    }
    let request_id = request_id(request.request_id)?;
    let priority = request.priority;
    if !(-PRIORITY_MAX..=PRIORITY_MAX).contains(&priority) {
        return Err(Failure::invalid("priority", format!("must be in [-100, 100], is {priority}")));
    }
    let answers = answers(request.n, &request.resume_tokens, bounds)?;
    let cache_salt = request.cache_salt;
    if cache_salt.len() > CACHE_SALT_BYTES_MAX {
        let message = format!("must be at most {CACHE_SALT_BYTES_MAX} bytes long, is {}", cache_salt.len());
        return Err(Failure::invalid("cache_salt", message));
    }
    let sampling = sampling(request.sampling.unwrap_or_default(), bounds)?;
    let logprobs = logprobs(request.logprobs.unwrap_or_default())?;
    let stop = request.stop.unwrap_or_default();
    let token_ids = stop_tokens(&stop, bounds)?;
    if stop.max_tokens == Some(0) {
        return Err(Failure::invalid("stop.max_tokens", "must be at least 1, is 0"));
    }
    check_stop_strings(&stop.strings, bounds)?;
    check_ids("resume_tokens", &request.resume_tokens, bounds.vocab_size)?;
    let resumed = request.resume_tokens;

    let input = request.input.ok_or_else(|| Failure::invalid("input", "one of prompt, tokens and chat must be set"))?;
    let field = match &input {
        Input::Prompt(_) => "prompt",
        Input::Tokens(_) => "tokens.ids",
        Input::Chat(_) => "chat",
    };
    let prompt = encode(input)?;
    check_ids(field, &prompt, bounds.vocab_size)?;
    if prompt.is_empty() {
        return Err(Failure::invalid(field, "must be at least one token long"));
    }
    let max_tokens = max_tokens(field, prompt.len(), resumed.len(), stop.max_tokens, bounds.context_tokens)?;
    let min_tokens = stop.min_tokens as usize;
    if min_tokens > max_tokens {
        let message = format!("is {min_tokens}, but the answer can have no more than {max_tokens} tokens");
        return Err(Failure::invalid("stop.min_tokens", message));
    }
    if logprobs.prompt && prompt.len().saturating_mul(2 + logprobs.top) > PROMPT_LOGPROBS_MAX {
        let message = format!("a prompt of {} tokens with {} each is too much to report", prompt.len(), logprobs.top);
        return Err(Failure::invalid("logprobs.prompt", message));
    }
    let stop_rules = StopRules { max_tokens, min_tokens, token_ids };
    let request = ValidRequest {
        request_id,
        prompt,
        resumed,
        sampling,
        stop: stop_rules,
        // The message's `structured` is taken up once everything here is right.
        constraint: None,
        logprobs,
        answers,
        priority,
        cache_salt: cache_salt.into(),
        deadline,
    };
    Ok(Accepted { request, stop_strings: stop.strings })
}

/// Every id is below the vocabulary's size.
pub(super) fn check_ids(field: &str, ids: &[u32], vocab_size: usize) -> Result<(), Failure> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        None => Ok(()),
        Some(at) => {
            let message = format!("must be below the vocabulary's size of {vocab_size}, is {}", ids[at]);
            Err(Failure::invalid(format!("{field}[{at}]"), message))
        }
    }
}

fn request_id(given: String) -> Result<Arc<str>, Failure> {
    if given.is_empty() {
        return Ok(format!("req-{:016x}", rand::random::<u64>()).into());
    }
    if given.len() > REQUEST_ID_BYTES_MAX || !given.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::invalid("request_id", "must be at most 128 visible ASCII characters"));
    }
    Ok(given.into())
}

/// How many answers; one where the client names no number.
fn answers(n: Option<u32>, resumed: &[u32], bounds: &Bounds) -> Result<usize, Failure> {
    let answers = n.map_or(1, |n| n as usize);
    if !(1..=ANSWERS_MAX).contains(&answers) {
        return Err(Failure::invalid("n", format!("must be in [1, {ANSWERS_MAX}], is {answers}")));
    }
    if answers > bounds.answers_max {
        let message =
            format!("must be at most {}, what this router computes at once, is {answers}", bounds.answers_max);
        return Err(Failure::invalid("n", message));
    }
    if answers > 1 && !resumed.is_empty() {
        let message = format!("belong to a single answer: they go with n = 1, and not with {answers}");
        return Err(Failure::invalid("resume_tokens", message));
    }
    Ok(answers)
}

fn sampling(given: pb::SamplingParams, bounds: &Bounds) -> Result<SamplingParams, Failure> {
    let defaults = bounds.defaults;
    let penalty = closed(-PENALTY_MAX, PENALTY_MAX);
    let top_k = given.top_k.unwrap_or(defaults.top_k);
    Ok(SamplingParams {
        temperature: within(
            "sampling.temperature",
            given.temperature.unwrap_or(defaults.temperature),
            closed(0.0, TEMPERATURE_MAX),
        )?,
        top_p: within("sampling.top_p", given.top_p.unwrap_or(defaults.top_p), above(0.0, 1.0))?,
        // As many as there are tokens, or more, filters nothing: the same as off.
        top_k: if top_k as usize >= bounds.vocab_size { 0 } else { top_k },
        min_p: within("sampling.min_p", given.min_p, closed(0.0, 1.0))?,
        repetition_penalty: within(
            "sampling.repetition_penalty",
            given.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            above(0.0, REPETITION_PENALTY_MAX),
        )?,
        presence_penalty: within("sampling.presence_penalty", given.presence_penalty, penalty)?,
        frequency_penalty: within("sampling.frequency_penalty", given.frequency_penalty, penalty)?,
        seed: given.seed.unwrap_or_else(rand::random),
        logit_bias: logit_bias(given.logit_bias, bounds.vocab_size)?,
    })
}

/// In the order of their ids, so that the same request always is the same computation.
fn logit_bias(given: HashMap<u32, f32>, vocab_size: usize) -> Result<Vec<(u32, f32)>, Failure> {
    if given.len() > LOGIT_BIASES_MAX {
        let message = format!("must have at most {LOGIT_BIASES_MAX} entries, has {}", given.len());
        return Err(Failure::invalid("sampling.logit_bias", message));
    }
    let mut biases: Vec<_> = given.into_iter().collect();
    biases.sort_unstable_by_key(|&(id, _)| id);
    for &(id, bias) in &biases {
        let field = format!("sampling.logit_bias[{id}]");
        if id as usize >= vocab_size {
            let message = format!("the token must be below the vocabulary's size of {vocab_size}, is {id}");
            return Err(Failure::invalid(field, message));
        }
        within(&field, bias, closed(-LOGIT_BIAS_MAX, LOGIT_BIAS_MAX))?;
    }
    Ok(biases)
}

fn logprobs(given: pb::LogprobParams) -> Result<LogprobRules, Failure> {
    if given.top > TOP_LOGPROBS_MAX {
        let message = format!("must be at most {TOP_LOGPROBS_MAX}, is {}", given.top);
        return Err(Failure::invalid("logprobs.top", message));
    }
    Ok(LogprobRules { sampled: given.sampled, top: given.top as usize, prompt: given.prompt })
}

fn stop_tokens(stop: &pb::StopParams, bounds: &Bounds) -> Result<Arc<[u32]>, Failure> {
    if stop.token_ids.len() > STOP_TOKENS_MAX {
        let message = format!("must have at most {STOP_TOKENS_MAX} tokens, has {}", stop.token_ids.len());
        return Err(Failure::invalid("stop.token_ids", message));
    }
    check_ids("stop.token_ids", &stop.token_ids, bounds.vocab_size)?;
    let eos: &[u32] = if stop.ignore_eos { &[] } else { &bounds.eos_token_ids };
    let mut ids = [&stop.token_ids, eos].concat();
    ids.sort_unstable();
    ids.dedup();
    Ok(ids.into())
}

fn check_stop_strings(strings: &[String], bounds: &Bounds) -> Result<(), Failure> {
    if strings.len() > STOP_STRINGS_MAX {
        let message = format!("must have at most {STOP_STRINGS_MAX} strings, has {}", strings.len());
        return Err(Failure::invalid("stop.strings", message));
    }
    if let Some(at) = strings.iter().position(|string| !(1..=STOP_STRING_BYTES_MAX).contains(&string.len())) {
        let message = format!("must be 1 to {STOP_STRING_BYTES_MAX} bytes long, is {}", strings[at].len());
        return Err(Failure::invalid(format!("stop.strings[{at}]"), message));
    }
    if !strings.is_empty() && !bounds.has_tokenizer {
        let message = "this model has no tokenizer, so that no text can be searched for stop strings";
        return Err(Failure::precondition("NO_TOKENIZER", message));
    }
    Ok(())
}

/// The whole answer's length, resumed tokens included; what the context leaves where the client names none.
fn max_tokens(
    field: &str,
    prompt: usize,
    resumed: usize,
    asked: Option<u32>,
    context: usize,
) -> Result<usize, Failure> {
    let room = context.saturating_sub(prompt);
    if room == 0 {
        let message = format!("is {prompt} tokens long; the context of {context} must hold it and one token more");
        return Err(Failure::invalid(field, message));
    }
    if resumed > room {
        let message = format!("is {prompt} tokens long, with {resumed} resumed ones; the context holds {context}");
        return Err(Failure::invalid(field, message));
    }
    let asked = asked.map_or(room, |asked| asked as usize);
    if asked > room {
        let message =
            format!("is {asked}; after a prompt of {prompt} tokens, a context of {context} has room for {room}");
        return Err(Failure::invalid("stop.max_tokens", message));
    }
    if resumed > asked {
        let message = format!("has {resumed} tokens, more than the {asked} of stop.max_tokens");
        return Err(Failure::invalid("resume_tokens", message));
    }
    Ok(asked)
}

/// `[low, high]`, or `(low, high]`.
#[derive(Clone, Copy, Debug)]
struct Interval {
    low: f32,
    low_included: bool,
    high: f32,
}

impl Interval {
    /// A NaN lies in none.
    fn contains(self, value: f32) -> bool {
        (self.low < value || self.low_included && self.low == value) && value <= self.high
    }
}

fn closed(low: f32, high: f32) -> Interval {
    Interval { low, low_included: true, high }
}

fn above(low: f32, high: f32) -> Interval {
    Interval { low, low_included: false, high }
}

fn within(field: &str, value: f32, range: Interval) -> Result<f32, Failure> {
    if range.contains(value) {
        return Ok(value);
    }
    let open = if range.low_included { '[' } else { '(' };
    Err(Failure::invalid(field, format!("must be in {open}{}, {}], is {value}", range.low, range.high)))
}

#[cfg(test)]
mod tests;
