//! `conclave generate`: one prompt comes in, the answer leaves on stdout as it is drawn, as text or as one JSON object
//! a line. Counts and times go to stderr. No history, no retry.

use std::io::Read;
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
  git diff | conclave generate --chat -")]
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
    /// Go on past the model's end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
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
    let mut ends_open = false;
    loop {
        let event = match stream.message().await {
            Ok(Some(message)) => message.event,
            Ok(None) => bail!("the answer ended without its last event"),
            Err(status) => {
                if ends_open {
                    output.line("")?;
                }
                return failed(&args, &status, &mut output);
            }
        };
        let Some(event) = event else { continue };
        if args.json {
            output.line(&serde_json::to_string(&Line::of(&event))?)?;
        } else if args.logprobs.is_some() {
            print_logprobs(&event, &mut output)?;
        } else {
            let text = text_of(&event);
            output.text(&text)?;
            ends_open = if text.is_empty() { ends_open } else { !text.ends_with('\n') };
        }
        if let Event::Finished(finished) = event {
            if ends_open {
                output.line("")?;
            }
            if args.timings {
                terminal::warn(&summary(&finished));
            }
            return Ok(ExitCode::SUCCESS);
        }
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
    request.logprobs = args.logprobs.map(|top| pb::LogprobParams { sampled: true, top, prompt: false });
    Ok(request)
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

fn print_logprobs(event: &Event, output: &mut Output) -> std::io::Result<()> {
    let Event::Tokens(tokens) = event else { return Ok(()) };
    for token in &tokens.tokens {
        let logprob = token.logprob.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        let mut line = format!("{}\t{logprob}\t{:?}", token.id, token.text);
        for top in &token.top {
            line.push_str(&format!("\t{}:{:.4}", top.id, top.logprob));
        }
        output.line(&line)?;
    }
    Ok(())
}

/// One line about a whole answer.
fn summary(finished: &pb::Finished) -> String {
    let usage = finished.usage.unwrap_or_default();
    let timings = finished.timings.unwrap_or_default();
    let time = |us: u64| terminal::duration(Duration::from_micros(us));
    let mut line = format!(
        "{} prompt tokens ({} cached), {} drawn; queue {}, prefill {}, decode {}, total {}",
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
    Tokens { tokens: Vec<TokenLine> },
    Finished(FinishedLine),
    Error { code: String, message: String, field: Option<String>, reason: Option<String>, retry_after_ms: Option<u64> },
}

/// gRPC's own spelling: `InvalidArgument` is INVALID_ARGUMENT.
fn code_name(code: tonic::Code) -> String {
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
            Event::Tokens(tokens) => Self::Tokens { tokens: tokens.tokens.iter().map(TokenLine::of).collect() },
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
mod tests {
    use clap::Parser;
    use conclave_proto::status::Failure;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Command::try_parse_from([&["generate"], line].concat()).map(|command| command.args)
    }

    #[test]
    fn flags_reach_the_request() {
        let line = ["--chat", "--temperature", "-1", "--seed", "7", "--stop", "a", "--stop", "b", "--logprobs=3", "hi"];
        let request = request(&parse(&line).unwrap()).unwrap();
        assert!(matches!(request.input, Some(Input::Chat(ref chat)) if chat.messages[0].content == "hi"));
        let sampling = request.sampling.unwrap();
        assert_eq!((sampling.temperature, sampling.seed, sampling.top_p), (Some(-1.0), Some(7), None));
        assert_eq!(request.stop.unwrap().strings, ["a", "b"]);
        assert_eq!(request.logprobs, Some(pb::LogprobParams { sampled: true, top: 3, prompt: false }));
    }

    #[test]
    fn token_ids_stand_instead_of_a_prompt() {
        let request = request(&parse(&["--tokens", "1,2,3", "--ignore-eos"]).unwrap()).unwrap();
        assert_eq!(request.input, Some(Input::Tokens(pb::TokenIds { ids: vec![1, 2, 3] })));
        assert!(request.stop.unwrap().ignore_eos);
        assert!(parse(&["--tokens", "1", "prompt"]).is_err());
        assert!(parse(&[]).is_err());
    }

    #[test]
    fn logprobs_are_printed_as_short_as_they_are_exact() {
        let token = pb::Token { id: 5, text: " a".to_owned(), logprob: Some(-0.1), top: Vec::new() };
        let line = Line::of(&Event::Tokens(pb::Tokens { tokens: vec![token] }));
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(text, r#"{"event":"tokens","tokens":[{"id":5,"text":" a","logprob":-0.1}]}"#);
    }

    #[test]
    fn an_error_is_an_event_too() {
        let status: Status = Failure::invalid("stop.max_tokens", "must be at least 1").into();
        let value = serde_json::to_value(Line::of_error(&status)).unwrap();
        assert_eq!(value["event"], "error");
        assert_eq!(value["code"], "INVALID_ARGUMENT");
        assert_eq!(value["field"], "stop.max_tokens");
    }
}
