//! A worker dies, freezes, lies, or all of them do.

use std::{
    fs::{self, File},
    io::Write,
    path::PathBuf,
    time::Duration,
};

use conclave_placement::state::ClusterState;
use conclave_proto::expert::v1::{
    CombineMode, DispatchBatch, Encoding, GetInventoryRequest, RefusedReason, expert_worker_client::ExpertWorkerClient,
};
use conclave_runtime::channel::MAX_INTERNAL_MESSAGE;

use conclave_tests::{
    cluster::worker_id,
    drill::{Aim, Drill, SECOND},
    eventually::eventually,
    fake_expert::{Act, FakeExpert},
    process::{Process, Signal},
};
use futures::StreamExt;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::scene::{self, begin};

#[tokio::test]
async fn one_of_four_workers_is_killed() {
    let _alone = scene::alone().await;
    let mut cluster = scene::four_workers().await;
    let mut drill = begin(
        Aim::unnoticed("1", "kill -9 of one worker of four", 2).detected_within(SECOND).flows_within(SECOND).keeps(0.8),
        &cluster,
    )
    .await;
    drill.fault();
    cluster.workers[0].kill().await;
    cluster.worker_gone(0).await;
    cluster.held(2).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn one_of_four_workers_is_frozen_and_wakes_up() {
    let _alone = scene::alone().await;
    let cluster = scene::four_workers().await;
    let mut drill = begin(
        Aim::unnoticed("2", "SIGSTOP of one worker of four, then SIGCONT", 2)
            .detected_within(2 * SECOND)
            .flows_within(2 * SECOND),
        &cluster,
    )
    .await;
    drill.fault();
    cluster.workers[0].signal(Signal::STOP);
    cluster.worker_gone(0).await;
    cluster.held(2).await;
    drill.goes_on(drill.form().pick(Duration::ZERO, Duration::from_secs(20))).await;
    // Its answers to what it had been asked come now, and nobody waits for them.
    cluster.workers[0].signal(Signal::CONT);
    let back = worker_id(0);
    cluster.until("the worker to be back", |state| state.workers.contains_key(&back)).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn two_of_three_holders_freeze_at_once() {
    let _alone = scene::alone().await;
    let cluster = scene::builder(3, 3).start().await;
    let mut drill = begin(
        Aim::unnoticed("2", "SIGSTOP of two of three workers that hold everything", 3)
            .detected_within(2 * SECOND)
            .flows_within(2 * SECOND),
        &cluster,
    )
    .await;
    drill.fault();
    for worker in &cluster.workers[..2] {
        worker.signal(Signal::STOP);
    }
    drill.flows(500).await;
    drill.goes_on(drill.form().pick(Duration::from_secs(2), Duration::from_secs(30))).await;
    for worker in &cluster.workers[..2] {
        worker.signal(Signal::CONT);
    }
    cluster.until("all workers to be back", |state| state.workers.len() == 3).await;
    cluster.held(3).await;
    drill.over();
    drill.end().await;
}

/// Connections that nobody uses take every descriptor a worker has. Those it serves are not concerned.
#[tokio::test]
async fn a_worker_has_no_descriptors_left() {
    let _alone = scene::alone().await;
    let cluster = scene::four_workers().await;
    let mut drill = begin(Aim::unnoticed("25", "no file descriptors left in one worker of four", 2), &cluster).await;
    let pid = Pid::from_raw(cluster.workers[0].pid().expect("it runs").cast_signed()).expect("a process has an id");
    let limit = Rlimit { current: Some(64), maximum: Some(64) };
    drill.fault();
    prlimit(Some(pid), Resource::Nofile, limit).expect("a process may limit its children");
    let address = cluster.worker_address(0).await;
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(tokio::net::TcpStream::connect(&address).await.expect("the kernel accepts"));
    }
    drill.goes_on(drill.form().pick(Duration::from_secs(2), Duration::from_secs(30))).await;
    drop(idle);
    eventually("the worker to accept again", async || {
        let channel = conclave_runtime::channel::internal(&address).ok()?.connect().await.ok()?;
        ExpertWorkerClient::new(channel).get_inventory(GetInventoryRequest {}).await.ok()
    })
    .await;
    drill.over();
    drill.end().await;
}

/// What it has to say is lost; what it has to do is not.
#[tokio::test]
async fn a_worker_cannot_write_its_log() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(3, 2).start().await;
    let aim = Aim::unnoticed("25", "a worker joins whose log's disk is full", 2);
    let mut drill = begin(aim, &cluster).await;
    drill.fault();
    std::os::unix::fs::symlink("/dev/full", cluster.log_folder().join("worker-3.log")).expect("a link");
    cluster.add_worker();
    let newcomer = worker_id(3);
    let serves = |state: &ClusterState| state.workers.get(&newcomer).is_some_and(|worker| !worker.resident.is_empty());
    cluster.until("the newcomer to hold experts", serves).await;
    drill.flows(500).await;
    // It has something to say when streams break, too.
    cluster.workers[0].kill().await;
    cluster.worker_gone(0).await;
    cluster.held(2).await;
    assert!(cluster.workers[3].is_running(), "without a log it ended");
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn the_only_holder_of_experts_is_killed() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(4, 1).start().await;
    let mut drill =
        begin(Aim::waited_out("8", "kill -9 of one worker of four, no replicas", 1).detected_within(SECOND), &cluster)
            .await;
    drill.fault();
    cluster.workers[0].kill().await;
    cluster.worker_gone(0).await;
    cluster.held(1).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn all_workers_are_killed_and_one_comes() {
    let _alone = scene::alone().await;
    let mut cluster = scene::builder(2, 2).start().await;
    let aim = Aim { may_fail: true, ..Aim::waited_out("8", "kill -9 of all workers, later a new one", 1) };
    let work = scene::work(&cluster).await.deadline(Duration::from_secs(5));
    let mut drill = Drill::begin(aim, &cluster, work).await;
    drill.fault();
    cluster.workers[0].kill().await;
    cluster.workers[1].kill().await;
    // By then, the requests of the first moment have met their deadline.
    drill.goes_on(Duration::from_secs(7)).await;
    cluster.add_worker();
    cluster.held(1).await;
    drill.over();
    let report = drill.end().await;
    assert!(report.failed > 0, "without workers, requests wait until their deadline");
    for failure in &report.failures {
        // Some met their deadline, some were told at once that they would: others waited for the experts before them.
        let foreseen = failure.starts_with("Unavailable") || failure.contains("OVERLOADED");
        assert!(foreseen && failure.contains("retry_delay: Some"), "{failure}");
    }
}

/// Row 9. The worker has room for 2 MiB more and is sent a batch of 32. In a memory cgroup the kernel kills it; where no
/// such cgroup can be made, its address space is limited, an allocation fails, and it aborts.
#[tokio::test]
async fn a_worker_runs_out_of_memory() {
    let _alone = scene::alone().await;
    let mut cluster = scene::four_workers().await;
    let mut drill = begin(Aim::unnoticed("9", "one worker of four runs out of memory", 2), &cluster).await;
    drill.fault();
    let (how, _group) = starve(&cluster.workers[0]);
    drill.note("by", how);
    let (address, batch) = (cluster.worker_address(0).await, large_batch());
    // It ends before it answers.
    let sent = tokio::spawn(async move {
        let channel =
            conclave_runtime::channel::internal(&address).expect("a registered address is one").connect().await?;
        let mut worker = ExpertWorkerClient::new(channel).max_encoding_message_size(MAX_INTERNAL_MESSAGE);
        let batches = futures::stream::iter([batch]).chain(futures::stream::pending());
        if let Ok(answers) = worker.exchange(batches).await {
            // An end, and no answer.
            let _ = answers.into_inner().message().await;
        }
        Ok::<(), tonic::transport::Error>(())
    });
    let status = cluster.workers[0].ended().await;
    sent.abort();
    assert!(!status.success(), "starved, it ended with {status}");
    drill.note("ended", status.to_string());
    cluster.worker_gone(0).await;
    cluster.held(2).await;
    drill.over();
    drill.end().await;
}

/// Rows enough for half of the largest message, all for one expert.
fn large_batch() -> DispatchBatch {
    let (hidden, layer) = (64, 2);
    let rows = (32 << 20) / (hidden * 4);
    let count = u32::try_from(rows).expect("some hundred thousand");
    DispatchBatch {
        batch_id: 1,
        layer,
        deadline_us: 60_000_000,
        encoding: Encoding::F32.into(),
        rows: count,
        hidden: vec![0; rows * hidden * 4].into(),
        expert_ids: vec![0; rows * 2].into(),
        row_ids: (0..count).flat_map(u32::to_le_bytes).collect(),
        mode: CombineMode::PerAssignment.into(),
        return_encoding: Encoding::F32.into(),
        ..DispatchBatch::default()
    }
}

/// A memory cgroup of one process; removed when dropped.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        // Its process may linger for a moment; an empty group left behind costs nothing.
        let _ = fs::remove_dir(&self.0);
    }
}

