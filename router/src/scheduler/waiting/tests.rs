//! Places: who takes one, who frees it, and what the engine sees of it. The clock stands still unless a test moves it.

use conclave_model::sampler::SamplingParams;
use conclave_proto::status::ErrorKind;
use tokio::time::advance;

use super::*;
use crate::sequence::{LogprobRules, StopRules};

fn request(name: &str, patience: Duration) -> ValidRequest {
    ValidRequest {
        constraint: None,
        request_id: name.into(),
        prompt: vec![1],
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        stop: StopRules { max_tokens: 1, min_tokens: 0, token_ids: Arc::new([]) },
        logprobs: LogprobRules { sampled: false, top: 0, prompt: false },
        answers: 1,
        priority: 0,
        cache_salt: "".into(),
        deadline: (Instant::now() + patience).into_std(),
    }
}

const LONG: Duration = Duration::from_secs(3600);

fn open(bound: usize) -> (Handle, Queue) {
    queue(Arc::new(Stall::default()), bound)
}

fn submit(handle: &Handle) -> Result<Answers, Failure> {
    handle.submit(request("somebody", LONG))
}

#[track_caller]
fn is_full(handle: &Handle) {
    let failure = submit(handle).expect_err("the queue is full");
    assert_eq!((failure.kind, failure.reason), (ErrorKind::ResourceExhausted, "QUEUE_FULL"));
    assert!(failure.retry_after.is_some());
}

#[tokio::test(start_paused = true)]
async fn who_waits_in_the_engine_is_counted_until_it_starts() {
    let (handle, mut queue) = open(2);
    let _answers = [submit(&handle).unwrap(), submit(&handle).unwrap()];
    let first = queue.recv().await.unwrap();
    let _second = queue.recv().await.unwrap();
    is_full(&handle);
    drop(first.waiting);
    let _third = submit(&handle).expect("one has started");
    is_full(&handle);
}

#[tokio::test(start_paused = true)]
async fn a_client_who_leaves_frees_the_place_though_the_engine_does_not_look() {
    let (handle, mut queue) = open(2);
    let first = handle.submit(request("first", LONG)).unwrap();
    let second = handle.submit(request("second", LONG)).unwrap();
    is_full(&handle);
    drop(first);
    let _third = handle.submit(request("third", LONG)).expect("one has left");
    is_full(&handle);
    // And is not in the engine's way.
    assert_eq!(&*queue.recv().await.unwrap().request.request_id, "second");
    assert_eq!(&*queue.recv().await.unwrap().request.request_id, "third");
    assert_eq!(queue.try_recv().unwrap_err(), TryRecvError::Empty);
    drop(second);
}

#[tokio::test(start_paused = true)]
async fn one_place_is_freed_once_whoever_lets_go_first() {
    let (handle, mut queue) = open(1);
    let answers = submit(&handle).unwrap();
    let submission = queue.recv().await.unwrap();
    drop(answers);
    let _next = submit(&handle).expect("the client has left");
    drop(submission);
    is_full(&handle);

    let (handle, mut queue) = open(1);
    let answers = submit(&handle).unwrap();
    drop(queue.recv().await.unwrap().waiting);
    let _next = submit(&handle).expect("the request has started");
    drop(answers);
    is_full(&handle);
}

/// Ten requests come; the engine starts one every two seconds, and keeps `left` waiting.
async fn slow(handle: &Handle, queue: &mut Queue, left: usize) -> Vec<(Answers, Option<Submission>)> {
    let mut waiting: Vec<_> = (0..10).map(|_| (submit(handle).unwrap(), None)).collect();
    for (_, submission) in waiting.iter_mut() {
        *submission = Some(queue.recv().await.unwrap());
    }
    for (_, submission) in waiting.drain(..10 - left) {
        advance(Duration::from_secs(2)).await;
        drop(submission);
    }
    waiting
}

#[tokio::test(start_paused = true)]
async fn a_request_that_would_start_too_late_is_refused_at_once() {
    let (handle, mut queue) = open(100);
    let _waiting = slow(&handle, &mut queue, 5).await;
    let failure = handle.submit(request("hasty", Duration::from_secs(10))).unwrap_err();
    assert_eq!((failure.kind, failure.reason), (ErrorKind::ResourceExhausted, "OVERLOADED"));
    assert_eq!(failure.retry_after, Some(Duration::from_secs(5)), "ten seconds of waiting, five at most");
    assert!(failure.message.contains("about 10.0 s"), "{failure}");
    assert!(handle.submit(request("patient", Duration::from_secs(30))).is_ok());
}

#[tokio::test(start_paused = true)]
async fn those_who_leave_are_no_starts() {
    let (handle, mut queue) = open(100);
    let mut waiting = slow(&handle, &mut queue, 9).await;
    // Seven clients give up in a moment, and the engine hears of it later; two go on waiting.
    let gone: Vec<_> = waiting.drain(..7).map(|(answers, submission)| (drop(answers), submission)).collect();
    drop(gone);
    // The next two starts are two seconds apart as ever.
    for (_, submission) in waiting {
        advance(Duration::from_secs(2)).await;
        drop(submission);
    }
    let _first = submit(&handle).unwrap();
    let hasty = || handle.submit(request("hasty", Duration::from_secs(3)));
    assert_eq!(hasty().unwrap_err().reason, "OVERLOADED");
}

#[tokio::test(start_paused = true)]
async fn the_engine_waits_for_requests_and_hears_of_the_end() {
    let (handle, mut queue) = open(4);
    let other = handle.clone();
    let (received, answers) = tokio::join!(queue.recv(), async { submit(&other) });
    assert!(received.is_some() && answers.is_ok());
    let left = submit(&handle);
    drop((handle, other));
    assert!(queue.recv().await.is_some(), "who is in the line is served");
    assert!(queue.recv().await.is_none());
    drop(left);
}

#[tokio::test(start_paused = true)]
async fn without_an_engine_nobody_waits() {
    let (handle, queue) = open(4);
    let mut answers = submit(&handle).unwrap();
    drop(queue);
    assert!(answers.events.recv().await.is_none());
    assert_eq!(submit(&handle).unwrap_err().reason, "ENGINE_STOPPED");
}
