//! Whole calls, with an engine that says what the test wants.

use conclave_proto::{
    inference::v1::{generate_request::Input, generate_response::Event as Told},
    status::ErrorKind,
};
use tokio_stream::StreamExt;

use super::{
    test_model::{LIMITS, served},
    *,
};
use crate::{
    scheduler::{Queue, Submission},
    sequence::{Event, FinishReason, Timings, TokenLogprob},
    stall::Stall,
};

/// Requests that may wait.
const WAITING: usize = 4;

struct House {
    service: Service,
    queue: Queue,
    stall: Arc<Stall>,
    draining: CancellationToken,
}

fn house(model: ServedModel) -> House {
    let stall = Arc::new(Stall::default());
    let (scheduler, queue) = scheduler::queue(stall.clone(), WAITING);
    let draining = CancellationToken::new();
    let service =
        Service::new(ApiState { model: Arc::new(model), scheduler, limits: LIMITS, draining: draining.clone() });
    House { service, queue, stall, draining }
}

fn asking(prompt: &str) -> pb::GenerateRequest {
    pb::GenerateRequest { input: Some(Input::Prompt(prompt.to_owned())), ..Default::default() }
}

fn within(timeout: &'static str, request: pb::GenerateRequest) -> Request<pb::GenerateRequest> {
    let mut request = Request::new(request);
    request.metadata_mut().insert("grpc-timeout", timeout.parse().unwrap());
    request
}

/// Answers one request with this text, and says what it was asked.
async fn answer_one(queue: &mut Queue, text: &str) -> crate::sequence::ValidRequest {
    let Submission { request, events, .. } = queue.recv().await.unwrap();
    let started = Event::Started { cached_tokens: 0, queue_us: 0, prompt_logprobs: Vec::new() };
    let drawn = text.bytes().map(|byte| Event::Token {
        answer: 0,
        token: TokenLogprob { id: byte.into(), logprob: None, top: Vec::new() },
    });
    let finished = Event::Finished {
        answer: 0,
        reason: FinishReason::Length,
        completion_tokens: text.len(),
        timings: Timings::default(),
    };
    for event in [started].into_iter().chain(drawn).chain([finished]) {
        events.send(event).await.unwrap();
    }
    request
}

async fn read(mut responses: stream::Responses) -> (String, Option<Status>) {
    let mut text = String::new();
    while let Some(response) = responses.next().await {
        match response.map(|response| response.event) {
            Ok(Some(Told::Tokens(tokens))) => text.extend(tokens.tokens.into_iter().map(|token| token.text)),
            Ok(Some(Told::Finished(finished))) => text.push_str(&finished.trailing_text),
            Ok(_) => {}
            Err(status) => return (text, Some(status)),
        }
    }
    (text, None)
}

#[tokio::test]
async fn a_prompt_goes_in_as_tokens_and_comes_out_as_text() {
    let mut house = house(served());
    let called = house.service.generate(Request::new(asking("hi")));
    let (responses, asked) = tokio::join!(called, answer_one(&mut house.queue, "né"));
    assert_eq!(read(responses.unwrap().into_inner()).await.0, "né");
    assert_eq!(asked.prompt, [256, 'h'.into(), 'i'.into()]);
    assert_eq!(*asked.stop.token_ids, [257]);
}

#[tokio::test]
async fn a_draining_router_refuses_new_answers_and_finishes_the_old() {
    let mut house = house(served());
    let responses = house.service.begin(Request::new(asking("hi"))).await.unwrap();
    house.draining.cancel();
    answer_one(&mut house.queue, "x").await;
    assert_eq!(read(responses).await.0, "x");

    let failure = house.service.begin(Request::new(asking("hi"))).await.unwrap_err();
    assert_eq!((failure.kind, failure.reason), (ErrorKind::Unavailable, "DRAINING"));
    assert!(failure.retry_after.is_some());
}

#[tokio::test]
async fn waiting_for_an_expert_ends_at_the_deadline_as_unavailable() {
    let mut house = house(served());
    house.stall.set("expert 3 of layer 1 has no holder".to_owned());
    let responses = house.service.begin(within("1S", asking("hi"))).await.unwrap();
    let submission = house.queue.recv().await.unwrap();
    let status = read(responses).await.1.unwrap();
    assert_eq!(ErrorKind::of(&status), ErrorKind::Unavailable);
    assert!(status.message().contains("expert 3 of layer 1"), "{status:?}");
    submission.events.closed().await;
}

#[tokio::test]
async fn a_deadline_alone_is_a_deadline() {
    let house = house(served());
    // On a busy machine it may pass before the stream begins.
    let kind = match house.service.begin(within("50m", asking("hi"))).await {
        Ok(responses) => ErrorKind::of(&read(responses).await.1.unwrap()),
        Err(failure) => failure.kind,
    };
    assert_eq!(kind, ErrorKind::DeadlineExceeded);
    let failure = house.service.begin(within("0S", asking("hi"))).await.unwrap_err();
    assert_eq!(failure.kind, ErrorKind::DeadlineExceeded);
}

