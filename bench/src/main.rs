//! `conclave-bench`: what to measure comes in on the command line, one readable table (or JSON) goes out. Every figure
//! stands beside its peer or its limit, measured in the same run on the same machine. Nothing is asserted here, and no
//! figure of an earlier run or another machine is ever compared.

mod dispatch;
mod echo;

mod cluster;
mod decode;
mod peer;

mod stats;

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
    #[arg(long, value_name = "DIR", default_value = "models/smollm2/build")]
    model: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.what {
        What::Dispatch => print(cli.json, Some(&dispatch::measure().await?), None),
        What::Decode(args) => print(cli.json, None, Some(&decode::measure(&args.model).await?)),
        What::All(args) => {
            let dispatch = dispatch::measure().await?;
            print(cli.json, Some(&dispatch), Some(&decode::measure(&args.model).await?));
        }
        What::Echo => echo::serve().await?,
    }
    Ok(())
}

fn print(json: bool, dispatch: Option<&dispatch::Report>, decode: Option<&decode::Report>) {
    if json {
        let dispatch = dispatch.map(dispatch::Report::to_json);
        println!("{:#}", serde_json::json!({ "dispatch": dispatch, "decode": decode.map(decode::Report::to_json) }));
        return;
    }
    let tables = [dispatch.map(ToString::to_string), decode.map(ToString::to_string)];
    println!("{}", tables.into_iter().flatten().collect::<Vec<_>>().join("\n"));
}
