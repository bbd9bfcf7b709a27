//! Stories of plans and pictures: what a worker would do about them.

use std::collections::BTreeMap;
use std::sync::Arc;

use conclave_placement::ids::{Incarnation, RouterId};
use conclave_placement::state::RouterRecord;
use proptest::prelude::*;

use super::*;

const LAYER: LayerIdx = LayerIdx(1);

fn id(name: &str) -> WorkerId {
    WorkerId::parse(name).unwrap()
}

fn residency(experts: &[u16]) -> Residency {
    experts.iter().map(|expert| (LAYER, ExpertId(*expert))).collect()
}

pub(crate) fn worker(name: &str, plan: u64, resident: &[u16]) -> WorkerRecord {
    WorkerRecord {
        state: WorkerState::Serving,
        resident: residency(resident),
        plan_version: PlanVersion(plan),
        ..WorkerRecord::starting(id(name), Incarnation::new(7).unwrap(), "127.0.0.1:7500")
    }
}

/// Plan `version`: expert `e` belongs to `holders[e]`.
pub(crate) fn plan(version: u64, holders: &[&[&str]]) -> Plan {
    let holders = holders.iter().map(|names| names.iter().map(|name| id(name)).collect()).collect();
    Plan {
        version: PlanVersion(version),
        parent: PlanVersion(version - 1),
        policy: "test".into(),
        reason: "test".into(),
        layers: BTreeMap::from([(LAYER, holders)]),
    }
}

/// A cluster with these workers, and one router that dispatches by plan `routed`.
pub(crate) fn cluster(workers: Vec<WorkerRecord>, plan: Plan, routed: u64) -> ClusterState {
    let mut state = ClusterState::empty();
    state.workers = workers.into_iter().map(|worker| (worker.id.clone(), worker)).collect();
    let router = RouterRecord {
        plan_version: PlanVersion(routed),
        ..RouterRecord::starting(
            RouterId::parse("r").unwrap(),
            Incarnation::new(7).unwrap(),
            ["127.0.0.1:7400".into(), "127.0.0.1:7600".into()],
        )
    };
    state.routers.insert(router.id.clone(), router);
    state.plan = Some(Arc::new(plan));
    state
}

#[test]
fn only_what_is_lacking_is_loaded_and_only_while_memory_lasts() {
    let state = cluster(vec![worker("b", 1, &[0, 2])], plan(1, &[]), 1);
    let (assigned, here) = (residency(&[0, 1, 2, 3]), residency(&[1, 9]));
    let load = |room| {
        let lacking = lacking(&assigned, &here, &state, room);
        (lacking.load.iter().map(|(_, expert)| expert.0).collect::<Vec<_>>(), lacking.too_many)
    };
    assert_eq!(load(usize::MAX), (vec![3, 0, 2], 0), "what nobody holds comes first");
    assert_eq!(load(2), (vec![3, 0], 1));
    assert_eq!(load(0), (vec![], 3));
}

/// Whether `a`, which holds expert 0, would let go of it when plan 2 gives it to `b`.
fn let_go(b: WorkerRecord, routed: u64) -> bool {
    let plan = plan(2, &[&["b"]]);
    let state = cluster(vec![worker("a", 2, &[0]), b], plan.clone(), routed);
    releasable(&plan, &Residency::new(), &residency(&[0]), &state, (Enough::All, Routers::AreWaitedFor))
        == residency(&[0])
}

#[test]
fn an_expert_goes_when_its_new_holder_has_it_and_every_router_has_moved_on() {
    assert!(let_go(worker("b", 2, &[0]), 2));
    assert!(!let_go(worker("b", 2, &[0]), 1), "a router is behind");
    assert!(!let_go(worker("b", 2, &[]), 2), "it is not there yet");
    assert!(!let_go(worker("b", 1, &[0]), 2), "it may itself be about to let go, under the plan before");
    let draining = WorkerRecord { state: WorkerState::Draining, ..worker("b", 2, &[0]) };
    assert!(!let_go(draining, 2), "it will not stay");
}

#[test]
fn one_of_several_holders_is_enough_where_memory_is_full() {
    let plan = plan(2, &[&["b", "c"]]);
    let let_go = |c: WorkerRecord, enough| {
        let state = cluster(vec![worker("a", 2, &[0]), worker("b", 2, &[]), c], plan.clone(), 2);
        !releasable(&plan, &Residency::new(), &residency(&[0]), &state, (enough, Routers::AreWaitedFor)).is_empty()
    };
    assert!(!let_go(worker("c", 2, &[0]), Enough::All), "b lacks it");
    assert!(let_go(worker("c", 2, &[0]), Enough::One));
    assert!(!let_go(worker("c", 1, &[0]), Enough::One), "c may be about to let go");
    assert!(!let_go(worker("c", 2, &[]), Enough::One), "nobody has it");
}

