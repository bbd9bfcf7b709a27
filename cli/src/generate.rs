//! `conclave generate`: one prompt comes in, the answer leaves on stdout as it is drawn, as text or as one JSON object
//! a line. Several answers leave one after the other, each under its number. Counts and times go to stderr. No history,
//! no retry.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use conclave_proto::inference::v1 as pb;
use pb::generate_request::Input;
use pb::generate_response::Event;
use serde::Serialize;
use tonic::Status;
use tonic_types::StatusExt;

use crate::client;
use crate::terminal::{self, Output};

const MAX_PROMPT_BYTES: u64 = 16 << 20;

/// Ask once, and stream the answer.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave generate --chat 'What is the capital of France?'
  conclave generate --max-tokens 32 --temperature 0 'Once upon a time'
  conclave generate --tokens 1,2,3 --ignore-eos --max-tokens 8 --json
  conclave generate --n 3 --max-tokens 32 'Once upon a time'
  git diff | conclave generate --chat -
  conclave generate --chat --json-schema person.json 'Invent somebody.'
  conclave generate --choice yes --choice no 'Is water wet? '")]
pub(crate) struct Args {
    #[command(flatten)]
    options: client::Options,
    /// The text to continue; `-` reads it from stdin (less one newline at its end).
    #[arg(value_name = "PROMPT", required_unless_present = "tokens")]
    prompt: Option<String>,
    /// PROMPT is a user's message: render it with the model's chat template.
    #[arg(long)]
    chat: bool,
    /// Token ids instead of a text.
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with_all = ["prompt", "chat"])]
    tokens: Vec<u32>,
    /// Answers to draw, 1 to 16: each under its number, whole once the ones before it are.
    #[arg(long, value_name = "N")]
    n: Option<u32>,
    /// Go on past the model's end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// The answer is JSON that fits the JSON Schema in FILE.
    #[arg(long, value_name = "FILE", group = "grammar")]
    json_schema: Option<PathBuf>,
    /// The whole answer matches this regular expression.
    #[arg(long, value_name = "PATTERN", group = "grammar", allow_hyphen_values = true)]
    regex: Option<String>,
    /// The answer is this text, or another one given so; may be repeated.
    #[arg(long, value_name = "TEXT", group = "grammar", allow_hyphen_values = true)]
    choice: Vec<String>,
    /// One token a line with its log probability, and the TOP most probable ones beside it.
    #[arg(long, value_name = "TOP", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    logprobs: Option<u32>,
    /// One JSON object a line: started, tokens …, finished (or error).
    #[arg(long)]
    json: bool,
    /// Token counts and times on stderr at the end.
    #[arg(long)]
    timings: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let request = request(&args)?;
    let mut output = Output::stdout();
    let mut client = client::connect(&args.options.endpoint).await?;
    let mut stream = match client.generate(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return failed(&args, &status, &mut output),
    };
    let mut sorted = Sorted::new(args.n.map_or(1, |n| n as usize));
    loop {
        let event = match stream.message().await {
            Ok(Some(message)) => message.event,
            Ok(None) => bail!("the answer ended without its last event"),
            Err(status) => {
                output.text(sorted.line_end())?;
                return failed(&args, &status, &mut output);
            }
        };
        let Some(event) = event else { continue };
        if args.json {
            output.line(&serde_json::to_string(&Line::of(&event))?)?;
        }
        let text = match (args.json, args.logprobs) {
            (true, _) => String::new(),
            (false, Some(_)) => logprob_lines(&event),
            (false, None) => text_of(&event),
        };
        let text = sorted.add(&event, &text).context("the router answers more than it was asked")?;
        if !args.json {
            output.text(&text)?;
        }
        if let Event::Finished(finished) = &event
            && args.timings
        {
            terminal::warn(&summary(finished, args.n.is_some()));
        }
        if sorted.is_over() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// The text of answers that come mixed, in the order of their indices: the first that is not finished leaves as it
/// comes, those after it when their turn has come, each under its number if there are several.
#[derive(Debug)]
struct Sorted {
    /// What has come of each and has not left, and whether it is finished.
    answers: Vec<(String, bool)>,
    /// The one whose turn it is; whether its number has left.
    current: usize,
    headed: bool,
    /// What left last lacks the end of its line.
    line_open: bool,
}

impl Sorted {
    fn new(answers: usize) -> Self {
        Self { answers: vec![(String::new(), false); answers], current: 0, headed: false, line_open: false }
    }

    /// Takes an event, with the text it adds to its answer; what leaves now. `None` for an answer that there is not.
    fn add(&mut self, event: &Event, text: &str) -> Option<String> {
        let (index, finished) = match event {
            Event::Started(_) => return Some(String::new()),
            Event::Tokens(tokens) => (tokens.index, false),
            Event::Finished(finished) => (finished.index, true),
        };
        let (held, is_finished) = self.answers.get_mut(index as usize)?;
        held.push_str(text);
        *is_finished |= finished;
        let several = self.answers.len() > 1;
        let mut leaves = String::new();
        while let Some((held, finished)) = self.answers.get_mut(self.current) {
            if several && !self.headed {
                leaves.push_str(&format!("--- {}\n", self.current));
                self.headed = true;
            }
            if !held.is_empty() {
                self.line_open = !held.ends_with('\n');
                leaves.push_str(&std::mem::take(held));
            }
            if !*finished {
                break;
            }
            self.current += 1;
            self.headed = false;
            leaves.push_str(self.line_end());
        }
        Some(leaves)
    }

    /// What the line needs that is open.
    fn line_end(&mut self) -> &'static str {
        if std::mem::take(&mut self.line_open) { "\n" } else { "" }
    }

    fn is_over(&self) -> bool {
        self.current == self.answers.len()
    }
}

