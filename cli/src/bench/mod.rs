//! `conclave bench serve`: a workload comes in, requests leave for a running router when their time comes, and what was
//! measured goes out as a table or one JSON object. The names of what is measured are those of `vllm bench serve`. No
//! server is started here, and nothing failed is sent again.

mod arrivals;
mod distribution;
mod load;
mod report;
mod request;
mod workload;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use conclave_proto::inference::v1 as pb;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::terminal::{self, Output};
use crate::{client, up};
use load::Load;
use report::{Conditions, Report};
use workload::{Spread, Workload};

/// Send requests to a running router and measure how it answers.
///
/// Requests leave at random times drawn before the start, and wait for no answer (an open loop), unless
/// --max-concurrency holds them back. Ctrl-C ends early and reports what was measured. Exit status: 0, 1 when no
/// request was successful, 130 after Ctrl-C.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave bench serve --num-prompts 100 --request-rate 2
  conclave bench serve --num-prompts 64 --max-concurrency 16 --input-len 512 --output-len 64
  conclave bench serve --num-prompts 50 --request-rate 1 --shared-prefix-len 1000 --input-len 50 --warmup 1 --json

What is measured, over successful requests:
  TTFT  from sending a request to its first token
  TPOT  time per output token after the first: one figure a request
  ITL   from each token to the next; tokens of one message are 0 apart
  E2E   from sending a request to the end of its answer
  late  from the time drawn for a request to its sending: the wait for --max-concurrency, else this client's own delay")]
pub(crate) struct Args {
    /// A router's public address.
    #[arg(long, value_name = "ADDR", env = "CONCLAVE_ENDPOINT", default_value = "http://127.0.0.1:7400")]
    endpoint: String,
    /// Requests to send.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    num_prompts: u32,
    /// Requests a second; `inf` sends all at once.
    #[arg(long, value_name = "R", default_value = "inf", value_parser = rate)]
    request_rate: f64,
    /// Shape of the gamma distribution of the gaps between requests: 1 is a Poisson process, less comes in bursts, more is even.
    #[arg(long, value_name = "SHAPE", default_value_t = 1.0, value_parser = burstiness)]
    burstiness: f64,
    /// Requests in flight at once; further ones wait here. With --request-rate inf this is a closed loop.
    #[arg(long, value_name = "C", value_parser = clap::value_parser!(u32).range(1..))]
    max_concurrency: Option<u32>,
    /// Random tokens of a prompt, on top of the shared prefix.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    input_len: u32,
    /// Draw the prompt's length from N·(1-R) to N·(1+R).
    #[arg(long, value_name = "R", default_value_t = 0.0, value_parser = ratio)]
    input_range_ratio: f64,
    /// Tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    output_len: u32,
    /// Draw the answer's length from N·(1-R) to N·(1+R).
    #[arg(long, value_name = "R", default_value_t = 0.0, value_parser = ratio)]
    output_range_ratio: f64,
    /// Tokens that all prompts begin with.
    #[arg(long, value_name = "P", default_value_t = 0)]
    shared_prefix_len: u32,
    /// The same seed draws the same times, lengths and tokens.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
    /// 0 is greedy.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Go on past the model's end-of-sequence tokens, so that answers have the length they shall have.
    #[arg(long, value_name = "true|false", num_args = 1, action = clap::ArgAction::Set, default_value_t = true)]
    ignore_eos: bool,
    /// Deadline of each request.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// Requests sent one by one before the measurement; they are not counted.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    warmup: u32,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn serve(args: Args) -> anyhow::Result<ExitCode> {
    let mut client = client::connect(&args.endpoint).await?;
    let model = match client.get_model(pb::GetModelRequest {}).await {
        Ok(response) => response.into_inner(),
        Err(status) => bail!("{}", client::sentence(&status)),
    };
    let workload = args.workload(&model)?;
    let load = Load {
        endpoint: args.endpoint.clone(),
        client,
        max_concurrency: args.max_concurrency.map(|cap| cap as usize),
        temperature: args.temperature,
        ignore_eos: args.ignore_eos,
        timeout: Duration::from_secs(args.timeout),
        workload,
    };
    let stop = CancellationToken::new();
    let interrupted = {
        let (stop, mut interrupt) = (stop.clone(), signal(SignalKind::interrupt())?);
        async move {
            interrupt.recv().await;
            stop.cancel();
        }
    };
    tokio::spawn(interrupted);
    load.warm_up(args.warmup, &stop).await?;
    let samples = load.run(&stop).await?;
    let report = Report::of(args.conditions(model.name), &samples);
    for (code, example) in report.examples() {
        terminal::warn(&format!("{code}: {example}"));
    }
    let mut output = Output::stdout();
    if args.json {
        output.line(&serde_json::to_string_pretty(&report)?)?;
    } else {
        output.text(&report.text())?;
    }
    Ok(match (report.successful(), stop.is_cancelled()) {
        (0, _) => ExitCode::FAILURE,
        (_, true) => ExitCode::from(up::INTERRUPTED),
        _ => ExitCode::SUCCESS,
    })
}

