//! Streams as stories: an engine's events on one side, what a client reads on the other.

use std::sync::Arc;

use conclave_model::tokenizer::Tokenizer;
use conclave_proto::{inference::v1::finished::MatchedStop, status::ErrorKind};
use proptest::prelude::*;
use tokio_stream::StreamExt;

use super::*;
use crate::{
    api::{
        answer_text::AnswerText,
        reply::{Answer, Prefill},
        test_model::{byte_tokenizer, request},
    },
    scheduler::{self, Submission},
    sequence::{Event, EventSender, FinishReason, LogprobRules, Timings, TokenLogprob},
    stall::Stall,
};

const LATER: Duration = Duration::from_secs(3600);

fn patience(left: Duration) -> Patience {
    Patience { deadline: Instant::now() + left, reader: SLOW_READER }
}

fn text(tokenizer: Option<&Tokenizer>, stops: &[&str]) -> AnswerText {
    AnswerText::new(tokenizer, &[], stops.iter().map(|&stop| stop.to_owned()).collect())
}

fn reply(texts: Vec<AnswerText>) -> Reply {
    Reply {
        request_id: "req-1".into(),
        prompt_tokens: 3,
        seed: 7,
        logprobs: LogprobRules { sampled: true, top: 1, prompt: false },
        answers: texts.into_iter().map(Answer::new).collect(),
        prompt_text: Vec::new(),
        arrived: Instant::now(),
        prefill: Prefill::default(),
    }
}

fn answer(tokenizer: Option<&Tokenizer>, stops: &[&str]) -> Reply {
    reply(vec![text(tokenizer, stops)])
}

/// What the engine has of a request for so many answers, and what its stream has.
fn submitted(answers: usize) -> (Submission, Answers) {
    let (handle, mut queue) = scheduler::queue(Arc::new(Stall::default()), 1);
    let answers = handle.submit(request(answers)).unwrap();
    (queue.try_recv().unwrap(), answers)
}

fn engine_of_one() -> (EventSender, Answers) {
    let (submission, answers) = submitted(1);
    (submission.events, answers)
}

fn started() -> Event {
    Event::Started { cached_tokens: 2, queue_us: 1, prompt_logprobs: Vec::new() }
}

fn token(id: u32) -> Event {
    Event::Token { answer: 0, token: TokenLogprob { id, logprob: Some(-0.5), top: vec![(id, -0.5)] } }
}

/// One token per byte.
fn tokens(text: &str) -> impl Iterator<Item = Event> {
    text.bytes().map(|byte| token(byte.into()))
}

fn finished(reason: FinishReason, completion_tokens: usize) -> Event {
    let timings = Timings { queue_us: 1, prefill_us: 2, decode_us: 3 };
    Event::Finished { answer: 0, reason, completion_tokens, timings }
}

/// What a client saw of an answer.
#[derive(Debug, Default)]
struct Seen {
    started: Option<pb::Started>,
    tokens: Vec<pb::Token>,
    finished: Option<pb::Finished>,
    status: Option<Status>,
}

impl Seen {
    async fn all_of(mut responses: Responses) -> Self {
        let mut seen = Self::default();
        while let Some(response) = responses.next().await {
            assert!(seen.finished.is_none() && seen.status.is_none(), "nothing follows the end");
            match response.map(|response| response.event) {
                Ok(Some(Told::Started(started))) => seen.started = Some(started),
                Ok(Some(Told::Tokens(tokens))) => seen.tokens.extend(tokens.tokens),
                Ok(Some(Told::Finished(finished))) => seen.finished = Some(finished),
                Ok(None) => panic!("an empty response"),
                Err(status) => seen.status = Some(status),
            }
        }
        seen
    }

    fn text(&self) -> String {
        let trailing = self.finished.as_ref().map_or("", |finished| &finished.trailing_text);
        self.tokens.iter().map(|token| token.text.as_str()).collect::<String>() + trailing
    }
}

/// The events of a whole answer, and what the client saw of it.
async fn played(answer: Reply, events: impl IntoIterator<Item = Event>) -> Seen {
    let (engine, answers) = engine_of_one();
    for event in events {
        engine.try_send(event).unwrap();
    }
    drop(engine);
    Seen::all_of(open(answer, answers, patience(LATER), || None)).await
}

