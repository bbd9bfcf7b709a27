//! The placement controller: turns what is observed into a plan, on the one router that leads.
//!
//! In: the cluster's state, and whether this router leads. Out: plans in the store, by compare-and-swap on their parent.
//! Never here: the data path; a second opinion. A leader that lost its place loses the swap and does no harm.

use std::{sync::Arc, time::Duration};

use conclave_placement::{
    election::Term,
    keys::Keys,
    lint::{Rule, Severity, lint},
    plan::Plan,
    planner::{self, Problem, Rebalance, balanced},
    state::ClusterState,
    store::{CasOutcome, Expected, Store},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// After a failed write, before the next.
const RETRY: Duration = Duration::from_millis(500);

/// How plans are made here.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Workers that should hold each expert.
    pub replicas: u32,
    /// The first plan waits for this many workers, so that it need not be made again as each joins.
    pub min_workers: usize,
}

/// Plans whenever this router leads and the cluster changes, until `stop`.
pub async fn run(
    store: Arc<dyn Store>,
    keys: Keys,
    policy: Policy,
    mut cluster: watch::Receiver<Arc<ClusterState>>,
    mut leads: watch::Receiver<Option<Term>>,
    stop: CancellationToken,
) {
    loop {
        let state = cluster.borrow_and_update().clone();
        let settled = leads.borrow_and_update().is_none() || reconcile(&*store, &keys, policy, &state).await;
        tokio::select! {
            changed = cluster.changed() => if changed.is_err() { return },
            changed = leads.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if !settled => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Publishes the next plan if one is due. False where it should be tried again without waiting for a change.
async fn reconcile(store: &dyn Store, keys: &Keys, policy: Policy, state: &ClusterState) -> bool {
    let plan = match due(policy, state) {
        Ok(Some(plan)) => plan,
        Ok(None) => return true,
        Err(error) => {
            debug!(%error, "no plan");
            return true;
        }
    };
    match publish(store, keys, state, &plan).await {
        Ok(true) => {
            info!(version = plan.version.0, policy = %plan.policy, reason = %plan.reason, "plan published");
            true
        }
        Ok(false) => {
            info!(version = plan.version.0, "another plan came first");
            true
        }
        Err(error) => {
            warn!(%error, "plan could not be written");
            false
        }
    }
}

/// The plan that should follow the present one, if any. Pure.
fn due(policy: Policy, state: &ClusterState) -> Result<Option<Plan>, planner::Error> {
    let Some(model) = &state.model else { return Ok(None) };
    let workers = planner::candidates(state);
    if state.plan.is_none() && workers.len() < policy.min_workers {
        return Ok(None);
    }
    let (replicas, rebalance) = (policy.replicas, Rebalance::No);
    let problem = Problem { model, workers: &workers, replicas, redundant: 0, load: None, rebalance };
    let previous = state.plan.as_deref();
    let Some(plan) = balanced::plan(&problem, previous)? else { return Ok(None) };
    let notes = lint(&plan, &problem, previous);
    for note in notes.iter().filter(|note| note.severity >= Severity::Warning) {
        warn!(version = plan.version.0, %note, "plan");
    }
    // A plan with a mistake in it is worse than none; one that cannot place everything is still the best there is.
    let mistaken = |rule: &Rule| !matches!(rule, Rule::Unplaced { .. });
    let mistake = notes.iter().any(|note| note.severity == Severity::Error && mistaken(&note.rule));
    Ok((!mistake).then_some(plan))
}

/// Writes `plan` if its parent is what is there now. False where it is not.
async fn publish(
    store: &dyn Store,
    keys: &Keys,
    state: &ClusterState,
    plan: &Plan,
) -> Result<bool, conclave_placement::store::Error> {
    let key = keys.plan();
    let current = store.get(&key).await?;
    let expected = match (&current, &state.plan) {
        (None, None) => Expected::Absent,
        (Some(entry), Some(parent)) => match Plan::decode(&entry.value) {
            Ok(there) if there.version == parent.version => Expected::ModRevision(entry.mod_revision),
            _ => return Ok(false),
        },
        _ => return Ok(false),
    };
    let outcome = store.compare_and_put(&key, expected, plan.encode(), None).await?;
    Ok(matches!(outcome, CasOutcome::Stored { .. }))
}