const ROOM: u64 = 2 << 20;

fn starve(worker: &Process) -> (&'static str, Option<Group>) {
    let pid = worker.pid().expect("it runs");
    if let Some(group) = in_small_cgroup(pid) {
        return ("the kernel, memory cgroup", Some(group));
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let used = status.lines().find_map(|line| line.strip_prefix("VmSize:")).expect("Linux tells").trim();
    let used: u64 = used.trim_end_matches("kB").trim().parse().expect("a number of KiB");
    let limit = Some((used << 10) + ROOM);
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process has an id");
    let limit = Rlimit { current: limit, maximum: limit };
    prlimit(Some(pid), Resource::As, limit).expect("a process may limit its children");
    ("RLIMIT_AS, for want of a memory cgroup", None)
}

/// Moves `pid` into a new cgroup with room for little more; `None` where that cannot be done. What it uses already stays
/// accounted to the group that it came from.
fn in_small_cgroup(pid: u32) -> Option<Group> {
    let name = format!("conclave-drill-{pid}");
    let write = |path: PathBuf, value: String| File::options().write(true).open(path)?.write_all(value.as_bytes());
    for (root, limit) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
        let group = Group(PathBuf::from(root).join(&name));
        let made = fs::create_dir(&group.0)
            .and_then(|()| write(group.0.join(limit), ROOM.to_string()))
            .and_then(|()| write(group.0.join("cgroup.procs"), pid.to_string()));
        if made.is_ok() {
            return Some(group);
        }
    }
    None
}

