//! Stories about when a cluster counts as ready, and what the ready file then holds.

use std::collections::BTreeMap;
use std::sync::Arc;

use conclave_placement::{Incarnation, ModelIdentity, Plan, PlanVersion, Residency, RouterRecord, WorkerRecord};

use super::*;

fn worker_id(index: usize) -> WorkerId {
    WorkerId::parse(&format!("worker-{index}")).unwrap()
}

fn expected(workers: usize, replicas: usize) -> Expected {
    let routers = vec![RouterId::parse("router-0").unwrap()];
    Expected { routers, workers: (0..workers).map(worker_id).collect(), replicas }
}

/// One layer whose expert `e` is planned on, and held by, the workers `holders[e]`; one router.
pub(crate) fn state(workers: usize, holders: &[&[usize]]) -> ClusterState {
    let layer = LayerIdx(1);
    let mut state = ClusterState::empty();
    state.model = Some(ModelIdentity {
        name: "tiny".to_owned(),
        config_digest: String::new(),
        checkpoint_digest: String::new(),
        layers: 2,
        moe_layers: vec![layer],
        experts: holders.len() as u32,
        expert_bytes: 1 << 20,
    });
    let plan = Plan {
        version: PlanVersion(1),
        parent: PlanVersion::NONE,
        policy: "test".to_owned(),
        reason: "test".to_owned(),
        layers: BTreeMap::from([(
            layer,
            holders.iter().map(|on| on.iter().map(|w| worker_id(*w)).collect()).collect(),
        )]),
    };
    for index in 0..workers {
        let id = worker_id(index);
        let resident = plan.assigned_to(&id);
        let record = WorkerRecord {
            state: if resident.is_empty() { WorkerState::Starting } else { WorkerState::Serving },
            resident,
            plan_version: PlanVersion(1),
            ..WorkerRecord::starting(id.clone(), Incarnation::fresh(), format!("127.0.0.1:{}", 9000 + index))
        };
        state.workers.insert(id, record);
    }
    state.plan = Some(Arc::new(plan));
    let id = RouterId::parse("router-0").unwrap();
    let record = RouterRecord {
        plan_version: PlanVersion(1),
        ..RouterRecord::starting(
            id.clone(),
            Incarnation::fresh(),
            ["0.0.0.0:7400".to_owned(), "127.0.0.1:7600".to_owned()],
        )
    };
    state.routers.insert(id, record);
    state
}

fn readiness(state: &ClusterState, expected: &Expected) -> Readiness {
    Readiness::of(state, expected)
}

#[test]
fn a_cluster_is_ready_when_every_expert_is_held() {
    let expected = expected(2, 1);
    let mut state = state(2, &[&[0], &[1], &[0]]);
    assert!(readiness(&state, &expected).is_complete());
    assert_eq!(readiness(&state, &expected).workers[0].assigned, Some(2));

    let worker = state.workers.get_mut(&worker_id(0)).unwrap();
    worker.resident.remove(LayerIdx(1), ExpertId(2));
    let short = readiness(&state, &expected);
    assert!(!short.is_complete());
    assert_eq!(short.workers[0].resident, 1);
    assert_eq!(short.missing(&[]), "1 of 3 experts to be resident");
}

#[test]
fn an_empty_store_is_not_ready() {
    let readiness = readiness(&ClusterState::empty(), &expected(1, 1));
    assert!(!readiness.is_complete());
    assert_eq!(readiness.missing(&[]), "router-0 to register, worker-0 to register, the model's identity");
}

#[test]
fn every_wanted_copy_counts_but_no_more_than_there_are_workers() {
    let once = state(2, &[&[0], &[1]]);
    let twice = state(2, &[&[0, 1], &[1, 0]]);
    assert!(!readiness(&once, &expected(2, 2)).is_complete());
    assert!(readiness(&twice, &expected(2, 2)).is_complete());
    assert!(readiness(&twice, &expected(2, 5)).is_complete());
}

#[test]
fn a_worker_must_serve_unless_the_plan_gives_it_nothing() {
    let mut idle = state(3, &[&[0], &[1]]);
    assert!(readiness(&idle, &expected(3, 1)).is_complete());
    idle.workers.get_mut(&worker_id(1)).unwrap().state = WorkerState::Starting;
    assert!(!readiness(&idle, &expected(3, 1)).is_complete());
    idle.workers.remove(&worker_id(2));
    assert_eq!(readiness(&idle, &expected(3, 1)).missing(&[]), "worker-1 to serve, worker-2 to register");
}

#[test]
fn before_a_plan_what_is_resident_is_all_that_is_known() {
    let mut state = state(1, &[&[0]]);
    state.plan = None;
    state.workers.get_mut(&worker_id(0)).unwrap().resident = Residency::new();
    assert_eq!(readiness(&state, &expected(1, 1)).workers[0].assigned, None);
}

#[test]
fn a_healthy_cluster_waits_for_its_routers_word() {
    let expected = expected(1, 1);
    let readiness = readiness(&state(1, &[&[0]]), &expected);
    assert_eq!(readiness.missing(&expected.routers), "router-0 to say that it serves");
}

#[test]
fn the_ready_file_has_exactly_the_promised_keys_and_appears_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ready.json");
    let state = state(2, &[&[0], &[1]]);
    let pid = |name: &str| Some(if name == "router-0" { 10 } else { 20 });
    let ready = Ready::of(&state, &expected(2, 1), "etcd=http://127.0.0.1:2379", pid).unwrap();
    ready.write(&path).unwrap();
    let value: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let promised = serde_json::json!({
        "inference": "127.0.0.1:7400",
        "admin": "127.0.0.1:7600",
        "routers": [{"pid": 10, "inference": "127.0.0.1:7400", "admin": "127.0.0.1:7600"}],
        "workers": [
            {"id": "worker-0", "pid": 20, "address": "127.0.0.1:9000"},
            {"id": "worker-1", "pid": 20, "address": "127.0.0.1:9001"},
        ],
        "store": "etcd=http://127.0.0.1:2379",
    });
    assert_eq!(value, promised);
    assert_eq!(Ready::read(&path).unwrap(), ready);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing temporary is left");
}

#[test]
fn a_ready_file_in_no_folder_is_one_clear_error() {
    let ready = Ready {
        inference: String::new(),
        admin: String::new(),
        routers: Vec::new(),
        workers: Vec::new(),
        store: String::new(),
    };
    let error = ready.write(Path::new("/nowhere/ready.json")).unwrap_err().to_string();
    assert_eq!(error, "cannot write the ready file /nowhere/ready.json");
}

#[test]
fn a_listener_on_all_interfaces_is_reached_over_loopback() {
    assert_eq!(reachable("0.0.0.0:7400"), "127.0.0.1:7400");
    assert_eq!(reachable("[::]:7400"), "[::1]:7400");
    assert_eq!(reachable("10.0.0.1:7400"), "10.0.0.1:7400");
    assert_eq!(reachable("host:7400"), "host:7400");
}
