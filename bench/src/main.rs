//! `conclave-bench`: what to measure comes in on the command line, one readable table (or JSON) goes out. Every figure
//! stands beside its peer or its limit, measured in the same run on the same machine. Nothing is asserted here, and no
//! figure of an earlier run or another machine is ever compared.

mod dispatch;
mod echo;

mod bandwidth;
mod expert;

mod cluster;
mod decode;
mod gpu;
mod peer;

mod prompts;
mod serve;
mod overload;
mod phases;

mod checkpoint;
mod context;

mod memory;
mod start;

mod ceiling;
mod fakes;

mod machine;
mod results;
mod stats;

use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};
use conclave_model::device::Device;
use serde_json::{Value, json};

use machine::Machine;
use results::Section;

#[derive(Debug, Parser)]
#[command(name = "conclave-bench", about, version)]
struct Cli {
    #[command(subcommand)]
    what: What,
    /// Checkpoint folder, for what is measured on one of the user's.
    #[arg(long, global = true, value_name = "DIR", default_value = "models/smollm2/build/smollm2-moe")]
    model: PathBuf,
    /// Print one JSON object instead of tables.
    #[arg(long, global = true)]
    json: bool,
    /// Write the tables into this page of Markdown too, in place of what it held.
    #[arg(long, global = true, value_name = "FILE")]
    write: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    #[command(flatten)]
    One(Mode),
    /// All of these.
    All,
    /// The far side of `dispatch`, in a process of its own.
    #[command(hide = true)]
    Echo,
    /// The workers of `ceiling`, in a process of their own.
    #[command(hide = true)]
    Fakes { count: usize },
}

/// Everything that can be measured, in the order of the page.
#[derive(Debug, Clone, Copy, Subcommand)]
enum Mode {
    /// One dispatch–combine round trip against a raw TCP echo of the same bytes.
    Dispatch,
    /// One expert by rows, bf16 and FP8, against memory bandwidth and libtorch.
    Expert,
    /// Decode and prefill of a local cluster, of llama.cpp and of transformers, on the same checkpoints.
    Decode,
    /// A layer's experts and a local cluster on a GPU, where there is one.
    Gpu,
    /// Sixteen streams against one, and a prompt's prefix seen before against one seen first.
    Serve,
    /// Answers within their deadlines at half to ten times the load that a cluster can carry.
    Overload,
    /// Time to the first token, time per token and the router's memory, by length of the context.
    Context,
    /// From a worker's start to its first answer, and the memory of workers.
    Start,
    /// Rows a second that one router can send and have back, by workers.
    Ceiling,
    /// Where a decode step's time goes, by phase.
    Phases,
}

const ALL: [Mode; 10] = [
    Mode::Dispatch,
    Mode::Expert,
    Mode::Decode,
    Mode::Gpu,
    Mode::Serve,
    Mode::Overload,
    Mode::Context,
    Mode::Start,
    Mode::Ceiling,
    Mode::Phases,
];

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let modes = match cli.what {
        What::Echo => return echo::serve().await,
        What::Fakes { count } => return fakes::serve(count).await,
        What::One(mode) => vec![mode],
        What::All => ALL.to_vec(),
    };
    let machine = Machine::now();
    // A table is told as soon as it is measured: all of them take long, and who stops before the end keeps what there is.
    let tell = |text: &dyn fmt::Display| if cli.json { Ok(()) } else { writeln!(std::io::stdout(), "{text}") };
    tell(&machine)?;
    let mut sections = Vec::new();
    for mode in &modes {
        let measured = mode.measure(&cli.model).await;
        // Of several, one that fails is told and does not take the others with it.
        let section = if modes.len() == 1 { measured? } else { measured.unwrap_or_else(|error| mode.missing(&error)) };
        tell(&format_args!("\n{}", section.text.trim_end()))?;
        sections.push(section);
    }
    if let Some(warning) = machine.warning() {
        tell(&format_args!("\n{warning}"))?;
    }
    if cli.json {
        std::io::stdout().write_all(results::as_json(&machine, &sections).as_bytes())?;
    }
    cli.write.map_or(Ok(()), |file| results::write(&file, &machine, &sections))
}

impl Mode {
    async fn measure(self, model: &Path) -> anyhow::Result<Section> {
        Ok(match self {
            Self::Dispatch => {
                let report = dispatch::measure().await?;
                self.section(&report, report.to_json())
            }
            Self::Expert => {
                let report = expert::measure().await?;
                self.section(&report, report.to_json())
            }
            Self::Start => {
                let report = start::measure(model).await?;
                self.section(&report, report.to_json())
            }
            Self::Ceiling => {
                let report = ceiling::measure().await?;
                self.section(&report, report.to_json())
            }
            Self::Phases => {
                let report = phases::measure(model).await?;
                self.section(&report, report.to_json())
            }
            Self::Decode => {
                let report = decode::measure(Device::Cpu, Some(model)).await?;
                self.section(&report, report.to_json())
            }
            Self::Gpu => {
                let report = gpu::measure().await?;
                self.section(&report, report.to_json())
            }
            Self::Serve => {
                let report = serve::measure(model).await?;
                self.section(&report, report.to_json())
            }
            Self::Overload => {
                let report = overload::measure(model).await?;
                self.section(&report, report.to_json())
            }
            Self::Context => {
                let report = context::measure(model).await?;
                self.section(&report, report.to_json())
            }
        })
    }

    /// Its subcommand, and what its section is called.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Dispatch => ("dispatch", "Dispatch and combine against raw TCP"),
            Self::Expert => ("expert", "One expert against memory bandwidth and libtorch"),
            Self::Start => ("start", "Start and memory of workers"),
            Self::Ceiling => ("ceiling", "The ceiling of one router"),
            Self::Phases => ("phases", "A decode step by phase"),
            Self::Decode => ("decode", "A whole cluster against llama.cpp and transformers"),
            Self::Gpu => ("gpu", "On a GPU: a layer's experts, and a whole cluster beside transformers"),
            Self::Serve => ("serve", "Batching and the prefix cache"),
            Self::Overload => ("overload", "Goodput under overload"),
            Self::Context => ("context", "By length of the context"),
        }
    }

    fn section(self, report: &impl fmt::Display, json: Value) -> Section {
        let (name, title) = self.names();
        Section { name, title, text: report.to_string(), json }
    }

    fn missing(self, error: &anyhow::Error) -> Section {
        let (name, title) = self.names();
        eprintln!("{name}: {error:#}");
        Section {
            name,
            title,
            text: format!("{title}: could not be measured: {error:#}\n"),
            json: json!({ "missing": format!("{error:#}") }),
        }
    }
}
