//! Stories of clusters, and what the controller would do about them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::*;
use crate::ids::{ExpertId, Incarnation, LayerIdx, PlanVersion, RouterId};
use crate::state::{RouterRecord, WorkerRecord, WorkerState};

const EXPERTS: u16 = 8;
const LAYER: LayerIdx = LayerIdx(1);

fn policy(replicas: u32) -> Policy {
    let rebalance = Rebalancing { period: Duration::from_secs(60), below: 0.8, gain: 0.05 };
    Policy { planner: Planner::Balanced, replicas, redundant: Some(0), min_workers: 2, rebalance }
}

fn id(name: &str) -> WorkerId {
    WorkerId::parse(name).unwrap()
}

fn worker(name: &str) -> WorkerRecord {
    WorkerRecord {
        state: WorkerState::Serving,
        ..WorkerRecord::starting(id(name), Incarnation::new(7).unwrap(), "127.0.0.1:7500")
    }
}

/// A cluster of these workers, without a plan.
fn cluster(names: &[&str]) -> ClusterState {
    let mut state = ClusterState::empty();
    state.model = Some(ModelIdentity {
        name: "m".into(),
        config_digest: String::new(),
        checkpoint_digest: String::new(),
        layers: 2,
        moe_layers: vec![LAYER],
        experts: EXPERTS.into(),
        expert_bytes: 10,
    });
    state.workers = names.iter().map(|name| (id(name), worker(name))).collect();
    state
}

/// What `policy` would do.
fn due(policy: &Policy, state: &ClusterState, may_move: bool) -> Option<Plan> {
    policy.due(state, known_load(state).as_ref(), may_move).unwrap().map(|linted| {
        assert!(linted.is_sound(), "{:?}", linted.notes);
        linted.plan
    })
}

fn urge(policy: &Policy, state: &ClusterState) -> Urge {
    policy.urge(state, known_load(state).as_ref())
}

/// Makes `plan` the target, and every worker hold what it gives.
fn carry_out(state: &mut ClusterState, plan: Plan) {
    for worker in state.workers.values_mut() {
        worker.resident = plan.assigned_to(&worker.id);
        worker.plan_version = plan.version;
    }
    state.plan = Some(Arc::new(plan));
}

fn tell(state: &mut ClusterState, rows: [u64; EXPERTS as usize]) {
    let load = Load { window: Duration::from_secs(60), layers: BTreeMap::from([(LAYER, rows.to_vec())]) };
    state.loads.insert(RouterId::parse("r").unwrap(), Arc::new(load));
}

#[test]
fn the_first_plan_waits_for_enough_workers_and_the_next_for_a_reason() {
    assert_eq!(due(&policy(1), &cluster(&[]), false), None, "nobody is there");
    let mut state = cluster(&["a"]);
    assert!(policy(1).lacks_workers(&state));
    state.workers.insert(id("b"), worker("b"));
    assert!(!policy(1).lacks_workers(&state));
    let plan = due(&policy(1), &state, false).expect("two are enough");
    carry_out(&mut state, plan);
    assert_eq!(urge(&policy(1), &state), Urge::None);
    assert_eq!(due(&policy(1), &state, false), None);
    let more = due(&policy(2), &state, false).expect("another copy of each is wanted");
    assert!(more.iter().all(|(.., holders)| holders.len() == 2));
}

#[test]
fn a_worker_that_is_ordered_to_leave_gets_nothing_and_hands_over() {
    let mut state = cluster(&["a", "b", "c"]);
    let plan = due(&policy(1), &state, false).unwrap();
    carry_out(&mut state, plan);
    state.drains.insert(id("b"), Incarnation::new(8).unwrap());
    assert_eq!(due(&policy(1), &state, false), None, "another run of it was meant");
    state.drains.insert(id("b"), Incarnation::new(7).unwrap());
    let plan = due(&policy(1), &state, false).expect("its experts need holders");
    assert!(plan.assigned_to(&id("b")).is_empty());
    assert!(plan.iter().all(|(.., holders)| holders.len() == 1));
}

#[test]
fn a_newcomer_takes_load_once_the_last_plan_is_carried_out() {
    let mut state = cluster(&["a", "b"]);
    let plan = due(&policy(1), &state, false).unwrap();
    carry_out(&mut state, plan);
    state.workers.insert(id("c"), worker("c"));
    assert_eq!(urge(&policy(1), &state), Urge::Newcomer);
    assert_eq!(due(&policy(1), &state, false), None, "nothing is missing");
    let plan = due(&policy(1), &state, true).expect("it could have a share");
    assert!(!plan.assigned_to(&id("c")).is_empty());
    state.plan = Some(Arc::new(plan));
    assert!(matches!(urge(&policy(1), &state), Urge::Unsettled(1..)));
}

#[test]
fn an_uneven_load_is_a_reason_to_look_and_a_little_of_it_is_none() {
    let mut state = cluster(&["a", "b"]);
    let plan = due(&policy(1), &state, false).unwrap();
    let of_a: Vec<u16> = plan.assigned_to(&id("a")).iter().map(|(_, expert)| expert.0).collect();
    carry_out(&mut state, plan);
    let rows = |times: u64| std::array::from_fn(|expert| if of_a.contains(&(expert as u16)) { times } else { 0 });
    tell(&mut state, rows(1));
    assert_eq!(urge(&policy(1), &state), Urge::None, "too little is known");
    tell(&mut state, rows(1_000));
    assert!(matches!(urge(&policy(1), &state), Urge::Uneven(_)));
    let plan = due(&policy(1), &state, true).expect("half of it could move");
    let busy_on_b = of_a.iter().filter(|expert| plan.holders(LAYER, ExpertId(**expert)) == [id("b")]).count();
    assert_eq!(busy_on_b, of_a.len() / 2);
    tell(&mut state, [1_000; EXPERTS as usize]);
    assert_eq!(urge(&policy(1), &state), Urge::None);
}

