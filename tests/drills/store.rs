//! etcd dies, freezes, forgets. The data path does not read it.

use std::time::Duration;

use conclave_tests::{cluster::worker_id, drill::Aim};

use crate::scene::{self, begin};

/// Lease ttls of the cluster's processes are 5 s: a few of them, and a minute.
const AWAY: (Duration, Duration) = (Duration::from_secs(12), Duration::from_secs(60));

#[tokio::test]
async fn etcd_is_away() {
    let mut cluster = scene::builder(2, 2).start().await;
    let mut drill =
        begin(Aim::unnoticed("11", "etcd killed, later back; a worker starts meanwhile", 2), &cluster).await;
    drill.fault();
    cluster.etcd.as_mut().expect("its own").kill().await;
    let (short, full) = AWAY;
    drill.goes_on(drill.form().pick(short, full)).await;
    cluster.add_worker();
    drill.flows(200).await;
    cluster.etcd.as_mut().expect("its own").restart().await;
    let newcomer = worker_id(2);
    cluster
        .until("all workers to be there", |state| state.workers.len() == 3 && state.workers.contains_key(&newcomer))
        .await;
    drill.over();
    drill.end().await;
}
