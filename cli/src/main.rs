//! The `conclave` command: a command line comes in, one of the modules below does it, an exit status goes out. Errors
//! are one line on stderr. Nothing is computed and no request is served in this process.

mod bench;
mod chat;
mod client;
mod generate;
mod inspect;
mod placement;
mod terminal;
mod up;

use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serve and use mixture-of-experts models on a cluster of ordinary processes.
#[derive(Debug, Parser)]
#[command(
    name = "conclave",
    version,
    after_help = "Examples:
  conclave up --model DIR --workers 4
  conclave generate --chat 'What is the capital of France?'
  conclave bench serve --num-prompts 64 --max-concurrency 16
  conclave checkpoint inspect DIR --workers 4"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(Box<up::Args>),
    Generate(generate::Args),
    Chat(chat::Args),
    /// Measure a running cluster.
    #[command(subcommand)]
    Bench(Bench),
    /// Look at what is placed where, plan it, move it.
    #[command(subcommand)]
    Placement(placement::Command),
    /// Look at a model folder.
    #[command(subcommand)]
    Checkpoint(Checkpoint),
}

#[derive(Debug, Subcommand)]
enum Bench {
    Serve(bench::Args),
}

#[derive(Debug, Subcommand)]
enum Checkpoint {
    Inspect(inspect::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&error.into()),
    };
    // The future runs on this thread, which lives as long as the process: `up` starts children from it.
    let outcome = runtime.block_on(run(cli.command));
    // A thread that still reads a checkpoint or stdin shall not hold the exit.
    runtime.shutdown_background();
    outcome.unwrap_or_else(|error| report(&error))
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(args) => up::run(*args).await,
        Command::Generate(args) => generate::run(args).await,
        Command::Chat(args) => chat::run(args).await,
        Command::Bench(Bench::Serve(args)) => bench::serve(args).await,
        Command::Placement(command) => placement::run(command).await,
        Command::Checkpoint(Checkpoint::Inspect(args)) => inspect::run(&args),
    }
}

/// One line with all causes. A reader that went away (`conclave … | head`) is no failure worth a word.
fn report(error: &anyhow::Error) -> ExitCode {
    let broken_pipe =
        |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<io::Error>().is_some_and(is_broken_pipe);
    if error.chain().any(broken_pipe) {
        return ExitCode::SUCCESS;
    }
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    terminal::warn(&format!("error: {}", chained(&causes)));
    ExitCode::FAILURE
}

/// All causes, outermost first, less those that an outer one already quotes.
fn chained(causes: &[String]) -> String {
    let mut line = String::new();
    for cause in causes {
        if line.is_empty() {
            line.push_str(cause);
        } else if !line.contains(cause.as_str()) {
            line.push_str(&format!(": {cause}"));
        }
    }
    line
}

fn is_broken_pipe(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let causes = ["cannot start", "config.json: no such file", "no such file"].map(str::to_owned);
        assert_eq!(chained(&causes), "cannot start: config.json: no such file");
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_lines_parse() {
        for line in [
            "conclave up --model DIR --workers 4 --routers 2 --listen 127.0.0.1:7400 --dtype f32 --numerics fast \
             --store embedded --replicas 2 --combine partial-sum --ready-file F --cluster c --threads 1 --log-format json",
            "conclave up --model DIR --workers 1 --store etcd=http://127.0.0.1:2379 --verbose",
            "conclave generate --endpoint 127.0.0.1:7400 --chat --logprobs=2 --timings --json hello",
            "conclave generate -",
            "conclave chat --endpoint http://127.0.0.1:7400",
            "conclave bench serve --num-prompts 100 --request-rate 2",
            "conclave bench serve --endpoint 127.0.0.1:7400 --num-prompts 9 --request-rate inf --burstiness 0.5 --seed 1 \
             --max-concurrency 4 --input-len 50 --input-range-ratio 0.2 --output-len 8 --output-range-ratio 0.5 \
             --shared-prefix-len 1000 --temperature 1 --ignore-eos false --timeout 60 --warmup 1 --json",
            "conclave placement show --ready-file F --rows --json",
            "conclave placement show --store etcd=http://127.0.0.1:2379 --cluster c",
            "conclave placement plan --ready-file F --replicas 2 --redundant-experts 4 --planner eplb --gain 0.1 --out P",
            "conclave placement lint P --replicas 2 --cluster c",
            "conclave placement apply P --author me --ready-file F",
            "conclave placement history --version 3",
            "conclave placement drain worker-3 --timeout 60",
            "conclave checkpoint inspect DIR --workers 4 --json",
        ] {
            let parsed = Cli::try_parse_from(line.split_whitespace());
            assert!(parsed.is_ok(), "{line}: {}", parsed.unwrap_err());
        }
        for line in [
            "conclave up --model DIR",
            "conclave up --model DIR --workers 0",
            "conclave up --model DIR --workers 1 --dtype f64",
            "conclave placement show --ready-file F --store etcd=http://127.0.0.1:2379",
        ] {
            assert!(Cli::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
