//! Every field's edges, what the checkpoint's defaults do, and that no message makes this panic.

use conclave_proto::status::ErrorKind;
use proptest::prelude::*;

use super::*;

const CONTEXT: usize = 64;
const VOCAB: usize = 100;

fn bounds() -> Bounds {
    Bounds {
        name: "tiny".to_owned(),
        context_tokens: CONTEXT,
        vocab_size: VOCAB,
        answers_max: 8,
        has_tokenizer: true,
        eos_token_ids: vec![1, 2],
        defaults: Defaults::new(&GenerationConfig {
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(40),
            repetition_penalty: Some(1.1),
            ..GenerationConfig::default()
        }),
    }
}

/// Three prompt tokens and nothing else said.
fn plain() -> pb::GenerateRequest {
    pb::GenerateRequest { input: Some(Input::Tokens(pb::TokenIds { ids: vec![5, 6, 7] })), ..Default::default() }
}

fn ids_only(input: Input) -> Result<Vec<u32>, Failure> {
    match input {
        Input::Tokens(tokens) => Ok(tokens.ids),
        Input::Prompt(_) | Input::Chat(_) => Err(Failure::precondition("NO_TOKENIZER", "none in this test")),
    }
}

fn check(request: pb::GenerateRequest) -> Result<Accepted, Failure> {
    accept(request, &bounds(), Instant::now(), ids_only)
}

fn sampled(sampling: pb::SamplingParams) -> pb::GenerateRequest {
    pb::GenerateRequest { sampling: Some(sampling), ..plain() }
}

fn stopped(stop: pb::StopParams) -> pb::GenerateRequest {
    pb::GenerateRequest { stop: Some(stop), ..plain() }
}

#[track_caller]
fn refused(request: pb::GenerateRequest, field: &str) -> String {
    let failure = check(request).expect_err(field);
    assert_eq!(failure.kind, ErrorKind::InvalidArgument, "{failure:?}");
    assert_eq!(failure.field.as_deref(), Some(field), "{failure:?}");
    failure.message
}

#[test]
fn what_is_left_unset_comes_from_the_checkpoint() {
    let Accepted { request, stop_strings } = check(plain()).unwrap();
    assert_eq!(request.prompt, [5, 6, 7]);
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.6, 0.95, 40));
    assert_eq!((sampling.repetition_penalty, sampling.min_p, sampling.presence_penalty), (1.1, 0.0, 0.0));
    assert_eq!((request.stop.max_tokens, request.stop.min_tokens), (CONTEXT - 3, 0));
    assert_eq!(*request.stop.token_ids, [1, 2]);
    assert!(!request.logprobs.any() && !request.logprobs.prompt && stop_strings.is_empty());
}

#[test]
fn a_checkpoint_without_opinions_samples_plainly() {
    let plain = Defaults { temperature: 1.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0 };
    assert_eq!(Defaults::new(&GenerationConfig::default()), plain);
    let hot = GenerationConfig { temperature: Some(7.0), repetition_penalty: Some(50.0), ..Default::default() };
    assert_eq!(Defaults::new(&hot), Defaults { temperature: 2.0, repetition_penalty: 2.0, ..plain });
    let greedy = GenerationConfig { temperature: Some(0.0), top_p: Some(f64::MIN_POSITIVE), ..Default::default() };
    let greedy = Defaults::new(&greedy);
    assert!(greedy.temperature == 0.0 && greedy.top_p > 0.0);
}

#[test]
fn what_the_client_says_wins() {
    let sampling = pb::SamplingParams {
        temperature: Some(0.0),
        top_p: Some(1.0),
        top_k: Some(0),
        repetition_penalty: Some(1.0),
        seed: Some(u64::MAX),
        logit_bias: HashMap::from([(9, -100.0), (3, 100.0)]),
        ..Default::default()
    };
    let sampling = check(sampled(sampling)).unwrap().request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.0, 1.0, 0));
    assert_eq!((sampling.repetition_penalty, sampling.seed), (1.0, u64::MAX));
    assert_eq!(sampling.logit_bias, [(3, 100.0), (9, -100.0)]);
}

#[test]
fn more_top_k_than_tokens_is_off() {
    let top_k = |top_k| check(sampled(pb::SamplingParams { top_k: Some(top_k), ..Default::default() }));
    assert_eq!(top_k(u32::MAX).unwrap().request.sampling.top_k, 0);
    assert_eq!(top_k(99).unwrap().request.sampling.top_k, 99);
}