/// The text an event adds to the answer.
pub(crate) fn text_of(event: &Event) -> String {
    match event {
        Event::Started(_) => String::new(),
        Event::Tokens(tokens) => tokens.tokens.iter().map(|token| token.text.as_str()).collect(),
        Event::Finished(finished) => finished.trailing_text.clone(),
    }
}

fn request(args: &Args) -> anyhow::Result<pb::GenerateRequest> {
    let input = match &args.prompt {
        None => Input::Tokens(pb::TokenIds { ids: args.tokens.clone() }),
        Some(prompt) => {
            let text = if prompt == "-" { from_stdin()? } else { prompt.clone() };
            if args.chat {
                let message = pb::ChatMessage { role: "user".to_owned(), content: text };
                Input::Chat(pb::Chat { messages: vec![message], add_generation_prompt: None })
            } else {
                Input::Prompt(text)
            }
        }
    };
    let mut request = args.options.request(input);
    if let Some(stop) = &mut request.stop {
        stop.ignore_eos = args.ignore_eos;
    }
    request.n = args.n;
    request.structured = structured(args)?;
    request.logprobs = args.logprobs.map(|top| pb::LogprobParams { sampled: true, top, prompt: false });
    Ok(request)
}

/// What the answer must look like; how large it may be is the router's business.
fn structured(args: &Args) -> anyhow::Result<Option<pb::StructuredOutput>> {
    use pb::structured_output::Grammar;
    let grammar = if let Some(file) = &args.json_schema {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Grammar::JsonSchema(text)
    } else if let Some(pattern) = &args.regex {
        Grammar::Regex(pattern.clone())
    } else if !args.choice.is_empty() {
        Grammar::Choice(pb::Choice { options: args.choice.clone() })
    } else {
        return Ok(None);
    };
    Ok(Some(pb::StructuredOutput { grammar: Some(grammar) }))
}

fn from_stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    std::io::stdin()
        .take(MAX_PROMPT_BYTES + 1)
        .read_to_string(&mut text)
        .context("cannot read the prompt from stdin")?;
    if text.len() as u64 > MAX_PROMPT_BYTES {
        bail!("the prompt on stdin is longer than {}", terminal::bytes(MAX_PROMPT_BYTES));
    }
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

fn failed(args: &Args, status: &Status, output: &mut Output) -> anyhow::Result<ExitCode> {
    if args.json {
        output.line(&serde_json::to_string(&Line::of_error(status))?)?;
    }
    terminal::warn(&format!("error: {}", client::sentence(status)));
    Ok(ExitCode::FAILURE)
}

/// One token a line.
fn logprob_lines(event: &Event) -> String {
    let Event::Tokens(tokens) = event else { return String::new() };
    let mut lines = String::new();
    for token in &tokens.tokens {
        let logprob = token.logprob.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        lines.push_str(&format!("{}\t{logprob}\t{:?}", token.id, token.text));
        for top in &token.top {
            lines.push_str(&format!("\t{}:{:.4}", top.id, top.logprob));
        }
        lines.push('\n');
    }
    lines
}

