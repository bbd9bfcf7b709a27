//! etcd dies, freezes, forgets. The data path does not read it.

use std::time::Duration;

use conclave_tests::{
    cluster::{Cluster, worker_id},
    drill::Aim,
    eventually::eventually,
    process::Signal,
};
use etcd_client::{Client, GetOptions};

use crate::scene::{self, begin};

/// Lease ttls of the cluster's processes are 5 s: longer than that, and a minute.
const AWAY: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(60));

#[tokio::test]
async fn etcd_is_away() {
    let _alone = scene::alone().await;
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

#[tokio::test]
async fn etcd_freezes_and_wakes_up() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(2, 2).start().await;
    let mut drill =
        begin(Aim::unnoticed("12", "etcd stopped (SIGSTOP) beyond every lease, then awake", 2), &cluster).await;
    let etcd = cluster.etcd.as_ref().expect("its own");
    drill.fault();
    etcd.signal(Signal::STOP);
    let (short, full) = AWAY;
    drill.goes_on(drill.form().pick(short, full)).await;
    etcd.signal(Signal::CONT);
    let mut client = connect(&cluster).await;
    eventually("everybody to be registered", async || (leases(&mut client, &cluster).await.len() >= 3).then_some(()))
        .await;
    drill.flows(200).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn every_lease_is_revoked_and_history_compacted() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(2, 2).start().await;
    let mut drill =
        begin(Aim::unnoticed("12", "every lease revoked, then history compacted under the watches", 2), &cluster).await;
    let mut client = connect(&cluster).await;
    drill.fault();
    for _ in 0..drill.form().pick(2, 10) {
        let before = leases(&mut client, &cluster).await;
        for lease in &before {
            // Another key of the same lease may have had it revoked.
            let _ = client.lease_revoke(*lease).await;
        }
        let now = client.get("nothing", None).await.expect("etcd answers").header().expect("a header").revision();
        client.compact(now, None).await.expect("etcd compacts");
        eventually("everybody to register again", async || {
            let after = leases(&mut client, &cluster).await;
            (after.len() == before.len() && after.iter().all(|lease| !before.contains(lease))).then_some(())
        })
        .await;
    }
    drill.over();
    drill.end().await;
}

async fn connect(cluster: &Cluster) -> Client {
    let address = cluster.etcd.as_ref().expect("its own").address();
    Client::connect([address], None).await.expect("etcd answers")
}

/// The leases that keys of `cluster` live under: each process has one, the leader two.
async fn leases(client: &mut Client, cluster: &Cluster) -> std::collections::BTreeSet<i64> {
    let listing = client.get(cluster.keys.prefix(), Some(GetOptions::new().with_prefix())).await.expect("etcd answers");
    listing.kvs().iter().map(etcd_client::KeyValue::lease).filter(|lease| *lease != 0).collect()
}
