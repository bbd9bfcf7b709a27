//! Stories of clusters, and what the controller would do about them.

use std::{collections::BTreeMap, sync::Arc};

use conclave_placement::{
    ids::{ExpertId, Incarnation, LayerIdx, PlanVersion, RouterId},
    state::{Locality, ModelIdentity, Residency, WorkerRecord, WorkerState},
};

use super::*;

const EXPERTS: u16 = 8;
const LAYER: LayerIdx = LayerIdx(1);

fn policy(replicas: u32) -> Policy {
    let rebalance = Rebalancing { period: Duration::from_secs(60), below: 0.8, gain: 0.05 };
    Policy { replicas, redundant: Some(0), min_workers: 2, rebalance }
}

fn id(name: &str) -> WorkerId {
    WorkerId::parse(name).unwrap()
}

fn worker(name: &str) -> WorkerRecord {
    WorkerRecord {
        id: id(name),
        incarnation: Incarnation::new(7).unwrap(),
        address: "127.0.0.1:7500".into(),
        local: None,
        device: "cpu".into(),
        memory_budget: 0,
        speed: 0.0,
        state: WorkerState::Serving,
        resident: Residency::new(),
        plan_version: PlanVersion::NONE,
        locality: Locality::default(),
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
    let mut state = cluster(&["a"]);
    assert_eq!(policy(1).due(&state, false).unwrap(), None);
    state.workers.insert(id("b"), worker("b"));
    let plan = policy(1).due(&state, false).unwrap().expect("two are enough");
    carry_out(&mut state, plan);
    assert_eq!(policy(1).urge(&state), Urge::None);
    assert_eq!(policy(1).due(&state, false).unwrap(), None);
    let more = policy(2).due(&state, false).unwrap().expect("another copy of each is wanted");
    assert!(more.iter().all(|(.., holders)| holders.len() == 2));
}

#[test]
fn a_worker_that_is_ordered_to_leave_gets_nothing_and_hands_over() {
    let mut state = cluster(&["a", "b", "c"]);
    let plan = policy(1).due(&state, false).unwrap().unwrap();
    carry_out(&mut state, plan);
    state.drains.insert(id("b"), Incarnation::new(8).unwrap());
    assert_eq!(policy(1).due(&state, false).unwrap(), None, "another run of it was meant");
    state.drains.insert(id("b"), Incarnation::new(7).unwrap());
    let plan = policy(1).due(&state, false).unwrap().expect("its experts need holders");
    assert!(plan.assigned_to(&id("b")).is_empty());
    assert!(plan.iter().all(|(.., holders)| holders.len() == 1));
}

#[test]
fn a_newcomer_takes_load_once_the_last_plan_is_carried_out() {
    let mut state = cluster(&["a", "b"]);
    let plan = policy(1).due(&state, false).unwrap().unwrap();
    carry_out(&mut state, plan);
    state.workers.insert(id("c"), worker("c"));
    assert_eq!(policy(1).urge(&state), Urge::Newcomer);
    assert_eq!(policy(1).due(&state, false).unwrap(), None, "nothing is missing");
    let plan = policy(1).due(&state, true).unwrap().expect("it could have a share");
    assert!(!plan.assigned_to(&id("c")).is_empty());
    state.plan = Some(Arc::new(plan));
    assert_eq!(policy(1).urge(&state), Urge::Unsettled);
}

#[test]
fn an_uneven_load_is_a_reason_to_look_and_a_little_of_it_is_none() {
    let mut state = cluster(&["a", "b"]);
    let plan = policy(1).due(&state, false).unwrap().unwrap();
    let of_a: Vec<u16> = plan.assigned_to(&id("a")).iter().map(|(_, expert)| expert.0).collect();
    carry_out(&mut state, plan);
    let rows = |times: u64| std::array::from_fn(|expert| if of_a.contains(&(expert as u16)) { times } else { 0 });
    tell(&mut state, rows(1));
    assert_eq!(policy(1).urge(&state), Urge::None, "too little is known");
    tell(&mut state, rows(1_000));
    assert_eq!(policy(1).urge(&state), Urge::Uneven);
    let plan = policy(1).due(&state, true).unwrap().expect("half of it could move");
    let busy_on_b = of_a.iter().filter(|expert| plan.holders(LAYER, ExpertId(**expert)) == [id("b")]).count();
    assert_eq!(busy_on_b, of_a.len() / 2);
    tell(&mut state, [1_000; EXPERTS as usize]);
    assert_eq!(policy(1).urge(&state), Urge::None);
}