/// One line about a whole answer, with its number where there may be several.
fn summary(finished: &pb::Finished, numbered: bool) -> String {
    let usage = finished.usage.unwrap_or_default();
    let timings = finished.timings.unwrap_or_default();
    let time = |us: u64| terminal::duration(Duration::from_micros(us));
    let number = if numbered { format!("{}: ", finished.index) } else { String::new() };
    let mut line = format!(
        "{number}{} prompt tokens ({} cached), {} drawn; queue {}, prefill {}, decode {}, total {}",
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        time(timings.queue_us),
        time(timings.prefill_us),
        time(timings.decode_us),
        time(timings.total_us),
    );
    // The first token comes out of the prefill.
    if usage.completion_tokens > 1 && timings.decode_us > 0 {
        let rate = f64::from(usage.completion_tokens - 1) * 1e6 / timings.decode_us as f64;
        line.push_str(&format!("; {rate:.1} tokens/s"));
    }
    line.push_str(&format!("; ended by {}", reason(finished)));
    line
}

fn reason(finished: &pb::Finished) -> &'static str {
    match finished.reason() {
        pb::FinishReason::Stop => "stop",
        pb::FinishReason::Length => "length",
        pb::FinishReason::Unspecified => "unspecified",
    }
}

/// One event as JSON: part of the command's contract, so spelled out here.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line {
    Started { request_id: String, prompt_tokens: u32, cached_tokens: u32, seed: u64 },
    Tokens { index: u32, tokens: Vec<TokenLine> },
    Finished(FinishedLine),
    Error { code: String, message: String, field: Option<String>, reason: Option<String>, retry_after_ms: Option<u64> },
}

/// gRPC's own spelling: `InvalidArgument` is INVALID_ARGUMENT.
pub(crate) fn code_name(code: tonic::Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[derive(Serialize)]
struct TokenLine {
    id: u32,
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprob: Option<f32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top: Vec<TopLine>,
}

#[derive(Serialize)]
struct TopLine {
    id: u32,
    logprob: f32,
}

#[derive(Serialize)]
struct FinishedLine {
    index: u32,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_token_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_string: Option<String>,
    trailing_text: String,
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
    queue_us: u64,
    prefill_us: u64,
    decode_us: u64,
    total_us: u64,
}

impl Line {
    fn of(event: &Event) -> Self {
        match event {
            Event::Started(started) => Self::Started {
                request_id: started.request_id.clone(),
                prompt_tokens: started.prompt_tokens,
                cached_tokens: started.cached_tokens,
                seed: started.seed,
            },
            Event::Tokens(tokens) => {
                Self::Tokens { index: tokens.index, tokens: tokens.tokens.iter().map(TokenLine::of).collect() }
            }
            Event::Finished(finished) => Self::Finished(FinishedLine::of(finished)),
        }
    }

    fn of_error(status: &Status) -> Self {
        let details = status.get_error_details();
        let violation = details.bad_request().and_then(|bad| bad.field_violations.first());
        let retry = details.retry_info().and_then(|info| info.retry_delay);
        Self::Error {
            code: code_name(status.code()),
            message: status.message().to_owned(),
            field: violation.map(|violation| violation.field.clone()),
            reason: details.error_info().map(|info| info.reason.clone()),
            retry_after_ms: retry.map(|after| after.as_millis() as u64),
        }
    }
}

impl TokenLine {
    fn of(token: &pb::Token) -> Self {
        let top = token.top.iter().map(|top| TopLine { id: top.id, logprob: top.logprob }).collect();
        Self { id: token.id, text: token.text.clone(), logprob: token.logprob, top }
    }
}

impl FinishedLine {
    fn of(finished: &pb::Finished) -> Self {
        use pb::finished::MatchedStop;
        let usage = finished.usage.unwrap_or_default();
        let timings = finished.timings.unwrap_or_default();
        let (stop_token_id, stop_string) = match &finished.matched_stop {
            Some(MatchedStop::StopTokenId(id)) => (Some(*id), None),
            Some(MatchedStop::StopString(text)) => (None, Some(text.clone())),
            None => (None, None),
        };
        Self {
            index: finished.index,
            reason: reason(finished),
            stop_token_id,
            stop_string,
            trailing_text: finished.trailing_text.clone(),
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
            queue_us: timings.queue_us,
            prefill_us: timings.prefill_us,
            decode_us: timings.decode_us,
            total_us: timings.total_us,
        }
    }
}

#[cfg(test)]
mod tests;
