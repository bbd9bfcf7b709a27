//! etcd dies, freezes, forgets. The data path does not read it.

use std::time::Duration;

use conclave_tests::{
    cluster::{Cluster, worker_id},
    drill::{Aim, Drill},
    eventually::eventually,
    process::Signal,
};
use etcd_client::{Client, GetOptions};

use crate::scene::{self, begin};

/// Lease ttls of the cluster's processes are 5 s: longer than that, and a minute.
const AWAY: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(60));

/// Seconds that a lease of 5 s, lately renewed, lives on.
const RENEWED: i64 = 3;

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
        .until("everybody to be there", |state| {
            let routers = state.routers.len() == 1 && state.leader.is_some() && state.loads.len() == 1;
            routers && state.workers.len() == 3 && state.workers.contains_key(&newcomer)
        })
        .await;
    cluster.until("the newcomer to serve", |state| !state.workers[&newcomer].resident.is_empty()).await;
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
    let before = leases(&mut connect(&cluster).await, &cluster).await;
    drill.fault();
    etcd.signal(Signal::STOP);
    let (short, full) = AWAY;
    drill.goes_on(drill.form().pick(short, full)).await;
    etcd.signal(Signal::CONT);
    let mut client = connect(&cluster).await;
    // An etcd that slept renews what it had when it wakes, so old leases may live on: each process has one in any case, and
    // each was renewed since.
    eventually("everybody to be registered", async || {
        let now = leases(&mut client, &cluster).await;
        for lease in &now {
            if client.lease_time_to_live(*lease, None).await.ok()?.ttl() < RENEWED {
                return None;
            }
        }
        (now.len() >= before.len()).then_some(())
    })
    .await;
    let state = cluster.state();
    assert_eq!((state.workers.len(), state.routers.len(), state.leader.is_some()), (2, 1, true));
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

/// A router's watch is behind by more than etcd remembers: it must list anew.
#[tokio::test]
async fn history_is_compacted_while_a_router_sleeps() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(2, 2).routers(2).start().await;
    let sleeper = 1 - cluster.leader().await;
    let work = scene::work_on(&cluster, 1 - sleeper).await;
    let aim = Aim::unnoticed("12", "history compacted beyond the watch of a router that slept", 2);
    let mut drill = Drill::begin(aim, &cluster, work).await;
    drill.fault();
    cluster.routers[sleeper].signal(Signal::STOP);
    cluster.add_worker();
    let newcomer = worker_id(2);
    cluster.until("a newcomer", |state| state.workers.contains_key(&newcomer)).await;
    let mut client = connect(&cluster).await;
    let now = client.get("nothing", None).await.expect("etcd answers").header().expect("a header").revision();
    client.compact(now, None).await.expect("etcd compacts");
    // With its process goes every watch and what it had buffered for them.
    cluster.etcd.as_mut().expect("its own").restart().await;
    cluster.routers[sleeper].signal(Signal::CONT);
    cluster.until("both routers to be there", |state| state.routers.len() == 2).await;
    cluster
        .until("both routers to follow the plan in force", |state| {
            let plan = state.plan.as_ref().map(|plan| plan.version);
            state.routers.values().all(|router| Some(router.plan_version) == plan)
        })
        .await;
    drill.flows(200).await;
    drill.over();
    drill.end().await;
}

/// Somebody deletes everything, or a backup of another cluster is restored over it.
#[tokio::test]
async fn the_store_loses_everything() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(3, 2).routers(2).start().await;
    let aim = Aim::unnoticed("12", "all keys of the cluster are deleted", 2);
    let mut drill = begin(aim, &cluster).await;
    let before = cluster.state().plan.as_ref().expect("it serves").version;
    drill.fault();
    cluster.store.delete_prefix(cluster.keys.prefix()).await.expect("the store answers");
    cluster
        .until("everything to be back", |state| {
            let members = (state.workers.len(), state.routers.len(), state.leader.is_some());
            let plan = state.plan.as_ref().is_some_and(|plan| plan.version > before);
            state.model.is_some() && members == (3, 2, true) && plan
        })
        .await;
    cluster.held(2).await;
    drill.flows(200).await;
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
