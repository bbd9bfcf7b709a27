//! `conclave placement apply FILE`: a plan from a file becomes the target, if it has no mistakes and follows what is in
//! force. It is written by compare-and-swap, as the controller writes its own.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use conclave_placement::PlanVersion;
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
    let current = state.plan.as_ref().map_or(PlanVersion::NONE, |current| current.version);
    ensure!(
        plan.parent == current || plan.version <= current || current == PlanVersion::NONE,
        "{} follows plan {}, and plan {current} is in force",
        args.file.display(),
        plan.parent,
    );
    // A past plan may come back: as a new one. Where the store has lost the plan, the next is no older than what came back.
    let next = if current == PlanVersion::NONE { plan.version.0.checked_sub(1) } else { Some(current.0) };
    let next = next.and_then(|version| version.checked_add(1)).context("its version is not one that can follow")?;
    (plan.parent, plan.version) = (current, PlanVersion(next));
    let notes = lint::notes(&plan, &state, &args.wanted)?;
    lint::print(&notes);
    ensure!(!lint::is_mistaken(&notes), "{} has mistakes and was not applied", args.file.display());
    publish(&*store, &keys, &plan, &args.author, None).await?;
    terminal::warn(&format!("plan {} is the target", plan.version));
    Ok(ExitCode::SUCCESS)
}
