//! Why a plan was made, in one line for people.
//!
//! In: the problem, the previous plan and the next. Out: a sentence. Never here: a decision.

use std::collections::BTreeSet;

use crate::ids::WorkerId;
use crate::load::balancedness;
use crate::plan::{Move, Plan};
use crate::planner::Problem;
use crate::state::Residency;

/// What happened: who left, who joined, what moved, and what that does for the balance.
pub(super) fn reason(problem: &Problem<'_>, previous: Option<&Plan>, next: &Plan) -> String {
    let workers = problem.workers.len();
    let balance = |plan: &Plan| problem.load.and_then(|load| balancedness(plan, load, problem.workers));
    let Some(previous) = previous else {
        let so = balance(next).map_or(String::new(), |after| format!(", balancedness {after:.2}"));
        return format!("first plan, {workers} workers, {} replicas{so}", problem.replicas);
    };
    let (before, after) = (named(previous), named(next));
    let live: BTreeSet<&WorkerId> = problem.workers.iter().map(|worker| &worker.id).collect();
    let gone: Vec<&WorkerId> = before.iter().copied().filter(|id| !live.contains(id)).collect();
    let fresh: Vec<&WorkerId> = after.difference(&before).copied().collect();
    let mut clauses = Vec::new();
    clauses.extend(some(&gone).map(|names| format!("{names} left")));
    clauses.extend(some(&fresh).map(|names| format!("{names} joined")));
    let moves = next.moves_from(Some(previous));
    let count = |residency: fn(&Move) -> &Residency| -> usize {
        moves.iter().filter(|change| live.contains(&change.worker)).map(|change| residency(change).len()).sum()
    };
    let (added, removed) = (count(|change| &change.added), count(|change| &change.removed));
    clauses.push(format!("{added} copies placed, {removed} given up, {workers} workers"));
    if let (Some(before), Some(after)) = (balance(previous), balance(next)) {
        clauses.push(format!("balancedness {before:.2} to {after:.2}"));
    }
    clauses.join(", ")
}

fn named(plan: &Plan) -> BTreeSet<&WorkerId> {
    plan.iter().flat_map(|(_, _, holders)| holders).collect()
}

/// The first of some names and how many more there are; `None` for none.
fn some(names: &[&WorkerId]) -> Option<String> {
    match names {
        [] => None,
        [only] => Some(only.to_string()),
        [first, rest @ ..] => Some(format!("{first} and {} more", rest.len())),
    }
}
