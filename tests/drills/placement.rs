//! Experts move while tokens are in flight.

use std::time::{Duration, Instant};

use conclave_tests::{
    checkpoint::Copy,
    cluster::{Cluster, worker_id},
    drill::Aim,
    process::{Process, binary},
};

use crate::scene::{self, begin};

/// What a process that leaves may take: `--drain-grace`, which is 30 s unless told, and a little.
const LEAVES_WITHIN: Duration = Duration::from_secs(35);

/// Asks `process` to leave; it must do so well and in time. Tells how long it took.
pub async fn leaves(process: &mut Process) -> Duration {
    let asked = Instant::now();
    let status = process.terminate().await;
    let took = asked.elapsed();
    assert!(status.success(), "asked to leave, {} ended with {status}", process.name());
    assert!(took < LEAVES_WITHIN, "{} took {took:?} to leave", process.name());
    took
}

#[tokio::test]
async fn all_workers_restart_one_after_another() {
    let _alone = scene::alone().await;
    let mut cluster = scene::four_workers().await;
    let mut drill =
        begin(Aim::unnoticed("15", "rolling restart (SIGTERM) of all four workers", 2).keeps(0.8), &cluster).await;
    drill.fault();
    let mut slowest = Duration::ZERO;
    for index in 0..4 {
        slowest = slowest.max(leaves(&mut cluster.workers[index]).await);
        cluster.workers[index].again().await;
        let back = worker_id(index);
        cluster.until("the worker to be back", |state| state.workers.contains_key(&back)).await;
        cluster.held(2).await;
    }
    drill.note("slowest_to_leave", format!("{} ms", slowest.as_millis()));
    drill.over();
    drill.end().await;
}

/// No replicas: nobody but the worker that leaves holds what it holds, so it must stay until others do.
#[tokio::test]
async fn the_only_holders_restart_one_after_another() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(3, 1).start().await;
    let mut drill = begin(Aim::unnoticed("15", "rolling restart of three workers, no replicas", 1), &cluster).await;
    drill.fault();
    let mut slowest = Duration::ZERO;
    for index in 0..3 {
        slowest = slowest.max(leaves(&mut cluster.workers[index]).await);
        cluster.workers[index].again().await;
        let back = worker_id(index);
        cluster.until("the worker to be back", |state| state.workers.contains_key(&back)).await;
        cluster.held(1).await;
    }
    drill.note("slowest_to_leave", format!("{} ms", slowest.as_millis()));
    drill.over();
    drill.end().await;
}

/// Its answers would be other ones: it must not come to hold anything.
#[tokio::test]
async fn a_worker_with_another_checkpoint_comes() {
    let _alone = scene::alone().await;
    let cluster = scene::four_workers().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let other = Copy::of(&scene::model().folder, folder.path().join("other"));
    other.scramble("model-00004-of-00004.safetensors");
    let aim = Aim::unnoticed("10", "a worker with another checkpoint wants to join", 2);
    let mut drill = begin(aim, &cluster).await;
    drill.fault();
    let arguments = cluster.arguments("worker-4", &other.folder);
    let mut stranger = Process::spawn("worker-4", &binary("conclave-expert-worker"), &arguments, cluster.log_folder());
    let status = stranger.ended().await;
    assert!(!status.success(), "a stranger joined and ended with {status}");
    let log = stranger.log();
    assert!(log.contains("checkpoint_digest"), "it does not say why:\n{log}");
    assert!(!cluster.state().workers.contains_key(&worker_id(4)), "a stranger is registered");
    drill.flows(500).await;
    drill.over();
    drill.end().await;
}

/// Assignments computed so far by each worker that lives.
async fn rows(cluster: &Cluster, workers: impl Iterator<Item = usize>) -> Vec<u64> {
    let mut rows = Vec::new();
    for index in workers {
        rows.push(cluster.inventory(index).await.rows_total);
    }
    rows
}

#[tokio::test]
async fn two_workers_become_four_and_two_again() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(2, 1).start().await;
    let mut drill = begin(Aim::unnoticed("15", "two workers become four, then two again", 1), &cluster).await;
    drill.fault();
    for _ in 0..2 {
        cluster.add_worker();
    }
    let holds = |state: &conclave_placement::state::ClusterState| {
        [2, 3].map(worker_id).iter().all(|id| state.workers.get(id).is_some_and(|worker| !worker.resident.is_empty()))
    };
    cluster.until("the newcomers to hold experts", holds).await;
    let before = rows(&cluster, 0..4).await;
    drill.flows(1_000).await;
    let grown: Vec<u64> = rows(&cluster, 0..4).await.iter().zip(before).map(|(now, before)| now - before).collect();
    drill.note("rows_of_each_of_four", format!("{grown:?}"));
    assert!(grown.iter().all(|rows| *rows > 0), "rows follow the workers: {grown:?}");
    // One is told by a signal, one by an operator.
    leaves(&mut cluster.workers[2]).await;
    cluster.worker_gone(2).await;
    cluster.conclave(&["placement", "drain", "worker-3"]).await;
    let status = cluster.workers[3].ended().await;
    assert!(status.success(), "a drained worker ended with {status}");
    cluster.held(1).await;
    drill.over();
    drill.end().await;
}
