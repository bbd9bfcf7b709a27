//! When a worker first wants traffic: once the experts are in that a plan gave it.
//!
//! In: the cluster as the view tells it, with this worker's own record. Out: the moment. Never here: a load, or a way back. A
//! worker that was ready stays so until it drains, whatever later plans bring: who rolls out an update waits for the first
//! experts of one worker before the next one goes.

use std::sync::Arc;
use std::time::Duration;

use conclave_placement::ids::{Incarnation, PlanVersion, WorkerId};
use conclave_placement::state::ClusterState;
use tokio::sync::watch;
use tokio::time::Instant;

/// Where no plan gives a worker anything for so long, none will: there are enough others, or rebalancing is off.
const GIVEN_WITHIN: Duration = Duration::from_secs(30);

/// What a worker still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    Nothing,
    /// A plan that names it.
    Place,
    /// The experts of the plan that first named it.
    Experts,
}

/// Returns when run `me` of a worker is ready. Never, where the view ends before.
pub async fn reached(me: (WorkerId, Incarnation), mut changes: watch::Receiver<Arc<ClusterState>>) {
    let (mut named, until) = (None, Instant::now() + GIVEN_WITHIN);
    loop {
        let lacks = lacks(&me, &changes.borrow_and_update(), &mut named);
        if lacks == Lacks::Nothing {
            return;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { std::future::pending().await },
            () = tokio::time::sleep_until(until), if lacks == Lacks::Place => return,
        }
    }
}

/// `named` is the version of the plan that first named this worker, once one did.
fn lacks(me: &(WorkerId, Incarnation), state: &ClusterState, named: &mut Option<PlanVersion>) -> Lacks {
    let (id, incarnation) = me;
    // The first plan waits for workers, so they must not wait for it.
    let Some(plan) = &state.plan else { return Lacks::Nothing };
    if named.is_none() && !plan.assigned_to(id).is_empty() {
        *named = Some(plan.version);
    }
    let Some(version) = *named else { return Lacks::Place };
    let record = state.workers.get(id).filter(|record| record.incarnation == *incarnation);
    match record.is_some_and(|record| record.plan_version >= version) {
        true => Lacks::Nothing,
        false => Lacks::Experts,
    }
}

#[cfg(test)]
mod tests;