#[tokio::test]
async fn an_answer_is_told_from_start_to_finish() {
    let tokenizer = byte_tokenizer();
    let events = [started()].into_iter().chain(tokens("né")).chain([finished(FinishReason::StopToken(2), 3)]);
    let seen = played(answer(Some(&tokenizer), &[]), events).await;

    let started = seen.started.as_ref().unwrap();
    assert_eq!((started.request_id.as_str(), started.seed), ("req-1", 7));
    assert_eq!((started.prompt_tokens, started.cached_tokens), (3, 2));
    // The é is two tokens long: the second completes it.
    assert_eq!(seen.tokens.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(), ["n", "", "é"]);
    assert_eq!(seen.tokens[0].logprob, Some(-0.5));
    assert_eq!(seen.tokens[0].top, [pb::TopLogprob { id: 'n'.into(), logprob: -0.5 }]);
    let finished = seen.finished.unwrap();
    assert_eq!(finished.reason(), pb::FinishReason::Stop);
    assert_eq!(finished.matched_stop, Some(MatchedStop::StopTokenId(2)));
    let usage = finished.usage.unwrap();
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (3, 2, 3));
    let timings = finished.timings.unwrap();
    assert_eq!((timings.queue_us, timings.prefill_us, timings.decode_us), (1, 2, 3));
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_frees_the_request() {
    let tokenizer = byte_tokenizer();
    let (engine, answers) = engine_of_one();
    for event in [started()].into_iter().chain(tokens("Paris.\nUser: hi")) {
        engine.try_send(event).unwrap();
    }
    let seen = Seen::all_of(open(answer(Some(&tokenizer), &["\nUser:"]), answers, patience(LATER), || None)).await;
    engine.closed().await;

    assert_eq!(seen.text(), "Paris.");
    let finished = seen.finished.unwrap();
    assert_eq!(finished.reason(), pb::FinishReason::Stop);
    assert_eq!(finished.matched_stop, Some(MatchedStop::StopString("\nUser:".into())));
    // The tokens of the stop string were drawn, and are told without their text.
    assert_eq!((seen.tokens.len(), finished.usage.unwrap().completion_tokens), (12, 12));
}

#[tokio::test]
async fn text_held_back_for_nothing_comes_with_the_end() {
    let tokenizer = byte_tokenizer();
    let events = [started()].into_iter().chain(tokens("a\nUs")).chain([finished(FinishReason::Length, 4)]);
    let seen = played(answer(Some(&tokenizer), &["\nUser:"]), events).await;
    assert_eq!(seen.text(), "a\nUs");
    let finished = seen.finished.unwrap();
    assert_eq!((finished.reason(), finished.trailing_text.as_str()), (pb::FinishReason::Length, "\nUs"));
    assert_eq!(finished.matched_stop, None);
}

#[tokio::test]
async fn a_resumed_answer_goes_on_in_the_middle_of_a_character_and_of_a_stop_string() {
    let tokenizer = byte_tokenizer();
    let before: Vec<u32> = "oné".bytes().take(3).map(u32::from).collect();
    let mut resumed = text(Some(&tokenizer), &[]);
    assert_eq!(resumed.resume(&before).unwrap(), None);
    let events = [started(), token(0xa9), token('!'.into()), finished(FinishReason::Length, 2)];
    assert_eq!(played(reply(vec![resumed]), events).await.text(), "é!");

    let mut resumed = text(Some(&tokenizer), &["\nUser:"]);
    assert_eq!(resumed.resume(&"Paris.\nUs".bytes().map(u32::from).collect::<Vec<_>>()).unwrap(), None);
    let seen = played(reply(vec![resumed]), [started()].into_iter().chain(tokens("er: hi"))).await;
    assert_eq!(seen.text(), "");
    assert_eq!(seen.finished.unwrap().usage.unwrap().completion_tokens, 3);
}

#[tokio::test]
async fn an_answer_that_its_resumed_tokens_complete_is_only_finished() {
    let tokenizer = byte_tokenizer();
    let mut complete = text(Some(&tokenizer), &["END"]);
    let stop = complete.resume(&"x END".bytes().map(u32::from).collect::<Vec<_>>()).unwrap();
    assert_eq!(stop.as_deref(), Some("END"));
    let seen = Seen::all_of(of(reply(vec![complete]).already_complete(stop).unwrap())).await;
    assert!(seen.started.is_some() && seen.tokens.is_empty());
    assert_eq!(seen.finished.unwrap().matched_stop, Some(MatchedStop::StopString("END".into())));

    let mut complete = text(Some(&tokenizer), &["END"]);
    complete.resume(&"x EN".bytes().map(u32::from).collect::<Vec<_>>()).unwrap();
    let seen = Seen::all_of(of(reply(vec![complete]).already_complete(None).unwrap())).await;
    assert_eq!(seen.text(), "EN");
    assert_eq!(seen.finished.unwrap().reason(), pb::FinishReason::Length);
}

