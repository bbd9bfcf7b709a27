//! A state built event by event equals one built from a listing, and no value can break it.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::ids::{Cluster, Incarnation, LayerIdx, PlanVersion, RouterId, WorkerId};
use crate::state::WorkerState;

fn keys() -> Keys {
    Keys::new(&Cluster::parse("c").unwrap())
}

fn worker(name: &str, plan: u64) -> WorkerRecord {
    WorkerRecord {
        state: WorkerState::Serving,
        plan_version: PlanVersion(plan),
        ..WorkerRecord::starting(WorkerId::parse(name).unwrap(), Incarnation::new(7).unwrap(), "127.0.0.1:7500")
    }
}

fn router(name: &str) -> RouterRecord {
    RouterRecord::starting(
        RouterId::parse(name).unwrap(),
        Incarnation::new(7).unwrap(),
        ["127.0.0.1:7400".into(), "127.0.0.1:7600".into()],
    )
}

fn plan(version: u64) -> Plan {
    Plan {
        version: PlanVersion(version),
        parent: PlanVersion(version - 1),
        policy: "test".into(),
        reason: "test".into(),
        layers: BTreeMap::from([(LayerIdx(1), vec![vec![]])]),
    }
}

fn entry(key: &str, value: Bytes, revision: i64) -> Entry {
    Entry { key: key.to_owned(), value, create_revision: revision, mod_revision: revision, version: 1, lease: None }
}

/// A key of the cluster (some of them foreign) and a value for it, `None` for its deletion.
fn change() -> impl Strategy<Value = (String, Option<Bytes>)> {
    let name = prop_oneof![Just("a"), Just("b")];
    let worker = (name.clone(), 0u64..3)
        .prop_map(|(name, plan)| (format!("/conclave/c/workers/{name}"), worker(name, plan).encode()));
    let router = name.prop_map(|name| (format!("/conclave/c/routers/{name}"), router(name).encode()));
    let leader =
        Just(LeaderRecord { router: RouterId::parse("a").unwrap(), incarnation: Incarnation::new(7).unwrap() });
    let leader = leader.prop_map(|leader| ("/conclave/c/leader".to_owned(), leader.encode()));
    let plan = (1u64..9).prop_map(|version| ("/conclave/c/plan".to_owned(), plan(version).encode()));
    let load = Just((
        "/conclave/c/load/a".to_owned(),
        Load { window: std::time::Duration::from_secs(1), layers: BTreeMap::from([(LayerIdx(1), vec![2, 3])]) }
            .encode(),
    ));
    let drain =
        Just(("/conclave/c/drains/a".to_owned(), DrainOrder { incarnation: Incarnation::new(7).unwrap() }.encode()));
    let foreign = Just(("/conclave/c/unknown".to_owned(), Bytes::new()));
    let put = prop_oneof![worker, router, leader, plan, load, drain, foreign];
    (put, prop::bool::weighted(0.7)).prop_map(|((key, value), keep)| (key, keep.then_some(value)))
}

proptest! {
    #[test]
    fn event_by_event_is_the_same_as_from_a_listing(changes in prop::collection::vec(change(), 0..40)) {
        let mut followed = Assembly::new(keys());
        let mut store: BTreeMap<String, Entry> = BTreeMap::new();
        let mut revision = 0;
        for (key, value) in changes {
            revision += 1;
            match value {
                Some(value) => {
                    let entry = entry(&key, value, revision);
                    store.insert(key, entry.clone());
                    followed.apply(vec![Event::Put(entry)]);
                }
                None => {
                    store.remove(&key);
                    followed.apply(vec![Event::Delete { key, revision }]);
                }
            }
        }
        let mut listed = Assembly::new(keys());
        listed.replace(Listing { entries: store.into_values().collect(), revision });
        prop_assert_eq!(listed.state(), followed.state());
    }

    #[test]
    fn no_value_breaks_the_state(slot in 0usize..7, value in prop::collection::vec(any::<u8>(), 0..200)) {
        let key = ["model", "plan", "leader", "workers/a", "routers/a", "load/a", "drains/a"][slot];
        let mut assembly = Assembly::new(keys());
        assembly.apply(vec![Event::Put(entry(&format!("/conclave/c/{key}"), value.into(), 2))]);
        prop_assert_eq!(assembly.state().revision, 2);
    }
}

#[test]
fn a_bad_value_leaves_what_was_known_before() {
    let mut assembly = Assembly::new(keys());
    assembly.apply(vec![Event::Put(entry("/conclave/c/workers/a", worker("a", 3).encode(), 2))]);
    let good = assembly.state().workers.clone();

    let vast = Bytes::from(vec![0; crate::codec::MAX_VALUE + 1]);
    for bad in [Bytes::from_static(b"\xff\xff"), worker("b", 9).encode(), vast] {
        let bad = entry("/conclave/c/workers/a", bad, 3);
        assembly.apply(vec![Event::Put(bad.clone())]);
        assert_eq!(assembly.state().workers, good);
        assembly.replace(Listing { entries: vec![bad], revision: 4 });
        assert_eq!(assembly.state().workers, good, "neither does a listing forget it");
    }
    assembly.apply(vec![Event::Delete { key: "/conclave/c/workers/a".into(), revision: 5 }]);
    assert!(assembly.state().workers.is_empty());
}
