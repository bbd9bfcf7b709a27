//! Routers come and go; clients resume at another one.

use conclave_tests::{cluster::Cluster, drill::Aim};

use crate::scene::{self, begin};

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
async fn one_of_two_routers_restarts() {
    let _alone = scene::alone().await;
    let mut cluster = two_routers().await;
    let mut drill = begin(Aim::unnoticed("15", "restart (SIGTERM) of one of two routers", 2), &cluster).await;
    drill.fault();
    let status = cluster.routers[0].terminate().await;
    assert!(status.success(), "a drained router ended with {status}");
    cluster.routers[0].again().await;
    cluster.router_serves(0).await;
    drill.over();
    drill.end().await;
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