impl Args {
    /// The workload, if the model can bear it.
    fn workload(&self, model: &pb::GetModelResponse) -> anyhow::Result<Workload> {
        let input = Spread { length: self.input_len, ratio: self.input_range_ratio };
        let output = Spread { length: self.output_len, ratio: self.output_range_ratio };
        let (longest_input, longest_output) = (input.range().end().to_owned(), output.range().end().to_owned());
        let needed = u64::from(self.shared_prefix_len) + u64::from(longest_input) + u64::from(longest_output);
        if needed > u64::from(model.context_tokens) {
            bail!(
                "--shared-prefix-len {}, an input of up to {longest_input} and an output of up to {longest_output} are \
                 {needed} tokens; the context of {} holds {}",
                self.shared_prefix_len,
                model.name,
                model.context_tokens
            );
        }
        if model.vocab_size == 0 {
            bail!("{} has no vocabulary to draw tokens from", model.name);
        }
        Ok(Workload {
            seed: self.seed,
            vocab_size: model.vocab_size,
            requests: self.num_prompts,
            rate: self.request_rate,
            burstiness: self.burstiness,
            shared_prefix: self.shared_prefix_len,
            input,
            output,
        })
    }

    fn conditions(&self, model: String) -> Conditions {
        Conditions {
            model,
            endpoint: self.endpoint.clone(),
            num_prompts: self.num_prompts as usize,
            request_rate: self.request_rate,
            burstiness: self.burstiness,
            max_concurrency: self.max_concurrency,
            input_len: self.input_len,
            output_len: self.output_len,
            shared_prefix_len: self.shared_prefix_len,
            seed: self.seed,
        }
    }
}

fn number(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_| "must be a number".to_owned())
}

/// At least one request in eleven days: times must fit into what a clock can tell.
fn rate(text: &str) -> Result<f64, String> {
    let rate = number(text)?;
    if rate >= 1e-6 { Ok(rate) } else { Err("must be a positive number, or inf".to_owned()) }
}

fn burstiness(text: &str) -> Result<f64, String> {
    let shape = number(text)?;
    if (0.01..=1000.0).contains(&shape) { Ok(shape) } else { Err("must be in [0.01, 1000]".to_owned()) }
}

fn ratio(text: &str) -> Result<f64, String> {
    let ratio = number(text)?;
    if (0.0..1.0).contains(&ratio) { Ok(ratio) } else { Err("must be in [0, 1)".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<Args, clap::Error> {
        let words = ["serve"].into_iter().chain(line.split_whitespace());
        Command::try_parse_from(words).map(|command| command.args)
    }

    fn model(context_tokens: u32) -> pb::GetModelResponse {
        pb::GetModelResponse { name: "tiny".to_owned(), context_tokens, vocab_size: 160, ..Default::default() }
    }

    #[test]
    fn a_workload_fills_the_context_but_no_more() {
        let args = parse("--shared-prefix-len 100 --input-len 20 --input-range-ratio 0.5 --output-len 10").unwrap();
        assert!(args.workload(&model(140)).is_ok());
        let error = args.workload(&model(139)).unwrap_err().to_string();
        let expected = "--shared-prefix-len 100, an input of up to 30 and an output of up to 10 are 140 tokens; \
                        the context of tiny holds 139";
        assert_eq!(error, expected);
    }

    #[test]
    fn lengths_at_the_edge_of_a_number_are_refused_and_do_not_overflow() {
        let most = u32::MAX;
        let line = format!("--shared-prefix-len {most} --input-len {most} --input-range-ratio 0.9 --output-len {most}");
        assert!(parse(&line).unwrap().workload(&model(most)).is_err());
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for line in [
            "--request-rate 0",
            "--request-rate nan",
            "--request-rate -1",
            "--burstiness 0",
            "--input-range-ratio 1",
            "--output-len 0",
            "--num-prompts 0",
            "--max-concurrency 0",
            "--timeout 0",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
        assert_eq!(parse("--request-rate inf").unwrap().request_rate, f64::INFINITY);
        assert!(!parse("--ignore-eos false").unwrap().ignore_eos);
    }
}
