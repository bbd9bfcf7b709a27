//! The balanced planner: experts where there is room and speed, copies where the load is, and as few moves as that takes.
//!
//! In: a [`Problem`] and the previous plan. Out: a plan that moves nothing it need not, and that workers can execute without
//! giving anything up first. Never here: names beyond the edge; inside, all is dense numbers.
//!
//! First what must be (`fill`): who left is replaced, what others hold stays. Then, if asked for, what may be (`rebalance`):
//! copies follow the load. The README in the folder of that name states the properties, in letters.

mod draft;
mod fill;
mod rebalance;
mod search;
mod even;
mod journal;
mod reason;

use crate::plan::Plan;
use crate::planner::fate::Fates;
use crate::planner::{Error, Problem, Rebalance, succession};
use draft::Draft;
use journal::Budget;

/// The name this planner signs with.
pub const POLICY: &str = "balanced";

/// More rounds than it takes: each accepted search gains half the floor.
const ROUNDS: usize = 16;

/// The next plan, or `None` when the previous one already is the answer.
///
/// Every expert of every layer with routed experts gets at least `min(replicas, workers)` distinct holders, fewer only where
/// the workers that do not hold it are full. An expert may end with none: see [`crate::lint::lint`]. What does not fit
/// beside what workers hold now is left to a later plan, which the same call makes once they have let go.
pub fn plan(problem: &Problem<'_>, previous: Option<&Plan>) -> Result<Option<Plan>, Error> {
    problem.check()?;
    let (version, parent) = succession(previous)?;
    let fates = Fates::of(problem.workers);
    let mut draft = Draft::new(problem);
    let before = previous.map_or_else(|| vec![Vec::new(); draft.holders.len()], |plan| draft.live_holders(plan));
    // Each round starts from what the last one made, as the next call will: what changes nothing here will change nothing
    // then.
    let mut holders = sorted(before.clone());
    for _ in 0..ROUNDS {
        round(&mut draft, &fates, &holders, previous.is_none());
        let next = sorted(draft.holders.clone());
        if next == holders {
            break;
        }
        holders = next;
        draft.clear();
    }
    let layers = draft.into_layers(&before);
    if previous.is_some_and(|plan| plan.layers == layers) {
        return Ok(None);
    }
    let mut plan = Plan { version, parent, policy: POLICY.to_owned(), reason: String::new(), layers };
    plan.reason = reason::reason(problem, previous, &plan);
    debug_assert_eq!(crate::lint::broken_invariant(&plan, problem, previous), None);
    Ok(Some(plan))
}

/// Once all that must be, and all that may be.
fn round(draft: &mut Draft<'_>, fates: &Fates, holders: &[Vec<usize>], first: bool) {
    fill::complete(draft, fates, holders);
    let Rebalance::IfGain { least, moves } = draft.problem.rebalance else { return };
    // In a first plan everything has to come from somewhere; after that, what is on its way counts.
    let moves = if first { usize::MAX } else { moves.saturating_sub(on_their_way(draft)) };
    if moves > 0 {
        rebalance::rebalance(draft, fates, Budget { least, moves });
    }
}

fn sorted(mut holders: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    holders.iter_mut().for_each(|holders| holders.sort_unstable());
    holders
}

/// Copies that are planned and not where they should be yet.
fn on_their_way(draft: &Draft<'_>) -> usize {
    let missing = |slot: usize| draft.holders[slot].iter().filter(|worker| !draft.is_resident(slot, **worker)).count();
    (0..draft.holders.len()).map(missing).sum()
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod load_tests;
#[cfg(test)]
mod life_tests;
