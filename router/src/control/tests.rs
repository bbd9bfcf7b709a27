//! Stories of a controller that leads, in time that passes at once.

use std::collections::BTreeMap;

use conclave_placement::{
    ids::{Cluster, Incarnation, WorkerId},
    policy::{Planner, Rebalancing},
    state::{LeaderRecord, ModelIdentity, WorkerRecord, WorkerState},
    store::memory::MemoryStore,
};

use super::*;

fn model() -> ModelIdentity {
    ModelIdentity::new("m".to_owned(), ["a".to_owned(), "b".to_owned()], 2, std::iter::once(1), 8, 10)
}

fn cluster(workers: &[&str]) -> Arc<ClusterState> {
    let worker = |name: &&str| {
        let id = WorkerId::parse(name).unwrap();
        let starting = WorkerRecord::starting(id.clone(), Incarnation::fresh(), "127.0.0.1:7500");
        (id, WorkerRecord { state: WorkerState::Serving, ..starting })
    };
    Arc::new(ClusterState {
        model: Some(model()),
        workers: workers.iter().map(worker).collect(),
        routers: BTreeMap::new(),
        ..ClusterState::empty()
    })
}

/// A controller that leads by `policy`, and what it has published.
struct Leading {
    store: Arc<dyn Store>,
    keys: Keys,
    cluster: watch::Sender<Arc<ClusterState>>,
    _term: watch::Sender<Option<Term>>,
}

impl Leading {
    async fn start(min_workers: usize) -> Self {
        let (store, keys) = (Arc::new(MemoryStore::new()), Keys::new(&Cluster::parse("c").unwrap()));
        let author = RouterId::parse("r").unwrap();
        let leader = LeaderRecord { router: author.clone(), incarnation: Incarnation::fresh() };
        store.put(&keys.leader(), leader.encode(), None).await.unwrap();
        let revision = store.get(&keys.leader()).await.unwrap().unwrap().mod_revision;
        let lease = store.grant(Duration::from_secs(3600)).await.unwrap();
        let (term, leads) = watch::channel(Some(Term { lease, revision }));
        let (cluster, changes) = watch::channel(Arc::new(ClusterState::empty()));
        let rebalance = Rebalancing { period: Duration::from_secs(60), below: 0.5, gain: 0.05 };
        let controller = Controller {
            store: store.clone(),
            keys: keys.clone(),
            author,
            policy: Policy { planner: Planner::Balanced, replicas: 1, redundant: Some(0), min_workers, rebalance },
            metrics: PlacementMetrics::register(&conclave_runtime::admin::registry()),
        };
        tokio::spawn(controller.run(changes, leads, CancellationToken::new()));
        Self { store, keys, cluster, _term: term }
    }

    /// Who is named by the plan in force, once the controller has nothing more to do: paused time goes on only then, and not
    /// while the planner's thread works either.
    async fn planned(&self) -> Option<Vec<String>> {
        tokio::time::sleep(Duration::from_secs(1)).await;
        self.plan().await
    }

    async fn plan(&self) -> Option<Vec<String>> {
        let entry = self.store.get(&self.keys.plan()).await.unwrap()?;
        let plan = Plan::decode(&entry.value).unwrap();
        let mut names: Vec<_> = plan.iter().flat_map(|(.., holders)| holders.iter().map(ToString::to_string)).collect();
        names.sort();
        names.dedup();
        Some(names)
    }
}

fn both() -> Vec<String> {
    ["w0", "w1"].map(str::to_owned).to_vec()
}

#[tokio::test(start_paused = true)]
async fn the_first_plan_waits_for_workers_but_not_for_one_that_never_comes() {
    let leading = Leading::start(3).await;
    assert_eq!(leading.planned().await, None, "nobody is there");
    tokio::time::sleep(10 * FIRST_PLAN_WITHIN).await;
    leading.cluster.send_replace(cluster(&["w0"]));
    tokio::time::sleep(FIRST_PLAN_WITHIN / 2).await;
    leading.cluster.send_replace(cluster(&["w0", "w1"]));
    tokio::time::sleep(FIRST_PLAN_WITHIN / 4).await;
    assert_eq!(leading.planned().await, None, "the third may come");
    tokio::time::sleep(FIRST_PLAN_WITHIN / 2).await;
    assert_eq!(leading.planned().await, Some(both()));
}

#[tokio::test(start_paused = true)]
async fn the_first_plan_is_made_as_soon_as_all_are_there() {
    let leading = Leading::start(2).await;
    leading.cluster.send_replace(cluster(&["w0"]));
    assert_eq!(leading.planned().await, None);
    leading.cluster.send_replace(cluster(&["w0", "w1"]));
    assert_eq!(leading.planned().await, Some(both()));
}