#[tokio::test]
async fn prompt_logprobs_carry_their_text() {
    let tokenizer = byte_tokenizer();
    let prompt_logprobs = vec![
        TokenLogprob { id: 'h'.into(), logprob: None, top: Vec::new() },
        TokenLogprob { id: 'i'.into(), logprob: Some(-1.0), top: vec![('a'.into(), -0.1)] },
    ];
    let events = [Event::Started { cached_tokens: 0, queue_us: 0, prompt_logprobs }, finished(FinishReason::Length, 0)];
    let mut asked = answer(Some(&tokenizer), &["hi"]);
    asked.prompt_text = crate::api::answer_text::of_prompt(Some(&tokenizer), &['h'.into(), 'i'.into()]).unwrap();
    let told = played(asked, events).await.started.unwrap().prompt_logprobs;
    assert_eq!(told.iter().map(|token| token.text.as_str()).collect::<Vec<_>>(), ["h", "i"]);
    assert_eq!((told[0].logprob, told[1].logprob, told[1].top.len()), (None, Some(-1.0), 1));
}

#[tokio::test]
async fn without_a_tokenizer_there_are_ids_alone() {
    let seen = played(answer(None, &[]), [started(), token(90_000), finished(FinishReason::Length, 1)]).await;
    assert_eq!((seen.text().as_str(), seen.tokens[0].id), ("", 90_000));
    assert!(seen.finished.is_some());
}

#[tokio::test]
async fn a_failure_is_told_after_what_came_before_it() {
    let failure = Failure::exhausted("NO_BLOCKS", "no room", Duration::from_secs(1));
    let seen = played(answer(None, &[]), [started(), token(1), Event::Failed(failure)]).await;
    assert_eq!(seen.tokens.len(), 1);
    assert_eq!(ErrorKind::of(&seen.status.unwrap()), ErrorKind::ResourceExhausted);
}

#[tokio::test]
async fn an_engine_that_stops_does_not_look_like_an_end() {
    let seen = played(answer(None, &[]), [started(), token(1)]).await;
    assert!(seen.finished.is_none());
    assert_eq!(ErrorKind::of(&seen.status.unwrap()), ErrorKind::Unavailable);
}

#[tokio::test]
async fn a_deadline_names_what_was_waited_for() {
    for (waiting_for, kind) in
        [(Some("no expert worker yet"), ErrorKind::Unavailable), (None, ErrorKind::DeadlineExceeded)]
    {
        let (engine, answers) = engine_of_one();
        let responses =
            open(answer(None, &[]), answers, patience(Duration::ZERO), move || waiting_for.map(str::to_owned));
        let status = Seen::all_of(responses).await.status.unwrap();
        assert_eq!(ErrorKind::of(&status), kind);
        assert!(waiting_for.is_none_or(|what| status.message().contains(what)));
        engine.closed().await;
    }
}

#[tokio::test]
async fn a_client_that_never_reads_is_cut_at_its_deadline_and_told_so() {
    let (engine, answers) = engine_of_one();
    let responses = open(answer(None, &[]), answers, patience(Duration::from_millis(50)), || None);
    // Far more than there is room for: the engine is made to wait, and then let go.
    let mut sent = 0;
    while engine.send(token(1)).await.is_ok() {
        sent += 1;
        assert!(sent < 10_000, "nobody holds the engine back");
    }
    let seen = Seen::all_of(responses).await;
    assert_eq!(ErrorKind::of(&seen.status.unwrap()), ErrorKind::DeadlineExceeded);
    assert!(seen.tokens.len() <= sent);
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_request() {
    let (engine, answers) = engine_of_one();
    let mut responses = open(answer(None, &[]), answers, patience(LATER), || None);
    engine.send(started()).await.unwrap();
    assert!(responses.next().await.is_some());
    drop(responses);
    engine.closed().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_no_message_for_a_while_is_cut_and_its_request_freed() {
    let (engine, answers) = engine_of_one();
    let mut responses = open(answer(None, &[]), answers, patience(LATER), || None);
    engine.send(started()).await.unwrap();
    // It reads a little first: it is the time since its last message that counts.
    assert!(responses.next().await.unwrap().is_ok());
    let began = time::Instant::now();
    while engine.send(token(1)).await.is_ok() {}
    assert_eq!(began.elapsed(), SLOW_READER);
    let status = Seen::all_of(responses).await.status.unwrap();
    assert_eq!(ErrorKind::of(&status), ErrorKind::ResourceExhausted);
    assert!(status.message().contains("30 s"), "{status:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_reads_slowly_but_steadily_gets_its_answer() {
    let (engine, answers) = engine_of_one();
    let mut responses = open(answer(None, &[]), answers, patience(LATER), || None);
    let told = tokio::spawn(async move {
        engine.send(started()).await.unwrap();
        for _ in 0..1_000 {
            engine.send(token(1)).await.unwrap();
        }
        engine.send(finished(FinishReason::Length, 1_000)).await.unwrap();
    });
    let mut last = None;
    while let Some(response) = responses.next().await {
        last = response.unwrap().event;
        time::sleep(SLOW_READER - Duration::from_secs(1)).await;
    }
    assert!(matches!(last, Some(Told::Finished(_))));
    told.await.unwrap();
}

mod answers;
