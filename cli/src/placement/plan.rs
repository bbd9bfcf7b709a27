//! `conclave placement plan`: the plan that should follow the one in force, what it would move and what that is worth. It
//! is only shown, or written to a file; `apply` makes it the target.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use conclave_placement::load::balancedness;
use conclave_placement::plan::Move;
use conclave_placement::planner::{self, Problem};
use conclave_placement::policy::{self, Linted, Planner, Policy};
use conclave_placement::{ClusterState, Plan};
use conclave_runtime::config;

use super::file::PlanFile;
use super::lint::{self, Wanted};
use super::place::{Found, Where};
use crate::terminal::{self, Output};

/// Which plan should follow.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave placement plan
  conclave placement plan --replicas 2 --out plan.json
  conclave placement plan --planner eplb --json")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Where,
    #[command(flatten)]
    wanted: Wanted,
    /// Who plans [default: who plans for the leading router]
    #[arg(long, value_enum)]
    planner: Option<PlannerName>,
    /// For eplb: how many groups of experts the gate chooses between, for nodes to be balanced first [default: as the
    /// leading router says, or 1, its global policy]
    #[arg(long, value_name = "G")]
    groups: Option<usize>,
    /// What balancedness must gain for experts to move that need not; 1 moves none [default: what the leading router asks]
    #[arg(long, value_name = "RATIO", value_parser = config::ratio)]
    gain: Option<f64>,
    /// Write the plan there, as `apply` reads it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print the plan itself, as `apply` reads it.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PlannerName {
    /// Conclave's own: load and capacity, as few moves as the gain is worth.
    Balanced,
    /// DeepSeek's expert-parallel load balancer: from the load alone, for equal workers.
    Eplb,
}

impl Args {
    /// The policy in force, but for what was asked for.
    fn policy(&self, state: &ClusterState) -> anyhow::Result<Policy> {
        let mut policy = self.wanted.policy(state)?;
        let told = if let Planner::Eplb { groups } = policy.planner { Some(groups) } else { None };
        match self.planner {
            Some(PlannerName::Balanced) => policy.planner = Planner::Balanced,
            Some(PlannerName::Eplb) => policy.planner = Planner::Eplb { groups: self.groups.or(told).unwrap_or(1) },
            None => {}
        }
        policy.rebalance.gain = self.gain.unwrap_or(policy.rebalance.gain);
        Ok(policy)
    }
}

pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Found { state, .. } = args.place.find().await?;
    let model = state.model.as_ref().context("the cluster has no model so far")?;
    let (policy, load, workers) = (args.policy(&state)?, policy::known_load(&state), planner::candidates(&state));
    // What the leading router would do at its next look.
    let linted = policy.due(&state, load.as_ref(), true)?;
    let problem = policy.problem(model, &workers, load.as_ref(), true);
    let Some(Linted { plan, notes }) = linted else {
        terminal::warn("the plan in force is as good as any");
        return Ok(ExitCode::SUCCESS);
    };
    let text = serde_json::to_string_pretty(&PlanFile::of(&plan))?;
    if let Some(out) = &args.out {
        std::fs::write(out, format!("{text}\n")).with_context(|| format!("cannot write {}", out.display()))?;
    }
    let mut output = Output::stdout();
    if args.json {
        output.line(&text)?;
    } else {
        output.text(&summary(&plan, &state, &problem))?;
    }
    lint::print(&notes);
    Ok(ExitCode::SUCCESS)
}

/// Why, what moves, and what it is worth.
fn summary(plan: &Plan, state: &ClusterState, problem: &Problem<'_>) -> String {
    let mut text = format!("plan {} ({}: {})\n", plan.version, plan.policy, plan.reason);
    let balance = |plan: &Plan| problem.load.and_then(|load| balancedness(plan, load, problem.workers));
    if let (Some(before), Some(after)) = (state.plan.as_deref().and_then(balance), balance(plan)) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "balancedness {before:.3}, {after:.3} after it");
    }
    let mut rows = vec![["WORKER", "GETS", "GIVES UP", "HOLDS THEN"].map(str::to_owned).to_vec()];
    for Move { worker, added, removed } in plan.moves_from(state.plan.as_deref()) {
        let holds = plan.assigned_to(&worker).len();
        rows.push(vec![worker.to_string(), added.len().to_string(), removed.len().to_string(), holds.to_string()]);
    }
    text.push('\n');
    text.push_str(&terminal::table(&rows));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::up::ready::tests::state;

    #[test]
    fn a_summary_says_what_moves() {
        let (now, then) = (state(2, &[&[0], &[1], &[0, 1]]), state(2, &[&[0, 1], &[1], &[1]]));
        let workers = planner::candidates(&now);
        let model = now.model.as_ref().unwrap();
        let problem = Problem {
            model,
            workers: &workers,
            replicas: 1,
            redundant: 0,
            load: None,
            rebalance: planner::Rebalance::No,
        };
        let expected = "\
plan 1 (test: test)

WORKER    GETS  GIVES UP  HOLDS THEN
worker-0  0     1         1
worker-1  1     0         3
";
        assert_eq!(summary(then.plan.as_deref().unwrap(), &now, &problem), expected);
    }
}