#[test]
fn a_lull_undoes_nothing_that_load_had_asked_for() {
    let mut state = cluster(&["a", "b"]);
    // One expert has as many rows as all others: whoever has it has nothing else.
    let mut rows = [1_000; EXPERTS as usize];
    rows[0] = 7_000;
    tell(&mut state, rows);
    let plan = due(&policy(1), &state, true).unwrap();
    carry_out(&mut state, plan);
    let counts = ["a", "b"].map(|name| state.workers[&id(name)].resident.len());
    assert!(counts.contains(&1), "{counts:?}");
    state.loads.clear();
    assert_eq!(due(&policy(1), &state, true), None);
    state.workers.insert(id("c"), worker("c"));
    let plan = due(&policy(1), &state, true).expect("who joined gets a share, load or no load");
    assert!(!plan.assigned_to(&id("c")).is_empty());
}

#[test]
fn what_a_worker_cannot_load_is_placed_elsewhere_and_holds_up_nothing() {
    let mut state = cluster(&["a", "b", "c"]);
    let plan = due(&policy(1), &state, false).unwrap();
    let (layer, expert) = plan.assigned_to(&id("b")).iter().next().unwrap();
    carry_out(&mut state, plan);
    let failed = state.workers.get_mut(&id("b")).unwrap();
    failed.resident.remove(layer, expert);
    assert_eq!(urge(&policy(1), &state), Urge::Unsettled(1));
    state.workers.get_mut(&id("b")).unwrap().failing.insert(layer, expert);
    assert_eq!(urge(&policy(1), &state), Urge::None);
    let plan = due(&policy(1), &state, false).expect("another worker may be able to");
    assert!(!plan.holders(layer, expert).contains(&id("b")) && plan.holders(layer, expert).len() == 1);
    for name in ["a", "c"] {
        state.workers.get_mut(&id(name)).unwrap().failing.insert(layer, expert);
    }
    let plan = due(&policy(1), &state, false).unwrap_or_else(|| state.plan.as_deref().unwrap().clone());
    assert_eq!(plan.holders(layer, expert).len(), 1, "where nobody could, somebody goes on trying");
}

#[test]
fn a_worker_that_no_router_reaches_is_of_no_use() {
    let mut state = cluster(&["a", "b", "c"]);
    let plan = due(&policy(1), &state, false).unwrap();
    carry_out(&mut state, plan);
    let router = |name: &str, reaches_b: bool| RouterRecord {
        plan_version: PlanVersion(1),
        unreachable: if reaches_b {
            BTreeMap::new()
        } else {
            BTreeMap::from([(id("b"), Incarnation::new(7).unwrap())])
        },
        ..RouterRecord::starting(
            RouterId::parse(name).unwrap(),
            Incarnation::new(3).unwrap(),
            ["a:1".into(), "a:2".into()],
        )
    };
    let mut tell =
        |name: &str, reaches_b| state.routers.insert(RouterId::parse(name).unwrap(), router(name, reaches_b));
    tell("r", false);
    tell("s", true);
    assert_eq!(due(&policy(1), &state, false), None, "another router reaches it");
    state.routers.insert(RouterId::parse("s").unwrap(), router("s", false));
    let plan = due(&policy(1), &state, false).expect("its experts are needed");
    assert!(plan.assigned_to(&id("b")).is_empty());
}

#[test]
fn most_workers_at_once_may_come_back_and_one_of_two_is_dead() {
    let mut state = cluster(&["a", "b", "c"]);
    assert!(!is_decimated(&state), "nothing was promised");
    let plan = due(&policy(1), &state, false).unwrap();
    carry_out(&mut state, plan);
    state.workers.remove(&id("a"));
    assert!(!is_decimated(&state));
    state.workers.remove(&id("b"));
    assert!(is_decimated(&state));
}

#[test]
fn eplb_plans_when_it_must_or_when_it_gains() {
    let mut state = cluster(&["a", "b"]);
    let eplb = Policy { planner: Planner::Eplb { groups: 1 }, ..policy(1) };
    let plan = due(&eplb, &state, false).expect("the first one");
    assert_eq!(plan.policy, "eplb");
    carry_out(&mut state, plan);
    tell(&mut state, [1_000, 1_000, 1_010, 1_000, 1_000, 1_000, 1_000, 1_000]);
    assert_eq!(due(&eplb, &state, true), None, "nothing to gain");
    tell(&mut state, [9_000, 9_000, 9_000, 9_000, 10, 10, 10, 10]);
    assert_eq!(due(&eplb, &state, false), None, "nothing must be");
    let before = balancedness(state.plan.as_deref().unwrap(), &state.load(), &planner::candidates(&state)).unwrap();
    if before < 0.9 {
        assert!(due(&eplb, &state, true).is_some());
    }
    state.workers.remove(&id("b"));
    assert!(
        due(&eplb, &state, false).expect("experts are nobody's").assigned_to(&id("a")).len() == usize::from(EXPERTS)
    );
}
