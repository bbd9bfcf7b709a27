//! What most drills begin with.
//!
//! In: how many workers and replicas. Out: a cluster that serves, and the usual load on it. Never here: a fault.

use conclave_tests::{
    chaos::Proxy,
    cluster::{Builder, Cluster},
    drill::{Aim, Drill},
    golden::Golden,
    load::Work,
};
use tokio::sync::{Mutex, MutexGuard};

/// Drills measure stalls: whoever has this runs alone, where all run in one process. nextest sees to the same.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// The model that all drills serve: two layers of 16 experts, four to a token.
pub fn model() -> Golden {
    Golden::named("v3")
}

/// A cluster to be built, of that model.
pub fn builder(workers: usize, replicas: usize) -> Builder {
    Cluster::builder(&model().folder).workers(workers).replicas(replicas)
}

/// Four workers, each expert on two of them, one router.
pub async fn four_workers() -> Cluster {
    builder(4, 2).start().await
}

/// As [`four_workers`], the last of them (`worker-3`) reached through a proxy.
pub async fn four_workers_one_behind_a_proxy() -> (Cluster, Proxy) {
    let mut cluster = builder(3, 2).guests(1).launch().await;
    let proxy = Proxy::start().await;
    cluster.add_worker_behind(&proxy).await;
    cluster.ready().await;
    (cluster, proxy)
}

/// The usual work on every router of `cluster`.
pub async fn work(cluster: &Cluster) -> Work {
    Work::usual(&model(), cluster.router_addresses().await).await
}

/// The usual work on one of its routers.
pub async fn work_on(cluster: &Cluster, router: usize) -> Work {
    Work::usual(&model(), vec![cluster.router_address(router).await]).await
}

/// The usual work is under way.
pub async fn begin(aim: Aim, cluster: &Cluster) -> Drill {
    Drill::begin(aim, cluster, work(cluster).await).await
}
