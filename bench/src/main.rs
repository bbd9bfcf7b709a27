//! `conclave-bench`: what to measure comes in on the command line, one readable table (or JSON) goes out. Every figure
//! stands beside its peer or its limit, measured in the same run on the same machine. Nothing is asserted here, and no
//! figure of an earlier run or another machine is ever compared.

mod dispatch;
mod echo;

mod cluster;
mod decode;
mod peer;

mod prompts;
mod serve;

mod checkpoint;
mod context;

mod stats;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "conclave-bench", about, version)]
struct Cli {
    #[command(subcommand)]
    what: What,
    /// Print one JSON object instead of tables.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// One dispatch–combine round trip against a raw TCP echo of the same bytes.
    Dispatch,
    /// Decode tokens/s of a local cluster and of transformers on one checkpoint.
    Decode(ModelArgs),
    /// Sixteen streams against one, and a prompt's prefix seen before against one seen first.
    Serve(ModelArgs),
    /// Time to the first token, time per token and the router's memory, by length of the context.
    Context(ModelArgs),
    /// All of these.
    All(ModelArgs),
    /// The far side of `dispatch`, in a process of its own.
    #[command(hide = true)]
    Echo,
}

#[derive(Debug, Args)]
struct ModelArgs {
    /// Checkpoint folder.
    #[arg(long, value_name = "DIR", default_value = "models/smollm2/build/smollm2-moe")]
    model: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let machine = Machine::now();
    let mut reports = Reports::default();
    match &cli.what {
        What::Echo => return echo::serve().await,
        What::Dispatch => reports.dispatch = Some(dispatch::measure().await?),
        What::Decode(args) => reports.decode = Some(decode::measure(&args.model).await?),
        What::Serve(args) => reports.serve = Some(serve::measure(&args.model).await?),
        What::Context(args) => reports.context = Some(context::measure(&args.model).await?),
        What::All(args) => {
            reports.dispatch = Some(dispatch::measure().await?);
            reports.decode = Some(decode::measure(&args.model).await?);
            reports.serve = Some(serve::measure(&args.model).await?);
            reports.context = Some(context::measure(&args.model).await?);
        }
    }
    print(cli.json, &machine, &reports)?;
    Ok(())
}

/// What was measured.
#[derive(Debug, Default)]
struct Reports {
    dispatch: Option<dispatch::Report>,
    decode: Option<decode::Report>,
    serve: Option<serve::Report>,
    context: Option<context::Report>,
}

/// What else the machine did when the run began: a reader must know before believing a ratio.
struct Machine {
    cores: usize,
    /// Runnable tasks over the last minute; absent where the kernel does not say.
    load: Option<f64>,
}

impl Machine {
    fn now() -> Self {
        let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load = text.split_whitespace().next().and_then(|first| first.parse().ok());
        Self { cores: std::thread::available_parallelism().map_or(1, usize::from), load }
    }

    fn is_busy(&self) -> bool {
        self.load.is_some_and(|load| load > 0.5 * self.cores as f64)
    }
}

fn print(json: bool, machine: &Machine, reports: &Reports) -> std::io::Result<()> {
    let Reports { dispatch, decode, serve, context } = reports;
    let mut out = std::io::stdout().lock();
    if json {
        let report = serde_json::json!({
            "cores": machine.cores,
            "load_before": machine.load,
            "dispatch": dispatch.as_ref().map(dispatch::Report::to_json),
            "decode": decode.as_ref().map(decode::Report::to_json),
            "serve": serve.as_ref().map(serve::Report::to_json),
            "context": context.as_ref().map(context::Report::to_json),
        });
        return writeln!(out, "{report:#}");
    }
    let tables = [
        dispatch.as_ref().map(ToString::to_string),
        decode.as_ref().map(ToString::to_string),
        serve.as_ref().map(ToString::to_string),
        context.as_ref().map(ToString::to_string),
    ];
    writeln!(out, "{}", tables.into_iter().flatten().collect::<Vec<_>>().join("\n"))?;
    if machine.is_busy() {
        let (load, cores) = (machine.load.unwrap_or_default(), machine.cores);
        writeln!(
            out,
            "This machine was busy when the run began (load {load:.1} on {cores} cores): take the ratios as rough."
        )?;
        writeln!(out, "Who spins while waiting, as transformers' OpenMP threads do, suffers most.")?;
    }
    Ok(())
}
