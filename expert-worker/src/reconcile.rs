//! What a worker should do about the plan, decided from what it sees. Pure: a plan, a picture of the cluster and what is
//! here come in; what to load and what may go comes out. Nothing is loaded, dropped or awaited here.
//!
//! - **Load** what the plan gives this worker and it lacks: what nobody in the cluster holds comes first, because streams
//!   wait for it, and no more than memory allows.
//! - **Release** what the plan no longer gives it, once that cannot hurt: every router has moved on to this plan (or had long
//!   enough to), and every worker that should hold the expert instead holds it and has acted on this plan. The second
//!   condition is what keeps two workers from releasing an expert in trust of each other: a worker that acted on a plan keeps what that plan
//!   gives it until a later one. Where memory is full and more should come, one such holder is enough: two full workers
//!   would otherwise wait for each other, each with what the other should have.

use conclave_placement::ids::{ExpertId, LayerIdx, PlanVersion, WorkerId};
use conclave_placement::plan::Plan;
use conclave_placement::state::{ClusterState, Residency, WorkerRecord, WorkerState};

/// What to load, in order, and how many more experts memory does not allow.
#[derive(Debug, PartialEq, Eq)]
pub struct Lacking {
    pub load: Vec<(LayerIdx, ExpertId)>,
    pub too_many: usize,
}

/// What of `assigned` is not `here`, at most `room` of it.
pub fn lacking(assigned: &Residency, here: &Residency, cluster: &ClusterState, room: usize) -> Lacking {
    let mut load: Vec<_> = assigned.iter().filter(|(layer, expert)| !here.contains(*layer, *expert)).collect();
    // Stable: within both kinds the order stays that of layers.
    load.sort_by_key(|(layer, expert)| is_served(cluster, *layer, *expert));
    let too_many = load.len().saturating_sub(room);
    load.truncate(room);
    Lacking { load, too_many }
}

/// Whether somebody who can be asked holds an expert.
pub fn is_served(cluster: &ClusterState, layer: LayerIdx, expert: ExpertId) -> bool {
    cluster.holders(layer, expert).any(|worker| worker.state != WorkerState::Starting)
}

/// Who must hold an expert before another one lets go of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enough {
    /// Everybody whom the plan gives it.
    All,
    /// One of them: memory is needed for something else.
    One,
}

/// Whether routers that have not moved on to the plan hold anything up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routers {
    AreWaitedFor,
    /// They had long enough.
    HadTheirTime,
}

/// What of `here` may be let go under `plan`, which gives this worker `assigned`.
pub fn releasable(
    plan: &Plan,
    assigned: &Residency,
    here: &Residency,
    cluster: &ClusterState,
    (enough, routers): (Enough, Routers),
) -> Residency {
    let lags = || cluster.routers.values().any(|router| router.plan_version < plan.version);
    if routers == Routers::AreWaitedFor && lags() {
        return Residency::new();
    }
    let surplus = here.iter().filter(|(layer, expert)| !assigned.contains(*layer, *expert));
    surplus.filter(|(layer, expert)| is_settled(plan, cluster, *layer, *expert, enough)).collect()
}

/// Whether enough of those who should hold an expert do, and have said so in knowledge of this plan.
fn is_settled(plan: &Plan, cluster: &ClusterState, layer: LayerIdx, expert: ExpertId, enough: Enough) -> bool {
    let holders = plan.holders(layer, expert);
    let holds = |id: &WorkerId| {
        cluster.workers.get(id).is_some_and(|worker| {
            worker.state == WorkerState::Serving
                && worker.plan_version >= plan.version
                && worker.resident.contains(layer, expert)
        })
    };
    match enough {
        Enough::All => !holders.is_empty() && holders.iter().all(holds),
        Enough::One => holders.iter().any(holds),
    }
}

/// Whether a worker that leaves may go: each of its experts is held by another one that stays, and nothing that the plan
/// puts elsewhere is still on its way. Who has not acted on this plan does not count: it may be about to let go, under the
/// plan before. Where there is nobody to hand over to, or nobody to hand over for, it may go too.
pub fn is_handed_over(me: &WorkerId, here: &Residency, cluster: &ClusterState) -> bool {
    let stays = |id: &WorkerId| *id != *me && cluster.workers.get(id).is_some_and(|worker| !cluster.is_leaving(worker));
    if cluster.routers.is_empty() || here.is_empty() || !cluster.workers.keys().any(stays) {
        return true;
    }
    let plan = cluster.plan.as_deref();
    let version = plan.map_or(PlanVersion::NONE, |plan| plan.version);
    here.iter().all(|(layer, expert)| {
        let keeps = |worker: &WorkerRecord| {
            worker.state == WorkerState::Serving
                && worker.plan_version >= version
                && worker.resident.contains(layer, expert)
                && stays(&worker.id)
        };
        let planned = plan.map(|plan| plan.holders(layer, expert)).unwrap_or_default();
        cluster.workers.values().any(keeps) && planned.iter().all(|id| cluster.workers.get(id).is_some_and(keeps))
    })
}

/// How many of the experts `here` nobody holds but this worker, of those that stay. None where nobody stays: then it is the
/// whole cluster that ends.
pub fn left_behind(me: &WorkerId, here: &Residency, cluster: &ClusterState) -> usize {
    let stays = |worker: &&WorkerRecord| worker.id != *me && !cluster.is_leaving(worker);
    if !cluster.workers.values().any(|worker| stays(&worker)) {
        return 0;
    }
    here.iter().filter(|(layer, expert)| !cluster.holders(*layer, *expert).any(|worker| stays(&worker))).count()
}

#[cfg(test)]
pub(crate) mod tests;
