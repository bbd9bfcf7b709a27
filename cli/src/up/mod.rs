//! `conclave up`: a model folder and numbers come in, a running local cluster of real processes goes out, and ends with
//! this process, however that ends. Everything the children know of each other goes through the store, as in
//! production. No child is restarted, and no request passes through here.

mod children;
mod local;
mod progress;
pub(crate) mod ready;

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use conclave_model::device::{Device, Dtype, Numerics};
use conclave_placement::Cluster;
use conclave_runtime::telemetry::LogFormat;
use tokio::signal::unix::{Signal, SignalKind, signal};

use local::Local;

/// What a shell says of a process that SIGINT ended.
pub(crate) const INTERRUPTED: u8 = 130;

/// Start a whole cluster on this machine: routers, expert workers and, unless etcd is given, a store.
///
/// Exit status: 0 after Ctrl-C or SIGTERM once everything served, 130 when that came during start-up, 1 when a process
/// died during start-up or no router was left. A second Ctrl-C kills at once.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave up --model models/smollm2/build/smollm2-moe --workers 4
  conclave up --model DIR --workers 3 --replicas 2 --ready-file /tmp/ready.json
  conclave up --model DIR --workers 2 --device cuda:0
  conclave up --model DIR --workers 2 --routers 2 --store etcd=http://127.0.0.1:2379")]
pub(crate) struct Args {
    /// The checkpoint folder.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Expert workers to start.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// Routers to start.
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    routers: u16,
    /// Public address of the first router; further ones take free ports.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    listen: String,
    /// Where to compute: cpu or cuda:N. Of several, separated by commas, workers take one each in turn, routers the first.
    /// By default what the processes choose.
    #[arg(long, value_name = "DEVICE", value_delimiter = ',')]
    device: Vec<Device>,
    /// f32 or bf16; by default what the processes choose.
    #[arg(long, value_name = "f32|bf16")]
    dtype: Option<Dtype>,
    /// reproducible: a token's bits depend on neither batch nor placement; or fast. By default what the processes choose.
    #[arg(long, value_name = "fast|reproducible")]
    numerics: Option<Numerics>,
    /// `embedded` serves one from this process; `etcd=URL` uses a running etcd.
    #[arg(long, value_name = "STORE", default_value = local::EMBEDDED)]
    store: String,
    /// Copies of each expert, as far as there are workers.
    #[arg(long, value_name = "R", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    replicas: u16,
    /// How experts' outputs come back: one row per assignment, or one weighted sum per row and worker.
    #[arg(long, value_name = "MODE", value_parser = PossibleValuesParser::new(["per-assignment", "partial-sum"]))]
    combine: Option<String>,
    /// Write addresses and pids here as JSON once everything serves; removed at the end.
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Name within the store; a name made up here is wiped from it at the end, one given is not.
    #[arg(long, value_name = "NAME")]
    cluster: Option<Cluster>,
    /// Compute threads of each process; by default as many as there are cores.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// How the processes' log lines look.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Show all log lines, not only warnings and errors.
    #[arg(long, short)]
    verbose: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut interrupts = Interrupts::install()?;
    let mut local = tokio::select! {
        local = Local::prepare(args) => local?,
        _ = interrupts.next() => return Ok(ExitCode::from(INTERRUPTED)),
    };
    let outcome = local.live(&mut interrupts).await;
    tokio::select! {
        () = local.stop() => {}
        _ = interrupts.next() => local.kill().await,
    }
    local.clean_up().await;
    outcome
}

/// The signals that end `up`.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Interrupts {
    fn install() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next one's name.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
        }
    }
}
