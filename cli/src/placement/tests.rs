//! Stories about finding a cluster in a store and about what is printed of it.

use conclave_placement::store::memory::MemoryStore;

use super::*;
use crate::up::ready::tests::state;

/// Three experts; worker-0 holds two of them, worker-1 two, one is held twice.
fn small() -> ClusterState {
    state(2, &[&[0], &[1], &[0, 1]])
}

fn cluster(name: &str) -> Cluster {
    Cluster::parse(name).unwrap()
}

async fn store_with(names: &[&str]) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    for name in names {
        let keys = Keys::new(&cluster(name));
        for router in small().routers.values_mut() {
            router.inference_address = format!("{name}:7400");
            store.put(&keys.router(&router.id), router.encode(), None).await.unwrap();
        }
    }
    store
}

fn ready(inference: &str) -> Ready {
    Ready {
        inference: inference.to_owned(),
        admin: String::new(),
        routers: Vec::new(),
        workers: Vec::new(),
        store: String::new(),
    }
}

#[tokio::test]
async fn the_only_cluster_needs_no_name() {
    let store = store_with(&["alone"]).await;
    let (found, state) = find(&store, None, None).await.unwrap();
    assert_eq!((found.as_str(), state.routers.len()), ("alone", 1));
}

#[tokio::test]
async fn several_clusters_are_named_in_the_refusal() {
    let store = store_with(&["a", "b"]).await;
    let error = find(&store, None, None).await.unwrap_err().to_string();
    assert!(error.ends_with("--cluster: a, b"), "{error}");
    assert_eq!(find(&store, Some(cluster("b")), None).await.unwrap().0.as_str(), "b");
}

#[tokio::test]
async fn a_ready_file_finds_its_cluster_by_the_routers_address() {
    let store = store_with(&["a", "b"]).await;
    assert_eq!(find(&store, None, Some(&ready("b:7400"))).await.unwrap().0.as_str(), "b");
    assert!(find(&store, None, Some(&ready("c:7400"))).await.is_err());
}

#[test]
fn keys_name_their_clusters() {
    let keys = ["/conclave/b/plan", "/conclave/a/model", "/conclave/a/workers/w", "/conclave/BAD/model", "/other/c/d"];
    assert_eq!(clusters(keys.into_iter()), [cluster("a"), cluster("b")]);
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
