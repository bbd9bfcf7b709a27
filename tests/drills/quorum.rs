//! etcd has three members, and one of them goes; or the one there is has no room left on its disk.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use conclave_placement::state::ClusterState;
use conclave_tests::{
    cluster::Cluster,
    drill::{Aim, Drill},
    etcd::EtcdProcess,
    eventually::eventually,
    process::Signal,
};
use etcd_client::{AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions, GetOptions, KeyValue};

use crate::scene::{self, begin};

/// Longer than the lease ttl of 5 s.
const GONE: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(30));

const WORKERS: usize = 2;

async fn on_three_members() -> (Cluster, [EtcdProcess; 3]) {
    let members = EtcdProcess::start_three().await;
    let addresses = members.each_ref().map(EtcdProcess::address).join(",");
    let cluster = scene::builder(WORKERS, 2).store(&format!("etcd={addresses}")).start().await;
    (cluster, members)
}

/// The member that leads the others.
async fn leader(members: &[EtcdProcess]) -> usize {
    eventually("etcd's leader", async || {
        for (index, member) in members.iter().enumerate() {
            let status = Client::connect([member.address()], None).await.ok()?.status().await.ok()?;
            if status.header()?.member_id() == status.leader() {
                return Some(index);
            }
        }
        None
    })
    .await
}

fn all_there(state: &ClusterState) -> bool {
    state.workers.len() == WORKERS && state.routers.len() == 1 && state.leader.is_some()
}

/// Counts how often somebody goes missing from the store, from now on. Not forbidden: etcd's own election takes one or two of
/// a lease's five seconds.
fn count_losses(cluster: &Cluster) -> Arc<AtomicU64> {
    let (mut changes, losses) = (cluster.changes(), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&losses);
    tokio::spawn(async move {
        let mut missing = false;
        while changes.changed().await.is_ok() {
            let state = changes.borrow_and_update();
            let now = state.workers.len() < WORKERS || state.routers.is_empty();
            counted.fetch_add(u64::from(now && !missing), Relaxed);
            missing = now;
        }
    });
    losses
}

/// The cluster's processes reach the store still: a router tells its load again and again, which is a write.
async fn writes_go_on(cluster: &Cluster, member: &EtcdProcess) {
    let mut client = Client::connect([member.address()], None).await.expect("a member that was spared answers");
    let mut revision = async || {
        let listing = client.get(cluster.keys.prefix(), Some(GetOptions::new().with_prefix())).await.ok()?;
        listing.kvs().iter().map(KeyValue::mod_revision).max()
    };
    let before = eventually("keys", &mut revision).await;
    eventually("a write of the cluster", async || revision().await.filter(|now| *now > before)).await;
}

async fn ends(cluster: Cluster, mut drill: Drill, losses: Arc<AtomicU64>) {
    cluster.until("everybody to be there", all_there).await;
    drill.over();
    drill.note("lost_registrations", losses.load(Relaxed));
    drill.end().await;
}

#[tokio::test]
async fn the_leader_of_three_members_is_killed() {
    let _alone = scene::alone().await;
    let (cluster, mut members) = on_three_members().await;
    let mut drill = begin(Aim::unnoticed("11", "kill -9 of the leader of three etcd members", 2), &cluster).await;
    let (losses, leads) = (count_losses(&cluster), leader(&members).await);
    drill.fault();
    members[leads].kill().await;
    let (short, full) = GONE;
    drill.goes_on(drill.form().pick(short, full)).await;
    writes_go_on(&cluster, &members[(leads + 1) % 3]).await;
    members[leads].restart().await;
    ends(cluster, drill, losses).await;
}

#[tokio::test]
async fn the_leader_of_three_members_freezes() {
    let _alone = scene::alone().await;
    let (cluster, members) = on_three_members().await;
    let mut drill = begin(Aim::unnoticed("11", "SIGSTOP of the leader of three etcd members", 2), &cluster).await;
    let losses = count_losses(&cluster);
    drill.fault();
    for _ in 0..drill.form().pick(1, 3) {
        let leads = leader(&members).await;
        members[leads].signal(Signal::STOP);
        let (short, full) = GONE;
        drill.goes_on(drill.form().pick(short, full / 3)).await;
        writes_go_on(&cluster, &members[(leads + 1) % 3]).await;
        members[leads].signal(Signal::CONT);
    }
    ends(cluster, drill, losses).await;
}

/// No lease can be granted then and no key written; what is there can be read, kept alive and deleted.
#[tokio::test]
async fn the_disk_of_etcd_is_full() {
    let _alone = scene::alone().await;
    let etcd = EtcdProcess::start_with(&["--quota-backend-bytes=4194304"]).await;
    let cluster = scene::builder(WORKERS, 2).store(&etcd.spec()).start().await;
    let aim = Aim::unnoticed("25", "etcd has no space left, and everybody's lease is revoked", 2);
    let mut drill = begin(aim, &cluster).await;
    let mut client = Client::connect([etcd.address()], None).await.expect("etcd answers");
    drill.fault();
    let refusal =
        eventually("etcd to be full", async || client.put("fill", vec![0; 200 << 10], None).await.err()).await;
    assert!(refusal.to_string().contains("space"), "{refusal}");
    let listing = client.get(cluster.keys.prefix(), Some(GetOptions::new().with_prefix())).await.expect("etcd answers");
    for lease in listing.kvs().iter().map(KeyValue::lease).filter(|lease| *lease != 0) {
        // Another key of the same lease may have had it revoked.
        let _ = client.lease_revoke(lease).await;
    }
    let (short, full) = GONE;
    drill.goes_on(drill.form().pick(short, full)).await;
    client.delete("fill", None).await.expect("a full etcd deletes");
    let now = client.get("nothing", None).await.expect("etcd answers").header().expect("a header").revision();
    client.compact(now, Some(CompactionOptions::new().with_physical())).await.expect("etcd compacts");
    client.defragment().await.expect("etcd gives room back");
    let member = client.status().await.expect("etcd answers").header().expect("a header").member_id();
    let mut whose = AlarmOptions::new();
    whose.with_member(member);
    client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(whose)).await.expect("etcd is disarmed");
    client.put("nothing", "fits again", None).await.expect("etcd has room again");
    cluster.until("everybody to be registered", all_there).await;
    cluster.held(2).await;
    drill.flows(200).await;
    drill.over();
    drill.end().await;
}
