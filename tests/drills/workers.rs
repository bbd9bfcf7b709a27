//! A worker dies, freezes, lies, or all of them do.

use std::{fs, path::PathBuf, time::Duration};

use conclave_tests::{
    cluster::worker_id,
    drill::{Aim, Drill},
    eventually::eventually,
    fake_expert::{Act, FakeExpert},
    process::{Process, Signal},
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::scene::{self, begin};

#[tokio::test]
async fn one_of_four_workers_is_killed() {
    let mut cluster = scene::four_workers().await;
    let mut drill = begin(Aim::unnoticed("1", "kill -9 of one worker of four", 2), &cluster).await;
    drill.fault();
    cluster.workers[0].kill().await;
    cluster.worker_gone(0).await;
    cluster.held(2).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn one_of_four_workers_is_frozen_and_wakes_up() {
    let mut cluster = scene::four_workers().await;
    let mut drill = begin(Aim::unnoticed("2", "SIGSTOP of one worker of four, then SIGCONT", 2), &cluster).await;
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
async fn the_only_holder_of_experts_is_killed() {
    let mut cluster = scene::builder(4, 1).start().await;
    let mut drill = begin(Aim::waited_out("8", "kill -9 of one worker of four, no replicas", 1), &cluster).await;
    drill.fault();
    cluster.workers[0].kill().await;
    cluster.worker_gone(0).await;
    cluster.held(1).await;
    drill.over();
    drill.end().await;
}

#[tokio::test]
async fn all_workers_are_killed_and_one_comes() {
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
        assert!(failure.starts_with("Unavailable") && failure.contains("retry_delay: Some"), "{failure}");
    }
}

/// Row 9. A limit lower than what the worker uses: in a memory cgroup the kernel kills it; where no such cgroup can be
/// made, a limit on its address space lets its next allocation fail, and it aborts.
#[tokio::test]
async fn a_worker_runs_out_of_memory() {
    let mut cluster = scene::four_workers().await;
    let mut drill = begin(Aim::unnoticed("9", "one worker of four runs out of memory", 2), &cluster).await;
    drill.fault();
    let (how, _group) = starve(&cluster.workers[0]);
    drill.note("by", how);
    let status = cluster.workers[0].ended().await;
    assert!(!status.success(), "starved, it ended with {status}");
    drill.note("ended", status.to_string());
    cluster.worker_gone(0).await;
    cluster.held(2).await;
    drill.over();
    drill.end().await;
}

/// A memory cgroup of one process; removed when dropped.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        // Its process may linger for a moment; an empty group left behind costs nothing.
        let _ = fs::remove_dir(&self.0);
    }
}

fn starve(worker: &Process) -> (&'static str, Option<Group>) {
    let pid = worker.pid().expect("it runs");
    if let Some(group) = in_small_cgroup(pid) {
        return ("the kernel, memory cgroup", Some(group));
    }
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process has an id");
    let limit = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    prlimit(Some(pid), Resource::As, limit).expect("a process may limit its children");
    ("RLIMIT_AS: no memory cgroup can be made here", None)
}

/// Moves `pid` into a new cgroup that has no room for it; `None` where that cannot be done.
fn in_small_cgroup(pid: u32) -> Option<Group> {
    let name = format!("conclave-drill-{pid}");
    for (root, limit) in [("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
        let group = Group(PathBuf::from(root).join(&name));
        let made = fs::create_dir(&group.0)
            .and_then(|()| fs::write(group.0.join("cgroup.procs"), pid.to_string()))
            .and_then(|()| fs::write(group.0.join(limit), (2 << 20).to_string()));
        if made.is_ok() {
            return Some(group);
        }
    }
    None
}

#[tokio::test]
async fn one_of_two_workers_answers_nonsense() {
    let golden = scene::model();
    for (what, nonsense) in [
        ("a worker answers with NaN", Act::Nan),
        ("a worker answers with too few bytes", Act::WrongSize),
        ("a worker answers what nobody asked", Act::WrongBatch),
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
        drill.end().await;
        fake.leave().await;
    }
}
