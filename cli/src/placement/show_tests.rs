//! Stories about what is printed of a cluster.

use super::*;
use crate::up::ready::tests::state;

/// Three experts; worker-0 holds two of them, worker-1 two, one is held twice.
fn small() -> ClusterState {
    state(2, &[&[0], &[1], &[0, 1]])
}

fn cluster(name: &str) -> Cluster {
    Cluster::parse(name).unwrap()
}

#[test]
fn the_tables_say_who_holds_what() {
    let rows =
        BTreeMap::from([("worker-0".to_owned(), Ok(1234)), ("worker-1".to_owned(), Err("no answer".to_owned()))]);
    let report = Report::of(&cluster("demo"), &small(), &rows);
    let expected = "\
cluster demo, model tiny, plan 1 (test: test)

ROUTER    INFERENCE     ADMIN           PLAN
router-0  0.0.0.0:7400  127.0.0.1:7600  1

WORKER    STATE    DEVICE  ADDRESS         PLAN  EXPERTS  BYTES    ROWS  PER LAYER
worker-0  serving  cpu     127.0.0.1:9000  1     2        2.0 MiB  1234  1: 2
worker-1  serving  cpu     127.0.0.1:9001  1     2        2.0 MiB  ?     1: 2
worker-1 did not say how many rows it computed: no answer

LAYERS  EXPERTS  RESIDENT  MIN REPLICAS  MAX REPLICAS
1       3        3         1             2
";
    assert_eq!(report.text(true), expected);
}

#[test]
fn an_expert_without_a_holder_shows() {
    let mut state = small();
    state.workers.pop_first();
    let report = Report::of(&cluster("demo"), &state, &BTreeMap::new());
    assert_eq!((report.layers[0].resident, report.layers[0].min_replicas), (2, 0));
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["workers"][0]["resident"]["1"], serde_json::json!([1, 2]));
    assert!(json["workers"][0].get("rows").is_none());
}

#[test]
fn layers_that_look_the_same_share_a_range() {
    let resident = BTreeMap::from([(1, vec![0, 1]), (2, vec![2, 3]), (3, vec![0]), (5, vec![0])]);
    assert_eq!(ranges(&resident), "1-2: 2, 3: 1, 5: 1");
}
