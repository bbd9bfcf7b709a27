//! `conclave placement lint`: what is wrong, or merely odd, with the plan in force or with one in a file. Nothing is
//! changed; the exit status is 1 where there is a mistake.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use conclave_placement::lint::{self, Note, Severity};
use conclave_placement::planner;
use conclave_placement::policy::{self, Planner, Policy, Rebalancing};
use conclave_placement::{ClusterState, Plan};

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
    /// Workers that should at least hold each expert [default: what the leading router wants]
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1024))]
    replicas: Option<u32>,
    /// Further copies per layer [default: what the leading router allows]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=65536))]
    redundant_experts: Option<u32>,
}

impl Wanted {
    /// What the leading router plans by, but for what was asked for.
    pub(super) fn policy(&self, state: &ClusterState) -> anyhow::Result<Policy> {
        let mut policy = match (state.policy(), self.replicas) {
            (Some(policy), _) => policy,
            (None, Some(replicas)) => Policy { replicas, ..UNTOLD },
            (None, None) => bail!("no router tells how many replicas are wanted: say --replicas"),
        };
        policy.replicas = self.replicas.unwrap_or(policy.replicas);
        policy.redundant = self.redundant_experts.or(policy.redundant);
        Ok(policy)
    }
}

/// Where no router lives: what a router has that was told nothing.
const UNTOLD: Policy = Policy {
    planner: Planner::Balanced,
    replicas: 1,
    redundant: None,
    min_workers: 1,
    rebalance: Rebalancing { period: Duration::from_secs(60), below: 0.5, gain: 0.05 },
};

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
    let load = policy::known_load(state);
    let problem = wanted.policy(state)?.problem(model, &workers, load.as_ref(), false);
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
