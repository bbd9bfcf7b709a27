//! Routers come and go; clients resume at another one.

use conclave_tests::{
    cluster::Cluster,
    drill::{Aim, Drill},
    eventually::eventually,
    metrics::figure,
};

use crate::{
    placement::leaves,
    scene::{self, begin},
};

async fn two_routers() -> Cluster {
    scene::builder(2, 2).routers(2).start().await
}

#[tokio::test]
async fn one_of_two_routers_is_killed() {
    let _alone = scene::alone().await;
    let mut cluster = two_routers().await;
    let leader = cluster.leader().await;
    let mut drill = begin(Aim::unnoticed("16", "kill -9 of one of two routers, the leader", 2), &cluster).await;
    drill.fault();
    cluster.routers[leader].kill().await;
    let other = cluster.routers[1 - leader].name().to_owned();
    let leads = |state: &conclave_placement::state::ClusterState| {
        state.leader.as_ref().is_some_and(|leader| leader.to_string() == other)
    };
    cluster.until("the other router to lead", leads).await;
    drill.over();
    let report = drill.end().await;
    assert!(report.resumed > 0, "no stream was at the router that died");
}

#[tokio::test]
async fn both_routers_restart_one_after_the_other() {
    let _alone = scene::alone().await;
    let mut cluster = two_routers().await;
    let addresses = cluster.router_addresses().await;
    let mut drill = begin(Aim::unnoticed("15", "rolling restart (SIGTERM) of both routers", 2), &cluster).await;
    drill.fault();
    for (index, address) in addresses.iter().enumerate() {
        leaves(&mut cluster.routers[index]).await;
        // On the port that clients know, as an operator would.
        cluster.routers[index].again_with(&format!("--listen={address}")).await;
        cluster.router_serves(index).await;
    }
    drill.over();
    drill.end().await;
}

/// No fault. Rows of two routers that wait at a worker are computed together, and the answers are as if they were not.
#[tokio::test]
async fn rows_of_two_routers_meet_in_a_worker() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(1, 1).routers(2).start().await;
    let worker = &cluster.workers[0];
    let admin = eventually("a worker to say where it tells", async || worker.told("admin")).await;
    let work = scene::work(&cluster).await.streams(16);
    let aim = Aim::unnoticed("0", "no fault: two routers, 16 streams, one worker", 1);
    let mut drill = Drill::begin(aim, &cluster, work).await;
    let groups = async || {
        let of = async |part: &str| figure(&admin, &format!("conclave_worker_group_batches_{part}")).await;
        (of("sum").await, of("count").await)
    };
    drill.fault();
    let before = groups().await;
    drill.flows(2_000).await;
    let after = groups().await;
    drill.over();
    let mean = (after.0 - before.0) / (after.1 - before.1);
    drill.note("batches_computed_together", (mean * 100.0).round() / 100.0);
    drill.end().await;
    assert!(mean > 1.0, "no two batches ever met in {} groups", after.1 - before.1);
}

#[tokio::test]
async fn the_leader_is_lost_and_then_a_worker() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(3, 1).routers(2).start().await;
    let leader = cluster.leader().await;
    let mut drill =
        begin(Aim::waited_out("13", "the leader is killed, then a worker: the next leader plans", 1), &cluster).await;
    drill.fault();
    cluster.routers[leader].kill().await;
    cluster.workers[0].kill().await;
    cluster.worker_gone(0).await;
    cluster.held(1).await;
    drill.over();
    assert_eq!(cluster.leader().await, 1 - leader);
    drill.end().await;
}
