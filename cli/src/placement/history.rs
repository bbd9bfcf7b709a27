//! `conclave placement history`: the plans that were in force, as the store remembers them: when, by whom and why. One of
//! them can be printed whole, to be applied again. Nothing is changed.

use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use conclave_placement::plan::PastPlan;
use conclave_placement::{PlanVersion, publication};
use serde::Serialize;

use super::file::PlanFile;
use super::place::{Found, Where};
use crate::terminal::{self, Output};

/// The plans that were in force.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave placement history
  conclave placement history --version 7 > plan-7.json")]
pub(crate) struct Args {
    #[command(flatten)]
    place: Where,
    /// Print that plan whole, as `apply` reads it.
    #[arg(long, value_name = "N")]
    version: Option<u64>,
    /// One JSON object a plan, newest last.
    #[arg(long, conflicts_with = "version")]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Found { store, keys, state, .. } = args.place.find().await?;
    let past = publication::history(&*store, &keys).await?;
    let mut output = Output::stdout();
    if let Some(version) = args.version {
        let wanted = past.iter().find(|past| past.plan.version == PlanVersion(version));
        let wanted = wanted.with_context(|| format!("the store does not remember plan {version}"))?;
        output.line(&serde_json::to_string_pretty(&PlanFile::of(&wanted.plan))?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let current = state.plan.as_ref().map(|plan| plan.version);
    let entries = entries(&past, current);
    if args.json {
        for entry in &entries {
            output.line(&serde_json::to_string(entry)?)?;
        }
    } else {
        output.text(&table(&entries, SystemTime::now()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is printed of one plan; the keys are a contract with scripts.
#[derive(Debug, Serialize)]
struct EntryReport {
    version: u64,
    parent: u64,
    author: String,
    written_unix_ms: u64,
    policy: String,
    reason: String,
    /// Copies that came and went against the plan before, where that is remembered.
    #[serde(skip_serializing_if = "Option::is_none")]
    added: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<usize>,
    in_force: bool,
}

fn entries(past: &[PastPlan], current: Option<PlanVersion>) -> Vec<EntryReport> {
    let report = |past_plan: &PastPlan| {
        let plan = &past_plan.plan;
        let parent = past.iter().map(|past| &past.plan).find(|other| other.version == plan.parent);
        let moves = (parent.is_some() || plan.parent == PlanVersion::NONE).then(|| plan.moves_from(parent));
        EntryReport {
            version: plan.version.0,
            parent: plan.parent.0,
            author: past_plan.author.clone(),
            written_unix_ms: past_plan.written_unix_ms,
            policy: plan.policy.clone(),
            reason: plan.reason.clone(),
            added: moves.as_ref().map(|moves| moves.iter().map(|worker| worker.added.len()).sum()),
            removed: moves.as_ref().map(|moves| moves.iter().map(|worker| worker.removed.len()).sum()),
            in_force: current == Some(plan.version),
        }
    };
    past.iter().map(report).collect()
}

fn table(entries: &[EntryReport], now: SystemTime) -> String {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    let mut rows = vec![["PLAN", "AGE", "AUTHOR", "POLICY", "ADDED", "REMOVED", "REASON"].map(str::to_owned).to_vec()];
    for entry in entries {
        let count = |count: Option<usize>| count.map_or_else(|| "?".to_owned(), |count| count.to_string());
        let mark = if entry.in_force { " *" } else { "" };
        rows.push(vec![
            format!("{}{mark}", entry.version),
            age(now.saturating_sub(entry.written_unix_ms.into())),
            entry.author.clone(),
            entry.policy.clone(),
            count(entry.added),
            count(entry.removed),
            entry.reason.clone(),
        ]);
    }
    terminal::table(&rows)
}

/// "45s", "12m", "5h" or "3d".
fn age(milliseconds: u128) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::up::ready::tests::state;

    #[test]
    fn the_table_says_when_and_why_and_how_much_moved() {
        let first = state(2, &[&[0], &[1], &[0, 1]]).plan.as_deref().unwrap().clone();
        let mut second = state(2, &[&[0, 1], &[1], &[1]]).plan.as_deref().unwrap().clone();
        (second.version, second.parent, second.reason) = (PlanVersion(2), PlanVersion(1), "w left".to_owned());
        let past = [(first, 1_000), (second, 400_000)].map(|(plan, written_unix_ms)| PastPlan {
            plan,
            author: "router-0".to_owned(),
            written_unix_ms,
        });
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(445);
        let expected = "\
PLAN  AGE  AUTHOR    POLICY  ADDED  REMOVED  REASON
1     7m   router-0  test    4      0        test
2 *   45s  router-0  test    1      1        w left
";
        assert_eq!(table(&entries(&past, Some(PlanVersion(2))), now), expected);
        assert_eq!(entries(&past[1..], None)[0].added, None, "its parent is not remembered");
    }
}