#[test]
fn an_expert_that_is_planned_nowhere_stays() {
    let plan = plan(2, &[&[]]);
    let state = cluster(vec![worker("a", 2, &[0])], plan.clone(), 2);
    assert!(
        releasable(&plan, &Residency::new(), &residency(&[0]), &state, (Enough::All, Routers::AreWaitedFor)).is_empty()
    );
}

#[test]
fn a_worker_leaves_when_its_experts_are_elsewhere() {
    let leaving = || WorkerRecord { state: WorkerState::Draining, ..worker("a", 1, &[0, 1]) };
    let here = residency(&[0, 1]);
    let may_go = |b: WorkerRecord, plan: Plan| {
        let state = cluster(vec![leaving(), b], plan, 2);
        is_handed_over(&id("a"), &here, &state)
    };
    assert!(!may_go(worker("b", 1, &[0]), plan(1, &[&["a"], &["a"]])), "nobody else holds expert 1");
    assert!(!may_go(worker("b", 1, &[0, 1]), plan(1, &[&["a", "b"], &["a", "b"]])), "nothing was planned yet");
    assert!(!may_go(worker("b", 2, &[0]), plan(2, &[&["b"], &["b"]])), "expert 1 is on its way");
    assert!(!may_go(worker("b", 1, &[0, 1]), plan(2, &[&["b"], &["b"]])), "it may be about to let go, not knowing");
    assert!(may_go(worker("b", 2, &[0, 1]), plan(2, &[&["b"], &["b"]])));
    let draining = WorkerRecord { state: WorkerState::Draining, ..worker("b", 1, &[]) };
    assert!(may_go(draining, plan(1, &[&["a"], &["a"]])), "everybody leaves: there is nobody to wait for");

    let mut nobody_asks = cluster(vec![leaving(), worker("b", 1, &[])], plan(1, &[&["a"], &["a"]]), 1);
    nobody_asks.routers.clear();
    assert!(is_handed_over(&id("a"), &here, &nobody_asks));
}

proptest! {
    /// Two workers that see each other late, and act on plans that move one expert to and fro: never do both let go.
    #[test]
    fn two_workers_never_let_go_in_trust_of_each_other(
        moves in prop::collection::vec((any::<bool>(), 0usize..4, 0usize..4), 1..40),
    ) {
        // What each has published, newest last: the other may still see any of the last few.
        let names = ["a", "b"];
        let mut published = [vec![worker("a", 0, &[0])], vec![worker("b", 0, &[])]];
        let mut version = 0;
        for (to_b, delay_a, delay_b) in moves {
            version += 1;
            let owner = usize::from(to_b);
            let plan = plan(version, &[&[names[owner]]]);
            for (me, delay) in [(owner, delay_a), (1 - owner, delay_b)] {
                let mut mine = published[me].last().expect("one at least").clone();
                let other = &published[1 - me];
                let seen = other[other.len().saturating_sub(delay + 1)].clone();
                let state = cluster(vec![mine.clone(), seen], plan.clone(), version);
                let assigned = plan.assigned_to(&id(names[me]));
                if me == owner {
                    mine.resident.insert(LAYER, ExpertId(0));
                } else {
                    for (layer, expert) in releasable(&plan, &assigned, &mine.resident.clone(), &state, (Enough::One, Routers::AreWaitedFor)).iter() {
                        mine.resident.remove(layer, expert);
                    }
                }
                mine.plan_version = plan.version;
                published[me].push(mine);
            }
            let holds = |me: usize| !published[me].last().expect("one at least").resident.is_empty();
            prop_assert!(holds(0) || holds(1), "nobody holds it after plan {}", version);
        }
    }
}

#[test]
fn a_worker_that_must_go_knows_what_it_leaves_behind() {
    let cluster = |workers| cluster(workers, plan(2, &[&["a"], &["a"]]), 2);
    let me = WorkerId::parse("a").unwrap();
    let here = residency(&[0, 1]);
    assert_eq!(left_behind(&me, &here, &cluster(vec![worker("a", 2, &[0, 1]), worker("b", 2, &[1])])), 1);
    assert_eq!(left_behind(&me, &here, &cluster(vec![worker("a", 2, &[0, 1]), worker("b", 2, &[0, 1])])), 0);
    assert_eq!(left_behind(&me, &here, &cluster(vec![worker("a", 2, &[0, 1])])), 0, "everybody leaves");
}

#[test]
fn a_router_that_never_follows_had_its_time() {
    let plan = plan(2, &[&["b"]]);
    let state = cluster(vec![worker("a", 2, &[0]), worker("b", 2, &[0])], plan.clone(), 1);
    let released = |routers| releasable(&plan, &Residency::new(), &residency(&[0]), &state, (Enough::All, routers));
    assert!(released(Routers::AreWaitedFor).is_empty());
    assert_eq!(released(Routers::HadTheirTime), residency(&[0]));
}
