//! `conclave placement lint`: what is wrong, or merely odd, with the plan in force or with one in a file. Nothing is
//! changed; the exit status is 1 where there is a mistake.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use conclave_placement::lint::{self, Note, Severity};
use conclave_placement::planner::{self, PlannerWorker, Problem, Rebalance};
use conclave_placement::{ClusterState, ModelIdentity, Plan};

use super::file::PlanFile;
use super::place::{Found, Where};
use crate::terminal;

/// What is wrong with a plan.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave placement lint
  conclave placement lint plan.json --replicas 2")]
pub(crate) struct Args {
    /// A plan as `plan --out` writes it; without it, the one in force.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    wanted: Wanted,
}

/// What a plan should give; routers have flags of the same names.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(super) struct Wanted {
    /// Workers that should at least hold each expert; without it, as many as now hold the expert that fewest hold.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1024))]
    replicas: Option<u32>,
    /// Further copies per layer; without it, an eighth of a layer's experts.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=65536))]
    redundant_experts: Option<u32>,
}

impl Wanted {
    /// The problem that a plan for `state` should solve.
    pub(super) fn problem<'a>(
        &self,
        (model, state): (&'a ModelIdentity, &'a ClusterState),
        workers: &'a [PlannerWorker],
        load: Option<&'a conclave_placement::Load>,
        rebalance: Rebalance,
    ) -> Problem<'a> {
        let fewest = state.plan.as_deref().and_then(|plan| plan.iter().map(|(.., holders)| holders.len()).min());
        let replicas = self.replicas.unwrap_or(fewest.unwrap_or(1).max(1) as u32);
        let redundant = self.redundant_experts.unwrap_or_else(|| planner::redundant_by_default(model));
        Problem { model, workers, replicas, redundant, load, rebalance }
    }
}

pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Found { state, .. } = args.place.find().await?;
    let plan = match &args.file {
        Some(file) => PlanFile::read(file)?,
        None => state.plan.as_deref().context("there is no plan in force")?.clone(),
    };
    let notes = notes(&plan, &state, &args.wanted)?;
    print(&notes);
    if notes.is_empty() {
        terminal::warn(&format!("plan {} is as it should be", plan.version));
    }
    Ok(if is_mistaken(&notes) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// All that can be said against `plan` in the cluster as it is.
pub(super) fn notes(plan: &Plan, state: &ClusterState, wanted: &Wanted) -> anyhow::Result<Vec<Note>> {
    let model = state.model.as_ref().context("the cluster has no model so far")?;
    let workers = planner::candidates(state);
    let load = state.load();
    let problem = wanted.problem((model, state), &workers, Some(&load), Rebalance::No);
    // What it follows matters only where it would follow what is in force.
    let previous = state.plan.as_deref().filter(|current| current.version == plan.parent);
    Ok(lint::lint(plan, &problem, previous))
}

pub(super) fn is_mistaken(notes: &[Note]) -> bool {
    notes.iter().any(|note| note.severity == Severity::Error)
}

/// A line each, the worst first.
pub(super) fn print(notes: &[Note]) {
    for note in notes {
        let severity = match note.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
            Severity::Advice => "advice",
        };
        terminal::warn(&format!("{severity}: {note}"));
    }
}
