//! `conclave placement apply FILE`: a plan from a file becomes the target, if it has no mistakes and follows what is in
//! force. It is written by compare-and-swap, as the controller writes its own.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::ensure;
use conclave_placement::publication::publish;

use super::file::PlanFile;
use super::lint::{self, Wanted};
use super::place::{Found, Where};
use crate::terminal;

/// Make the plan in a file the target.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  conclave placement plan --out plan.json && conclave placement apply plan.json")]
pub(crate) struct Args {
    /// What `plan --out` or `history --version` wrote, perhaps edited.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    wanted: Wanted,
    /// Who does it, for the history.
    #[arg(long, value_name = "NAME", default_value = "conclave placement apply")]
    author: String,
}

pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Found { store, keys, state, .. } = args.place.find().await?;
    let mut plan = PlanFile::read(&args.file)?;
    if let Some(current) = &state.plan {
        ensure!(
            plan.parent == current.version || plan.version <= current.version,
            "{} follows plan {}, and plan {} is in force",
            args.file.display(),
            plan.parent,
            current.version
        );
        // A past plan may come back: as a new one.
        if plan.version <= current.version {
            (plan.parent, plan.version) = (current.version, conclave_placement::PlanVersion(current.version.0 + 1));
        }
    }
    let notes = lint::notes(&plan, &state, &args.wanted)?;
    lint::print(&notes);
    ensure!(!lint::is_mistaken(&notes), "{} has mistakes and was not applied", args.file.display());
    publish(&*store, &keys, &plan, &args.author).await?;
    terminal::warn(&format!("plan {} is the target", plan.version));
    Ok(ExitCode::SUCCESS)
}