#[tokio::test]
async fn more_requests_than_may_wait_are_turned_away() {
    let house = house(served());
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        waiting.push(house.service.begin(Request::new(asking("hi"))).await.unwrap());
    }
    let failure = house.service.begin(Request::new(asking("hi"))).await.unwrap_err();
    assert_eq!((failure.kind, failure.reason), (ErrorKind::ResourceExhausted, "QUEUE_FULL"));
    // One leaves: its task hears of it, and the place is free though no engine has looked.
    waiting.pop();
    let came = async {
        while let Err(failure) = house.service.begin(Request::new(asking("hi"))).await {
            assert_eq!(failure.reason, "QUEUE_FULL");
            task::yield_now().await;
        }
    };
    time::timeout(Duration::from_secs(60), came).await.expect("a place is free");
}

#[tokio::test]
async fn a_request_whose_deadline_passes_frees_its_place_and_is_never_seen_by_the_engine() {
    let mut house = house(served());
    let responses = house.service.begin(within("1S", asking("short"))).await.unwrap();
    let mut others = Vec::new();
    for _ in 1..WAITING {
        others.push(house.service.begin(Request::new(asking("hi"))).await.unwrap());
    }
    assert_eq!(ErrorKind::of(&read(responses).await.1.unwrap()), ErrorKind::DeadlineExceeded);
    others.push(house.service.begin(Request::new(asking("hi"))).await.expect("a place is free"));
    for _ in &others {
        assert_eq!(house.queue.try_recv().unwrap().request.prompt.len(), 3);
    }
    assert!(house.queue.try_recv().is_err());
}

#[tokio::test]
async fn several_answers_are_asked_of_the_engine_at_once() {
    let mut house = house(served());
    let request = pb::GenerateRequest { n: Some(3), cache_salt: "mine".into(), ..asking("hi") };
    let responses = house.service.begin(Request::new(request)).await.unwrap();
    let Submission { request, events, .. } = house.queue.recv().await.unwrap();
    assert_eq!((request.answers, &*request.cache_salt), (3, "mine"));
    for answer in 0..3 {
        let timings = Timings::default();
        let event = Event::Finished { answer, reason: FinishReason::Length, completion_tokens: 0, timings };
        events.send(event).await.unwrap();
    }
    assert!(read(responses).await.1.is_none());

    let request = pb::GenerateRequest { n: Some(9), ..asking("hi") };
    let failure = house.service.begin(Request::new(request)).await.unwrap_err();
    assert_eq!(failure.field.as_deref(), Some("n"));
    assert!(failure.message.contains('8'), "{failure}");
}

#[tokio::test]
async fn a_context_that_does_not_fit_into_memory_is_as_short_as_what_does() {
    let model = Arc::new(served());
    let limits = Limits { context_tokens: 10, answers_max: 100, ..LIMITS };
    let bounds = Bounds::new(&model, limits);
    assert_eq!((bounds.context_tokens, bounds.answers_max), (10, validate::ANSWERS_MAX));
    let ample = Bounds::new(&model, LIMITS);
    assert_eq!(ample.context_tokens, model.config.max_position_embeddings);
    assert_eq!(model_info::describe(&model, &bounds).context_tokens, 10);
}

#[tokio::test]
async fn a_long_prompt_is_refused_with_both_numbers() {
    let house = house(served());
    let failure = house.service.begin(Request::new(asking(&"x".repeat(70)))).await.unwrap_err();
    assert_eq!(failure.field.as_deref(), Some("prompt"));
    assert!(failure.message.contains("71") && failure.message.contains("64"), "{failure}");
}

#[tokio::test]
async fn an_answer_that_is_complete_already_reaches_no_engine() {
    let mut house = house(served());
    let request = pb::GenerateRequest {
        stop: Some(pb::StopParams { max_tokens: Some(2), ..Default::default() }),
        resume_tokens: vec![65, 66],
        ..asking("hi")
    };
    let (text, status) = read(house.service.begin(Request::new(request)).await.unwrap()).await;
    assert!(text.is_empty() && status.is_none());
    assert!(house.queue.try_recv().is_err());
}

#[tokio::test]
async fn a_model_without_a_tokenizer_is_served_by_ids() {
    let mut house = house(ServedModel { tokenizer: None, ..served() });
    let failure = house.service.begin(Request::new(asking("hi"))).await.unwrap_err();
    assert_eq!((failure.kind, failure.reason), (ErrorKind::FailedPrecondition, "NO_TOKENIZER"));

    let tokens = pb::TokenIds { ids: vec![104, 105] };
    let request = pb::GenerateRequest { input: Some(Input::Tokens(tokens)), ..Default::default() };
    let responses = house.service.begin(Request::new(request)).await.unwrap();
    assert_eq!(answer_one(&mut house.queue, "x").await.prompt, [104, 105]);
    assert_eq!(read(responses).await.0, "");
}
