//! Values survive the way through bytes, and no bytes can hurt.

use proptest::prelude::*;

use super::*;
use crate::ids::ExpertId;
use crate::plan::{PastPlan, Plan};
use crate::state::RouterRecord;

fn worker_id() -> impl Strategy<Value = WorkerId> {
    "[a-z0-9.-]{1,63}".prop_map(|name| WorkerId::parse(&name).unwrap())
}

fn any_residency() -> impl Strategy<Value = Residency> {
    prop::collection::btree_map(0u32..70, prop::collection::vec(any::<u16>(), 1..20), 0..5).prop_map(|layers| {
        let sets = layers.into_iter();
        Residency(sets.map(|(layer, set)| (LayerIdx(layer), set.into_iter().map(ExpertId).collect())).collect())
    })
}

prop_compose! {
    fn any_worker()(id in worker_id(), incarnation in 1u64.., address in "[a-z0-9.:]{1,40}", device in "cpu|cuda:[0-7]",
                    memory_budget in any::<u64>(), speed in 0.0f64..1e12, state in 0..3, resident in any_residency(),
                    failing in any_residency(), host in "[a-z0-9-]{0,9}",
                    local in prop::option::of(("[a-f0-9-]{36}", "[a-z0-9/]{1,60}").prop_map(|(boot_id, name)| LocalSocket { boot_id, name })),
                    plan in any::<u64>()) -> WorkerRecord {
        let state = [WorkerState::Starting, WorkerState::Serving, WorkerState::Draining][state as usize];
        WorkerRecord { id, incarnation: Incarnation::new(incarnation).unwrap(), address, local, device, memory_budget, speed,
                       state, resident, failing, plan_version: PlanVersion(plan), locality: Locality { host, zone: "z".into() } }
    }
}

prop_compose! {
    fn any_plan()(parent in 0u64..u64::MAX, reason in ".{0,60}",
                  layers in prop::collection::btree_map(0u32..80,
                      prop::collection::vec(prop::collection::vec(worker_id(), 0..4), 0..9), 0..4)) -> Plan {
        let layers = layers.into_iter().map(|(layer, experts)| (LayerIdx(layer), experts)).collect();
        Plan { version: PlanVersion(parent + 1), parent: PlanVersion(parent), policy: "balanced".into(), reason, layers }
    }
}

proptest! {
    #[test]
    fn a_worker_record_survives_the_way(worker in any_worker()) {
        prop_assert_eq!(WorkerRecord::decode(&worker.encode()).unwrap(), worker);
    }

    #[test]
    fn a_plan_survives_the_way(plan in any_plan(), written_unix_ms in any::<u64>()) {
        prop_assert_eq!(&Plan::decode(&plan.encode()).unwrap(), &plan);
        let past = PastPlan { plan, author: "router-0".into(), written_unix_ms };
        prop_assert_eq!(PastPlan::decode(&past.encode()).unwrap(), past);
    }

    #[test]
    fn a_load_survives_the_way(window_ms in any::<u32>(), layers in prop::collection::btree_map(
        (0u32..80).prop_map(LayerIdx), prop::collection::vec(any::<u64>(), 0..9), 0..4)) {
        let load = Load { window: Duration::from_millis(window_ms.into()), layers };
        prop_assert_eq!(Load::decode(&load.encode()).unwrap(), load);
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = (ModelIdentity::decode(&bytes), WorkerRecord::decode(&bytes), RouterRecord::decode(&bytes));
        let _ = (LeaderRecord::decode(&bytes), Plan::decode(&bytes), PastPlan::decode(&bytes));
        let _ = (Load::decode(&bytes), DrainOrder::decode(&bytes));
    }
}

#[test]
fn identity_router_and_leader_survive_the_way() {
    let model = ModelIdentity {
        name: "tiny".into(),
        config_digest: "aa".into(),
        checkpoint_digest: "bb".into(),
        layers: 3,
        moe_layers: vec![LayerIdx(1), LayerIdx(2)],
        experts: 16,
        expert_bytes: 1 << 20,
    };
    assert_eq!(ModelIdentity::decode(&model.encode()).unwrap(), model);
    let id = RouterId::parse("router-0").unwrap();
    let router = RouterRecord {
        id: id.clone(),
        incarnation: Incarnation::fresh(),
        inference_address: "127.0.0.1:7400".into(),
        admin_address: "127.0.0.1:7600".into(),
        plan_version: PlanVersion(4),
        policy: None,
        unreachable: BTreeMap::new(),
    };
    assert_eq!(RouterRecord::decode(&router.encode()).unwrap(), router);
    let leader = LeaderRecord { router: id, incarnation: router.incarnation };
    assert_eq!(LeaderRecord::decode(&leader.encode()).unwrap(), leader);
    let order = DrainOrder { incarnation: router.incarnation };
    assert_eq!(DrainOrder::decode(&order.encode()).unwrap(), order);
}

fn refusal<T: std::fmt::Debug>(decoded: Result<T, DecodeError>) -> String {
    decoded.unwrap_err().to_string()
}

#[test]
fn a_bad_field_is_named() {
    let model = pb::ModelIdentity { layers: 2, moe_layers: vec![1, 2], ..Default::default() };
    let says = refusal(ModelIdentity::decode(&model.encode_to_vec()));
    assert!(says.starts_with("ModelIdentity.moe_layers"), "{says}");

    let plan = pb::Plan { version: 3, parent: 3, ..Default::default() };
    assert!(refusal(Plan::decode(&plan.encode_to_vec())).starts_with("Plan.version"));

    let worker = pb::WorkerRecord { id: "w".into(), incarnation: 1, address: "a:1".into(), ..Default::default() };
    assert!(refusal(WorkerRecord::decode(&worker.encode_to_vec())).starts_with("WorkerRecord.state"));
    let worker = pb::WorkerRecord { state: 2, speed: f64::NAN, ..worker };
    assert!(refusal(WorkerRecord::decode(&worker.encode_to_vec())).starts_with("WorkerRecord.speed"));

    let vast = vec![0; MAX_VALUE + 1];
    assert!(matches!(Plan::decode(&vast), Err(DecodeError::TooLarge { .. })));
}
