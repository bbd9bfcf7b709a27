//! Several answers to one prompt: mixed by the engine, told apart by the client.

use super::*;
use crate::sequence::Stopped;

fn of_answer(index: usize, event: Event) -> Event {
    match event {
        Event::Token { token, .. } => Event::Token { answer: index, token },
        Event::Finished { reason, completion_tokens, timings, .. } => {
            Event::Finished { answer: index, reason, completion_tokens, timings }
        }
        other => other,
    }
}

/// What the engine tells of one answer.
fn events_of(index: usize, text: &str) -> Vec<Event> {
    let end = finished(FinishReason::Length, text.len());
    tokens(text).chain([end]).map(|event| of_answer(index, event)).collect()
}

/// One answer, as its client puts it together.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    text: String,
    ids: Vec<u32>,
    finished: Option<pb::Finished>,
}

/// Adds one message to its answer; nothing may follow an answer's end.
fn hear(answers: &mut [Heard], told: Told) {
    match told {
        Told::Started(_) => assert!(answers.iter().all(|answer| *answer == Heard::default())),
        Told::Tokens(tokens) => {
            let answer = &mut answers[tokens.index as usize];
            assert!(answer.finished.is_none() && !tokens.tokens.is_empty());
            for token in tokens.tokens {
                answer.text.push_str(&token.text);
                answer.ids.push(token.id);
            }
        }
        Told::Finished(finished) => {
            let answer = &mut answers[finished.index as usize];
            assert!(answer.finished.is_none());
            answer.text.push_str(&finished.trailing_text);
            answer.finished = Some(finished);
        }
    }
}

/// Reads a reply of `n` answers to its end.
async fn read(n: usize, mut responses: Responses) -> Vec<Heard> {
    let mut answers = vec![Heard::default(); n];
    while let Some(response) = responses.next().await {
        hear(&mut answers, response.unwrap().event.unwrap());
    }
    answers
}

fn replying(n: usize, tokenizer: &Tokenizer, stops: &[&str]) -> Reply {
    reply((0..n).map(|_| text(Some(tokenizer), stops)).collect())
}

#[tokio::test]
async fn tokens_in_a_row_share_a_message_and_answers_never_do() {
    let (submission, answers) = submitted(2);
    for (index, id) in [(0, 65), (0, 66), (1, 67), (0, 68)] {
        submission.events.try_send(of_answer(index, token(id))).unwrap();
    }
    for index in 0..2 {
        submission.events.try_send(of_answer(index, finished(FinishReason::Length, 3 - 2 * index))).unwrap();
    }
    let mut responses = open(replying(2, &byte_tokenizer(), &[]), answers, patience(LATER), || None);
    let mut messages = Vec::new();
    while let Some(response) = responses.next().await {
        match response.unwrap().event.unwrap() {
            Told::Tokens(tokens) => {
                messages.push((tokens.index, tokens.tokens.iter().map(|token| token.id).collect::<Vec<_>>()));
            }
            Told::Finished(finished) => messages.push((finished.index, Vec::new())),
            Told::Started(_) => {}
        }
    }
    let expected = [(0, vec![65, 66]), (1, vec![67]), (0, vec![68]), (0, vec![]), (1, vec![])];
    assert_eq!(messages, expected);
}

#[tokio::test]
async fn a_stop_string_ends_its_own_answer_and_the_others_go_on() {
    let tokenizer = byte_tokenizer();
    let (submission, answers) = submitted(3);
    let mut responses = open(replying(3, &tokenizer, &["!"]), answers, patience(LATER), || None);
    let (events, stopped) = (submission.events, submission.stopped);
    events.send(Event::Started { cached_tokens: 2, queue_us: 1, prompt_logprobs: Vec::new() }).await.unwrap();
    for event in tokens("ab!").map(|event| of_answer(1, event)) {
        events.send(event).await.unwrap();
    }
    // Told at once, and to the engine too.
    let finished = loop {
        if let Told::Finished(finished) = responses.next().await.unwrap().unwrap().event.unwrap() {
            break finished;
        }
    };
    assert_eq!((finished.index, finished.reason()), (1, pb::FinishReason::Stop));
    assert_eq!(finished.matched_stop, Some(MatchedStop::StopString("!".into())));
    let (usage, timings) = (finished.usage.unwrap(), finished.timings.unwrap());
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (3, 2, 3));
    assert_eq!(timings.queue_us, 1);
    assert_eq!([0, 1, 2].map(|index| stopped.is_stopped(index)), [false, true, false]);

    // What the engine had drawn in the meantime, and its own end of that answer, are passed over.
    for event in events_of(1, "cd").into_iter().chain(events_of(2, "xy")).chain(events_of(0, "z")) {
        events.send(event).await.unwrap();
    }
    let rest = read(3, responses).await;
    assert_eq!(rest.iter().map(|answer| answer.text.as_str()).collect::<Vec<_>>(), ["z", "", "xy"]);
    assert!(rest[1].finished.is_none(), "it was told before");
    assert_eq!(rest[2].finished.as_ref().unwrap().usage.unwrap().completion_tokens, 2);
    // After the last end the engine's side is let go.
    events.closed().await;
}

