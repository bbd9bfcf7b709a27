//! A worker that dies, leaves or lies in the middle of an answer changes no token of it.

use std::time::Duration;

use conclave_placement::{ids::WorkerId, state::ClusterState};
use conclave_proto::expert::v1::RefusedReason;
use conclave_tests::{
    client::greedy,
    cluster::Cluster,
    eventually::{PATIENCE, eventually},
    fake_expert::{Act, FakeExpert},
    golden::Golden,
    process::{Process, Signal},
};

/// Long enough that the worker is lost in the middle, short of the golden models' contexts.
const DRAWN: u32 = 300;
const BEFORE_THE_FAULT: usize = 10;
/// Batches that a fake answers truly before its fault.
const HONEST_BATCHES: u64 = 5;

#[tokio::test]
async fn a_worker_killed_mid_answer_changes_no_token() {
    loses_a_worker_mid_answer(async |worker| worker.kill().await).await;
}

#[tokio::test]
async fn a_worker_asked_to_leave_mid_answer_changes_no_token() {
    let mut cluster = loses_a_worker_mid_answer(async |worker| worker.signal(Signal::TERM)).await;
    let worker = &mut cluster.workers[0];
    let status = worker.ended().await;
    assert!(status.success(), "a drained worker ended with {status}:\n{}", worker.log());
}

#[tokio::test]
async fn a_worker_frozen_mid_answer_changes_no_token() {
    loses_a_worker_mid_answer(async |worker| worker.signal(Signal::STOP)).await;
}

async fn loses_a_worker_mid_answer(lose: impl AsyncFnOnce(&mut Process)) -> Cluster {
    let golden = Golden::named("v3");
    let prompt = &golden.cases[0].prompt;
    let mut cluster =
        Cluster::builder(&golden.folder).workers(2).replicas(2).router(&["--batch-timeout=2"]).start().await;
    let client = cluster.client(0).await;
    let undisturbed = client.generate(prompt, DRAWN).await.ids();
    assert_eq!(undisturbed[..24], golden.cases[0].greedy);
    assert!(cluster.inventory(0).await.rows_total > 0, "the worker that will be lost had no part");

    let mut answer = client.begin(greedy(prompt, DRAWN), PATIENCE).await.expect("a stream begins");
    answer.tokens(BEFORE_THE_FAULT).await.expect("the first tokens come");
    lose(&mut cluster.workers[0]).await;
    let computed = cluster.inventory(1).await.rows_total;
    let answer = answer.rest().await.expect("the stream finishes");
    assert_eq!(answer.ids(), undisturbed);
    assert!(cluster.inventory(1).await.rows_total > computed, "the answer was complete before the worker was lost");
    assert_eq!(client.generate(prompt, DRAWN).await.ids(), undisturbed, "the next answer");
    cluster
}

#[tokio::test]
async fn a_lost_worker_s_experts_are_placed_anew() {
    let golden = Golden::named("v2_lite");
    let case = &golden.cases[1];
    let mut cluster = Cluster::builder(&golden.folder).workers(2).replicas(1).start().await;
    let client = cluster.client(0).await;
    assert_eq!(client.generate(&case.prompt, 24).await.ids(), case.greedy);
    cluster.workers[0].kill().await;
    assert_eq!(client.generate(&case.prompt, 24).await.ids(), case.greedy, "half of the experts had to move");
}

#[tokio::test]
async fn a_faulty_worker_changes_no_token() {
    let golden = Golden::named("v3");
    let mut cluster = beside_a_guest(&golden).await;
    for (number, fault) in [
        Act::Compute,
        Act::Nan,
        Act::WrongSize,
        Act::WrongBatch,
        Act::EndStream,
        Act::Never,
        Act::GarbageAfter(Duration::from_secs(2)),
        Act::Refuse(RefusedReason::Draining),
        Act::Refuse(RefusedReason::NotResident),
        Act::Refuse(RefusedReason::Internal),
    ]
    .into_iter()
    .enumerate()
    {
        survives(&mut cluster, &golden, &format!("fake-{number}"), fault).await;
    }
}

#[tokio::test]
async fn a_worker_that_stays_busy_is_passed_over() {
    let golden = Golden::named("v3");
    let mut cluster = beside_a_guest(&golden).await;
    survives(&mut cluster, &golden, "fake-busy", Act::Refuse(RefusedReason::Busy)).await;
}

#[tokio::test]
async fn the_only_worker_is_asked_again_until_it_answers() {
    let golden = Golden::named("v2_lite");
    let case = &golden.cases[1];
    for fault in [Act::Refuse(RefusedReason::Busy), Act::EndStream] {
        let mut cluster = Cluster::builder(&golden.folder).workers(0).guests(1).launch().await;
        let script = move |nth| if nth % 10 == 9 { fault } else { Act::Compute };
        let fake = FakeExpert::join(&cluster, "fake", &golden.folder, script).await;
        cluster.ready().await;
        assert_eq!(cluster.client(0).await.generate(&case.prompt, 24).await.ids(), case.greedy, "{fault:?}");
        assert!(fake.batches() > 10, "too few batches to meet {fault:?}");
    }
}

/// One honest worker, and room for a guest that holds everything too.
async fn beside_a_guest(golden: &Golden) -> Cluster {
    let cluster = Cluster::builder(&golden.folder).workers(1).guests(1).replicas(2);
    cluster.router(&["--batch-timeout=1"]).launch().await
}

/// A fake comes, computes truly for a while, shows its fault, and goes.
async fn survives(cluster: &mut Cluster, golden: &Golden, id: &str, fault: Act) {
    let script = move |nth| if nth < HONEST_BATCHES { Act::Compute } else { fault };
    let fake = FakeExpert::join(cluster, id, &golden.folder, script).await;
    cluster.ready().await;
    let planned = WorkerId::parse(id).expect("a valid name");
    let is_planned =
        |state: &ClusterState| state.plan.as_ref().is_some_and(|plan| !plan.assigned_to(&planned).is_empty());
    cluster.until("the fake to be planned for", is_planned).await;

    let (client, case) = (cluster.client(0).await, &golden.cases[1]);
    eventually("the fake to meet its fault", async || {
        assert_eq!(client.generate(&case.prompt, 24).await.ids(), case.greedy, "{fault:?}");
        (fake.batches() > HONEST_BATCHES).then_some(())
    })
    .await;
    if let Act::GarbageAfter(_) = fault {
        eventually("the late answers", async || (fake.answered() >= fake.batches()).then_some(())).await;
    }
    assert_eq!(client.generate(&case.prompt, 24).await.ids(), case.greedy, "after {fault:?}");
    fake.leave().await;
}
