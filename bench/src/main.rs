//! `conclave-bench`: what to measure comes in on the command line, one readable table (or JSON) goes out. Every figure
//! stands beside its peer or its limit, measured in the same run on the same machine. Nothing is asserted here, and no
//! figure of an earlier run or another machine is ever compared.

mod dispatch;
mod echo;

mod cluster;
mod decode;
mod peer;

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
    Decode(DecodeArgs),
    /// Both.
    All(DecodeArgs),
    /// The far side of `dispatch`, in a process of its own.
    #[command(hide = true)]
    Echo,
}

#[derive(Debug, Args)]
struct DecodeArgs {
    /// Checkpoint folder.
    #[arg(long, value_name = "DIR", default_value = "models/smollm2/build/smollm2-moe")]
    model: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let machine = Machine::now();
    let (dispatch, decode) = match &cli.what {
        What::Echo => return echo::serve().await,
        What::Dispatch => (Some(dispatch::measure().await?), None),
        What::Decode(args) => (None, Some(decode::measure(&args.model).await?)),
        What::All(args) => (Some(dispatch::measure().await?), Some(decode::measure(&args.model).await?)),
    };
    print(cli.json, &machine, dispatch.as_ref(), decode.as_ref())?;
    Ok(())
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

fn print(
    json: bool,
    machine: &Machine,
    dispatch: Option<&dispatch::Report>,
    decode: Option<&decode::Report>,
) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        let report = serde_json::json!({
            "cores": machine.cores,
            "load_before": machine.load,
            "dispatch": dispatch.map(dispatch::Report::to_json),
            "decode": decode.map(decode::Report::to_json),
        });
        return writeln!(out, "{report:#}");
    }
    let tables = [dispatch.map(ToString::to_string), decode.map(ToString::to_string)];
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
