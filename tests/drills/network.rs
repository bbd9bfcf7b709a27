//! The network between the router and one worker of four breaks. Both processes are well.

use std::time::Duration;

use conclave_placement::state::ClusterState;
use conclave_tests::{
    chaos::{Fault, Proxy, Way},
    cluster::{Cluster, held_everywhere, worker_id},
    drill::{Aim, SECOND},
    report::Report,
    vitals::Vitals,
};

use crate::scene::{self, begin, four_workers_one_behind_a_proxy};

/// The fault, for as long as it takes that 500 tokens come and some seconds pass; then the network is well again.
async fn breaks(aim: Aim, fault: Fault) -> Report {
    let (cluster, proxy) = four_workers_one_behind_a_proxy().await;
    broken(aim, &cluster, &proxy, fault).await
}

async fn broken(aim: Aim, cluster: &Cluster, proxy: &Proxy, fault: Fault) -> Report {
    let mut drill = begin(aim, cluster).await;
    drill.fault();
    proxy.set(fault);
    drill.goes_on(drill.form().pick(Duration::from_secs(2), Duration::from_secs(30))).await;
    drill.flows(500).await;
    proxy.set(Fault::None);
    drill.over();
    drill.end().await
}

#[tokio::test]
async fn a_black_hole() {
    let _alone = scene::alone().await;
    breaks(
        Aim::unnoticed("3", "black hole before one worker of four", 2)
            .detected_within(2 * SECOND)
            .flows_within(2 * SECOND),
        Fault::Hole(Way::Both),
    )
    .await;
}

#[tokio::test]
async fn answers_alone_are_lost() {
    let _alone = scene::alone().await;
    breaks(
        Aim::unnoticed("5", "one-way partition: answers of one worker of four do not arrive", 2)
            .detected_within(2 * SECOND)
            .flows_within(2 * SECOND),
        Fault::Hole(Way::ToRouter),
    )
    .await;
}

/// The store reaches the worker, no router does. Nobody else has its experts.
#[tokio::test]
async fn a_worker_is_out_of_reach_and_alone_has_its_experts() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(3, 1).guests(1).launch().await;
    let proxy = Proxy::start().await;
    cluster.add_worker_behind(&proxy).await;
    cluster.ready().await;
    let aim = Aim {
        stall: Some(Duration::from_secs(20)),
        ..Aim::unnoticed("3", "black hole that stays before one worker of four, no replicas", 1)
    };
    let mut drill = begin(aim, &cluster).await;
    drill.fault();
    proxy.set(Fault::Hole(Way::Both));
    let away = worker_id(3);
    cluster
        .until("its experts to be elsewhere", |state| {
            let mut others = ClusterState::clone(state);
            others.workers.remove(&away).is_some() && held_everywhere(&others, 1)
        })
        .await;
    drill.flows(500).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn one_side_hears_that_the_other_has_ended() {
    let _alone = scene::alone().await;
    breaks(Aim::unnoticed("4", "half of every connection to one worker of four is closed", 2), Fault::HalfClose).await;
}

/// The end of a dead worker's connections is heard late: until then they look alive and carry nothing.
#[tokio::test]
async fn the_end_of_a_worker_is_heard_late() {
    let _alone = scene::alone().await;
    let (mut cluster, proxy) = four_workers_one_behind_a_proxy().await;
    let aim = Aim::unnoticed("4", "kill -9 of one worker of four, whose connections close 2 s later", 2);
    let mut drill = begin(aim, &cluster).await;
    drill.fault();
    proxy.set(Fault::SlowClose(Duration::from_secs(2)));
    cluster.workers[3].kill().await;
    cluster.worker_gone(3).await;
    cluster.held(2).await;
    drill.flows(500).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn every_hundredth_packet_is_lost() {
    let _alone = scene::alone().await;
    let (cluster, proxy) = four_workers_one_behind_a_proxy().await;
    let aim = Aim::unnoticed("7", "1 % loss before one worker of four, as TCP shows it", 2);
    let fault = Fault::Lossy { every: 100, wait: Duration::from_millis(200) };
    in_bounded_memory(aim, &cluster, &proxy, fault).await;
}

/// As [`broken`]; what waits in the router meanwhile must be bounded.
async fn in_bounded_memory(aim: Aim, cluster: &Cluster, proxy: &Proxy, fault: Fault) {
    let router = cluster.routers[0].pid().expect("it runs");
    let before = Vitals::of(router).expect("it lives").anonymous_kib;
    broken(aim, cluster, proxy, fault).await;
    let after = Vitals::of(router).expect("it lives").anonymous_kib;
    assert!(after < before + (64 << 10), "the router grew from {before} to {after} KiB");
}

#[tokio::test]
async fn connections_are_reset() {
    let _alone = scene::alone().await;
    breaks(
        Aim::unnoticed("4", "every connection to one worker of four is reset", 2)
            .detected_within(SECOND)
            .flows_within(SECOND),
        Fault::Refuse,
    )
    .await;
}

#[tokio::test]
async fn connections_are_reset_again_and_again() {
    let _alone = scene::alone().await;
    let (cluster, proxy) = four_workers_one_behind_a_proxy().await;
    let mut drill = begin(Aim::unnoticed("4", "resets in the middle, ten times over", 2), &cluster).await;
    drill.fault();
    for _ in 0..10 {
        proxy.reset();
        drill.flows(500).await;
    }
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn one_worker_is_slow() {
    let _alone = scene::alone().await;
    breaks(
        Aim::unnoticed("6", "one worker of four answers 100 ms late", 2).detected_within(2 * SECOND).keeps(0.8),
        Fault::Late(Duration::from_millis(100)),
    )
    .await;
}

#[tokio::test]
async fn the_line_is_narrow() {
    let _alone = scene::alone().await;
    let (cluster, proxy) = four_workers_one_behind_a_proxy().await;
    // The golden model's rows are small: this is to its traffic what 10 Mbit/s are to a large model's.
    let aim = Aim::unnoticed("7", "20 kB/s to one worker of four", 2);
    in_bounded_memory(aim, &cluster, &proxy, Fault::Narrow(20_000)).await;
}

/// Bits that change on the way, where TCP's own checksum does not see it: in a proxy, in memory.
#[tokio::test]
async fn bits_of_answers_are_flipped() {
    let _alone = scene::alone().await;
    let aim =
        Aim::unnoticed("10", "one bit in 4 KiB of one worker's answers is flipped", 2).detected_within(2 * SECOND);
    let report = breaks(aim, Fault::Flip(Way::ToRouter, 4096)).await;
    // A bit of a row is told by the checksum; one of HTTP/2's own frames ends the stream, or has it wait for what never comes.
    let noticed = ["corrupt", "lost", "hedges"].map(|figure| report.counted(figure)).iter().sum::<f64>();
    assert!(noticed > 0.0, "nobody noticed: {:?}", report.notes);
}

#[tokio::test]
async fn bits_of_requests_are_flipped() {
    let _alone = scene::alone().await;
    let aim = Aim::unnoticed("10", "one bit in 4 KiB of what one worker is sent is flipped", 2);
    let report = breaks(aim, Fault::Flip(Way::ToWorker, 4096)).await;
    let noticed = ["refused", "lost", "hedges"].map(|figure| report.counted(figure)).iter().sum::<f64>();
    assert!(noticed > 0.0, "nobody noticed: {:?}", report.notes);
}