#[tokio::test]
async fn when_every_answer_has_met_its_stop_string_the_request_is_freed() {
    let (submission, answers) = submitted(2);
    let events = submission.events;
    for index in [1, 0] {
        for event in tokens("a!").map(|event| of_answer(index, event)) {
            events.try_send(event).unwrap();
        }
    }
    let answers = read(2, open(replying(2, &byte_tokenizer(), &["!"]), answers, patience(LATER), || None)).await;
    assert!(answers.iter().all(|answer| answer.text == "a" && answer.finished.is_some()));
    events.closed().await;
}

#[tokio::test]
async fn a_failure_ends_all_answers() {
    let (submission, answers) = submitted(2);
    for event in events_of(0, "a").into_iter().chain([Event::Failed(Failure::internal("broken"))]) {
        submission.events.try_send(event).unwrap();
    }
    let mut responses = open(replying(2, &byte_tokenizer(), &[]), answers, patience(LATER), || None);
    let mut last = responses.next().await;
    while let Some(next) = responses.next().await {
        assert!(last.replace(next).unwrap().is_ok(), "nothing follows a failure");
    }
    assert_eq!(ErrorKind::of(&last.unwrap().unwrap_err()), ErrorKind::Internal);
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for_is_a_fault_and_not_a_panic() {
    let (submission, answers) = submitted(2);
    submission.events.try_send(of_answer(2, token(65))).unwrap();
    let seen = Seen::all_of(open(replying(2, &byte_tokenizer(), &[]), answers, patience(LATER), || None)).await;
    assert_eq!(ErrorKind::of(&seen.status.unwrap()), ErrorKind::Internal);
}

/// Runs `events` through a reply of `n` answers, without a task or a channel between.
fn told(n: usize, tokenizer: &Tokenizer, stops: &[&str], events: Vec<Event>) -> Vec<Heard> {
    let mut reply = replying(n, tokenizer, stops);
    let (mut answers, mut words) = (vec![Heard::default(); n], Vec::new());
    let stopped = Stopped::default();
    let mut events = events.into_iter();
    while !reply.tell(events.next().expect("an end of every answer"), &mut words, &stopped).unwrap() {}
    for mut word in words {
        if let Told::Finished(finished) = &mut word {
            finished.timings = None;
        }
        hear(&mut answers, word);
    }
    for finished in answers.iter_mut().filter_map(|answer| answer.finished.as_mut()) {
        finished.index = 0;
    }
    answers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn however_answers_are_mixed_each_is_what_it_would_be_alone(
        texts in prop::collection::vec("[abé!]{0,12}", 1..8),
        order in prop::collection::vec(any::<prop::sample::Index>(), 150),
    ) {
        let tokenizer = byte_tokenizer();
        let stops = ["b!", "éa"];
        let mut left: Vec<_> = texts.iter().enumerate().map(|(i, text)| events_of(i, text).into_iter()).collect();
        let mut mixed: Vec<_> = order.iter().filter_map(|next| next.get_mut(&mut left).next()).collect();
        mixed.extend(left.into_iter().flatten());
        let together = told(texts.len(), &tokenizer, &stops, mixed);
        for (text, together) in texts.iter().zip(together) {
            prop_assert_eq!(&told(1, &tokenizer, &stops, events_of(0, text))[0], &together);
        }
    }
}