#[test]
fn every_sampling_number_has_its_range() {
    type Set = fn(&mut pb::SamplingParams, f32);
    let fields: [(&str, Set, [f32; 2], &[f32]); 6] = [
        ("sampling.temperature", |s, v| s.temperature = Some(v), [0.0, 2.0], &[-0.1, 2.1]),
        ("sampling.top_p", |s, v| s.top_p = Some(v), [0.001, 1.0], &[0.0, -1.0, 1.001]),
        ("sampling.min_p", |s, v| s.min_p = v, [0.0, 1.0], &[-0.1, 1.1]),
        ("sampling.repetition_penalty", |s, v| s.repetition_penalty = Some(v), [0.01, 2.0], &[0.0, -1.0, 2.1]),
        ("sampling.presence_penalty", |s, v| s.presence_penalty = v, [-2.0, 2.0], &[-2.1, 2.1]),
        ("sampling.frequency_penalty", |s, v| s.frequency_penalty = v, [-2.0, 2.0], &[-2.1, 2.1]),
    ];
    for (field, set, good, bad) in fields {
        let with = |value| {
            let mut sampling = pb::SamplingParams::default();
            set(&mut sampling, value);
            sampled(sampling)
        };
        for value in good {
            check(with(value)).unwrap_or_else(|failure| panic!("{field} = {value}: {failure:?}"));
        }
        for value in bad.iter().copied().chain([f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
            refused(with(value), field);
        }
    }
    let message = refused(sampled(pb::SamplingParams { top_p: Some(1.5), ..Default::default() }), "sampling.top_p");
    assert_eq!(message, "must be in (0, 1], is 1.5");
}

#[test]
fn logit_biases_are_few_small_and_of_known_tokens() {
    let biased = |biases: HashMap<u32, f32>| sampled(pb::SamplingParams { logit_bias: biases, ..Default::default() });
    refused(biased(HashMap::from([(3, 100.5)])), "sampling.logit_bias[3]");
    refused(biased(HashMap::from([(3, f32::NAN)])), "sampling.logit_bias[3]");
    refused(biased(HashMap::from([(100, 1.0)])), "sampling.logit_bias[100]");
    refused(biased((0..1_025).map(|id| (id, 1.0)).collect()), "sampling.logit_bias");
}

#[test]
fn stop_rules_have_their_limits() {
    let stop = pb::StopParams::default;
    refused(stopped(pb::StopParams { max_tokens: Some(0), ..stop() }), "stop.max_tokens");
    refused(stopped(pb::StopParams { min_tokens: 62, ..stop() }), "stop.min_tokens");
    refused(stopped(pb::StopParams { min_tokens: 6, max_tokens: Some(5), ..stop() }), "stop.min_tokens");
    refused(stopped(pb::StopParams { strings: vec!["x".into(); 17], ..stop() }), "stop.strings");
    refused(
        stopped(pb::StopParams { strings: vec!["a".into(), "b".into(), "c".into(), String::new()], ..stop() }),
        "stop.strings[3]",
    );
    refused(stopped(pb::StopParams { strings: vec!["é".repeat(129)], ..stop() }), "stop.strings[0]");
    refused(stopped(pb::StopParams { token_ids: vec![3; 65], ..stop() }), "stop.token_ids");
    refused(stopped(pb::StopParams { token_ids: vec![3, 100], ..stop() }), "stop.token_ids[1]");
    let all = pb::StopParams {
        strings: vec!["é".repeat(128); 16],
        token_ids: vec![3; 64],
        max_tokens: Some(61),
        min_tokens: 61,
        ..stop()
    };
    assert_eq!(check(stopped(all)).unwrap().stop_strings.len(), 16);
}

#[test]
fn stop_tokens_and_end_tokens_come_together_once_each() {
    let ids = |ignore_eos| {
        let stop = pb::StopParams { token_ids: vec![9, 2, 9], ignore_eos, ..Default::default() };
        check(stopped(stop)).unwrap().request.stop.token_ids.to_vec()
    };
    assert_eq!(ids(false), [1, 2, 9]);
    assert_eq!(ids(true), [2, 9]);
}

#[test]
fn stop_strings_need_a_tokenizer() {
    let request = stopped(pb::StopParams { strings: vec!["x".into()], ..Default::default() });
    let failure = accept(request, &Bounds { has_tokenizer: false, ..bounds() }, Instant::now(), ids_only).unwrap_err();
    assert_eq!((failure.kind, failure.reason), (ErrorKind::FailedPrecondition, "NO_TOKENIZER"));
}

#[test]
fn a_prompt_longer_than_the_context_is_told_both_numbers() {
    let long =
        |length| pb::GenerateRequest { input: Some(Input::Tokens(pb::TokenIds { ids: vec![5; length] })), ..plain() };
    assert_eq!(check(long(63)).unwrap().request.stop.max_tokens, 1);
    for length in [64, 1_000] {
        let message = refused(long(length), "tokens.ids");
        assert!(message.contains(&length.to_string()) && message.contains("64"), "{message}");
    }
    let resumed = pb::GenerateRequest { resume_tokens: vec![5; 62], ..plain() };
    let message = refused(resumed, "tokens.ids");
    assert!(message.contains('3') && message.contains("62") && message.contains("64"), "{message}");
}

#[test]
fn an_answer_that_does_not_fit_is_told_all_the_numbers() {
    let asked = |max_tokens| stopped(pb::StopParams { max_tokens: Some(max_tokens), ..Default::default() });
    assert_eq!(check(asked(61)).unwrap().request.stop.max_tokens, 61);
    for max_tokens in [62, u32::MAX] {
        let message = refused(asked(max_tokens), "stop.max_tokens");
        for number in [max_tokens, 3, 64, 61] {
            assert!(message.contains(&number.to_string()), "{message}");
        }
    }
}

#[test]
fn resumed_tokens_count_towards_the_answer() {
    let resumed = |resumed, max_tokens| pb::GenerateRequest {
        resume_tokens: vec![8; resumed],
        ..stopped(pb::StopParams { max_tokens, ..Default::default() })
    };
    let request = check(resumed(4, Some(4))).unwrap().request;
    assert_eq!((request.resumed.len(), request.stop.max_tokens), (4, 4));
    assert_eq!(check(resumed(61, None)).unwrap().request.stop.max_tokens, 61);
    refused(resumed(5, Some(4)), "resume_tokens");
    refused(pb::GenerateRequest { resume_tokens: vec![100], ..plain() }, "resume_tokens[0]");
}

#[test]
fn logprobs_have_their_limits() {
    let asked = |logprobs| pb::GenerateRequest { logprobs: Some(logprobs), ..plain() };
    refused(asked(pb::LogprobParams { top: 21, ..Default::default() }), "logprobs.top");
    let rules = check(asked(pb::LogprobParams { sampled: true, top: 20, prompt: true })).unwrap().request.logprobs;
    assert_eq!((rules.sampled, rules.top, rules.prompt), (true, 20, true));

    let huge = Bounds { context_tokens: 1 << 20, ..bounds() };
    let request = pb::GenerateRequest {
        input: Some(Input::Tokens(pb::TokenIds { ids: vec![5; 200_000] })),
        ..asked(pb::LogprobParams { top: 20, prompt: true, ..Default::default() })
    };
    let failure = accept(request, &huge, Instant::now(), ids_only).unwrap_err();
    assert_eq!(failure.field.as_deref(), Some("logprobs.prompt"));
}

#[test]
fn names_ids_and_priorities_are_checked() {
    let served = check(pb::GenerateRequest { model: "tiny".into(), ..plain() });
    assert!(served.is_ok());
    let other = check(pb::GenerateRequest { model: "huge".into(), ..plain() }).unwrap_err();
    assert_eq!((other.kind, other.reason), (ErrorKind::NotFound, "MODEL_NOT_FOUND"));

    let named = |request_id: &str| pb::GenerateRequest { request_id: request_id.into(), ..plain() };
    assert_eq!(&*check(named("a-1")).unwrap().request.request_id, "a-1");
    assert!(check(named(&"x".repeat(128))).is_ok());
    for bad in [&"x".repeat(129), "a b", "a\n", "é"] {
        refused(named(bad), "request_id");
    }
    let made_up = check(named("")).unwrap().request.request_id;
    assert!(made_up.strip_prefix("req-").is_some_and(|hex| hex.len() == 16), "{made_up}");

    for priority in [-100, 0, 100] {
        assert_eq!(check(pb::GenerateRequest { priority, ..plain() }).unwrap().request.priority, priority);
    }
    for priority in [-101, 101, i32::MIN, i32::MAX] {
        refused(pb::GenerateRequest { priority, ..plain() }, "priority");
    }
}

#[test]
fn answers_are_as_many_as_there_is_room_for_and_not_resumed_together() {
    let asked = |n| pb::GenerateRequest { n, ..plain() };
    let answers = |n| check(asked(n)).unwrap().request.answers;
    assert_eq!((answers(None), answers(Some(1)), answers(Some(8))), (1, 1, 8));
    for n in [0, 17, u32::MAX] {
        assert!(refused(asked(Some(n)), "n").contains("[1, 16]"));
    }
    assert!(refused(asked(Some(9)), "n").contains("at most 8"));
    let resumed = |n| pb::GenerateRequest { resume_tokens: vec![8], ..asked(n) };
    assert!(check(resumed(Some(1))).is_ok());
    refused(resumed(Some(2)), "resume_tokens");
}

#[test]
fn a_cache_salt_is_short() {
    let salted = |salt: String| pb::GenerateRequest { cache_salt: salt, ..plain() };
    assert_eq!(&*check(salted("é".repeat(64))).unwrap().request.cache_salt, "é".repeat(64));
    refused(salted("é".repeat(65)), "cache_salt");
}

#[test]
fn some_input_is_needed() {
    refused(pb::GenerateRequest { input: None, ..plain() }, "input");
    refused(pb::GenerateRequest { input: Some(Input::Tokens(pb::TokenIds::default())), ..plain() }, "tokens.ids");
}

#[test]
fn a_seed_is_made_up_where_none_is_given() {
    let seeds: Vec<_> = (0..3).map(|_| check(plain()).unwrap().request.sampling.seed).collect();
    assert!(seeds[0] != seeds[1] || seeds[1] != seeds[2]);
}

proptest! {
    #[test]
    fn whatever_is_accepted_is_within_bounds(
        floats in prop::array::uniform6(any::<f32>()),
        top_k in any::<Option<u32>>(),
        max_tokens in prop::option::of(0_u32..80),
        min_tokens in 0_u32..80,
        prompt in prop::collection::vec(0_u32..110, 0..70),
        resume_tokens in prop::collection::vec(0_u32..110, 0..70),
        top in 0_u32..30,
    ) {
        let [temperature, top_p, min_p, repetition, presence_penalty, frequency_penalty] = floats;
        let request = pb::GenerateRequest {
            input: Some(Input::Tokens(pb::TokenIds { ids: prompt })),
            sampling: Some(pb::SamplingParams {
                // Most floats are far out of range: fold them near it, and leave NaNs and infinities as they are.
                temperature: Some(temperature % 3.0),
                top_p: Some(top_p % 1.5),
                top_k,
                min_p: min_p % 1.5,
                repetition_penalty: Some(repetition % 3.0),
                presence_penalty: presence_penalty % 3.0,
                frequency_penalty: frequency_penalty % 3.0,
                ..Default::default()
            }),
            stop: Some(pb::StopParams { max_tokens, min_tokens, ..Default::default() }),
            logprobs: Some(pb::LogprobParams { top, ..Default::default() }),
            resume_tokens,
            ..Default::default()
        };
        match check(request) {
            Err(failure) => prop_assert!(failure.field.is_some()),
            Ok(Accepted { request, .. }) => {
                let stop = &request.stop;
                prop_assert!(!request.prompt.is_empty() && stop.max_tokens >= 1);
                prop_assert!(request.prompt.len() + stop.max_tokens <= CONTEXT);
                prop_assert!(request.resumed.len() <= stop.max_tokens && stop.min_tokens <= stop.max_tokens);
                let ids = request.prompt.iter().chain(&request.resumed);
                prop_assert!(ids.copied().all(|id| (id as usize) < VOCAB));
                let sampling = &request.sampling;
                prop_assert!((0.0..=2.0).contains(&sampling.temperature));
                prop_assert!(sampling.top_p > 0.0 && sampling.top_p <= 1.0);
                prop_assert!((sampling.top_k as usize) < VOCAB && request.logprobs.top <= 20);
            }
        }
    }
}

mod every_field;