#[tokio::test]
async fn one_of_two_workers_answers_nonsense() {
    let _alone = scene::alone().await;
    let golden = scene::model();
    for (what, nonsense) in [
        ("a worker answers with NaN", Act::Nan),
        ("a worker answers with too few bytes", Act::WrongSize),
        ("a worker answers what nobody asked", Act::WrongBatch),
        ("a worker calls every batch invalid", Act::Refuse(RefusedReason::Invalid)),
        ("a worker fails again and again", Act::Refuse(RefusedReason::Internal)),
    ] {
        let mut cluster = scene::builder(1, 2).guests(1).router(&["--batch-timeout=2"]).launch().await;
        let (lies, does_lie) = tokio::sync::watch::channel(false);
        let script = move |_| if *does_lie.borrow() { nonsense } else { Act::Compute };
        let fake = FakeExpert::join(&cluster, "fake", &golden.folder, script).await;
        cluster.ready().await;
        let mut drill = begin(Aim::waited_out("10", what, 2), &cluster).await;
        drill.fault();
        let before = fake.batches();
        lies.send_replace(true);
        eventually("the fake to be asked", async || (fake.batches() > before).then_some(())).await;
        drill.flows(500).await;
        lies.send_replace(false);
        drill.over();
        let report = drill.end().await;
        if matches!(nonsense, Act::Nan | Act::WrongSize) {
            assert!(report.counted("corrupt") > 0.0, "{what}, and it was not counted: {:?}", report.notes);
        }
        fake.leave().await;
    }
}
