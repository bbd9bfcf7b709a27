//! Stories about finding a cluster in a store.

use conclave_placement::store::memory::MemoryStore;

use super::*;
use crate::up::ready::tests::state;

fn cluster(name: &str) -> Cluster {
    Cluster::parse(name).unwrap()
}

async fn store_with(names: &[&str]) -> Arc<dyn Store> {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    for name in names {
        let keys = Keys::new(&cluster(name));
        for router in state(2, &[&[0], &[1], &[0, 1]]).routers.values_mut() {
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
