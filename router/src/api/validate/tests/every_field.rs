//! No field of a `GenerateRequest` is forgotten: the contract's own descriptors say which there are.

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::{DescriptorProto, FileDescriptorSet, field_descriptor_proto::Type};

use super::*;
use crate::api::{
    test_model::{BOS, LIMITS, served},
    tokenize,
};

const ROOT: &str = ".conclave.inference.v1.GenerateRequest";

/// Every value of these means something.
const ANY_VALUE: [&str; 6] = [
    "chat.add_generation_prompt",
    "logprobs.prompt",
    "logprobs.sampled",
    "sampling.seed",
    "sampling.top_k",
    "stop.ignore_eos",
];
/// Refused by another name than a field's: as a model that is not served here.
const NOT_A_RANGE: [&str; 1] = ["model"];
/// Has its own tests beside its own code.
const ELSEWHERE: &str = "structured";

/// A field, and requests in which it is out of range.
fn out_of_range() -> Vec<(&'static str, pb::GenerateRequest)> {
    let request = |change: fn(&mut pb::GenerateRequest)| {
        let mut request = plain();
        change(&mut request);
        request
    };
    let sampling = |change: fn(&mut pb::SamplingParams)| {
        let mut sampling = pb::SamplingParams::default();
        change(&mut sampling);
        sampled(sampling)
    };
    let stop = |change: fn(&mut pb::StopParams)| {
        let mut stop = pb::StopParams::default();
        change(&mut stop);
        stopped(stop)
    };
    let said = |role: &str, content: &str| {
        let message = pb::ChatMessage { role: role.to_owned(), content: content.to_owned() };
        let chat = pb::Chat { messages: vec![message], add_generation_prompt: None };
        pb::GenerateRequest { input: Some(Input::Chat(chat)), ..plain() }
    };
    vec![
        ("request_id", request(|r| r.request_id = "two words".into())),
        ("prompt", request(|r| r.input = Some(Input::Prompt("x".repeat(1 << 20))))),
        ("tokens.ids", request(|r| r.input = Some(Input::Tokens(pb::TokenIds { ids: vec![u32::MAX] })))),
        ("chat.messages", request(|r| r.input = Some(Input::Chat(pb::Chat::default())))),
        ("chat.messages.role", said("two words", "hi")),
        ("chat.messages.content", said("user", &"x".repeat(1 << 20))),
        ("sampling.temperature", sampling(|s| s.temperature = Some(2.1))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(0.0))),
        ("sampling.min_p", sampling(|s| s.min_p = 1.1)),
        ("sampling.repetition_penalty", sampling(|s| s.repetition_penalty = Some(0.0))),
        ("sampling.presence_penalty", sampling(|s| s.presence_penalty = 2.1)),
        ("sampling.frequency_penalty", sampling(|s| s.frequency_penalty = -2.1)),
        ("sampling.logit_bias", sampling(|s| s.logit_bias = HashMap::from([(3, 100.5)]))),
        ("stop.max_tokens", stop(|s| s.max_tokens = Some(0))),
        ("stop.min_tokens", stop(|s| s.min_tokens = 1_000)),
        ("stop.strings", stop(|s| s.strings = vec![String::new()])),
        ("stop.token_ids", stop(|s| s.token_ids = vec![u32::MAX])),
        ("logprobs.top", request(|r| r.logprobs = Some(pb::LogprobParams { top: 21, ..Default::default() }))),
        ("resume_tokens", request(|r| r.resume_tokens = vec![u32::MAX])),
        ("priority", request(|r| r.priority = 101)),
        ("n", request(|r| r.n = Some(17))),
        ("cache_salt", request(|r| r.cache_salt = "x".repeat(129))),
    ]
}

/// Paths of all fields below `message` that hold a value themselves.
fn fields(message: &str, prefix: &str, all: &[(String, DescriptorProto)]) -> BTreeSet<String> {
    let (_, descriptor) = all.iter().find(|(name, _)| name == message).expect("the descriptors are whole");
    let mut paths = BTreeSet::new();
    for field in &descriptor.field {
        let path = format!("{prefix}{}", field.name());
        let is_map = descriptor.nested_type.iter().any(|nested| {
            let entry = nested.options.as_ref().is_some_and(|options| options.map_entry());
            entry && field.type_name() == format!("{message}.{}", nested.name())
        });
        if field.r#type() == Type::Message && !is_map {
            // A list of messages has a length of its own.
            if field.label() == prost_types::field_descriptor_proto::Label::Repeated {
                paths.insert(path.clone());
            }
            paths.extend(fields(field.type_name(), &format!("{path}."), all));
        } else {
            paths.insert(path);
        }
    }
    paths
}

fn fields_of_the_contract() -> BTreeSet<String> {
    let files = FileDescriptorSet::decode(conclave_proto::FILE_DESCRIPTOR_SET).unwrap().file;
    let named = |package: String, message: DescriptorProto| (format!(".{package}.{}", message.name()), message);
    let all: Vec<_> = files
        .into_iter()
        .flat_map(|file| {
            let package = file.package().to_owned();
            file.message_type.into_iter().map(move |message| named(package.clone(), message))
        })
        .collect();
    fields(ROOT, "", &all)
}

/// `chat.messages[0].role` is the field `chat.messages.role`.
fn without_places(path: &str) -> String {
    path.split('[').map(|part| part.split_once(']').map_or(part, |(_, rest)| rest)).collect()
}

#[test]
fn every_field_that_can_be_out_of_range_is_refused_by_its_name() {
    let model = served();
    let bounds = Bounds::new(&model, LIMITS);
    for (field, request) in out_of_range() {
        let encode = |input| match input {
            Input::Tokens(tokens) => Ok(tokens.ids),
            Input::Prompt(text) => tokenize::prompt(&model, &bounds, "prompt", &text),
            Input::Chat(chat) => tokenize::chat(&model, &bounds, chat),
        };
        let failure = accept(request, &bounds, Instant::now(), encode).expect_err(field);
        assert_eq!(failure.kind, ErrorKind::InvalidArgument, "{field}: {failure:?}");
        assert_eq!(failure.field.as_deref().map(without_places).as_deref(), Some(field), "{failure:?}");
    }
}

#[test]
fn no_field_of_the_contract_is_forgotten() {
    let refused = out_of_range().into_iter().map(|(field, _)| field);
    let known: BTreeSet<_> = refused.chain(ANY_VALUE).chain(NOT_A_RANGE).map(str::to_owned).collect();
    let mut fields = fields_of_the_contract();
    let elsewhere = fields.extract_if(.., |field| field.split('.').next() == Some(ELSEWHERE)).count();
    assert!(elsewhere > 0, "{ELSEWHERE} is no field any more");
    assert_eq!(fields, known, "left: the contract's fields, right: those with a case here");
}

#[test]
fn fields_of_any_value_are_taken_at_their_extremes() {
    let sampling = pb::SamplingParams { seed: Some(u64::MAX), top_k: Some(u32::MAX), ..Default::default() };
    let stop = pb::StopParams { ignore_eos: true, ..Default::default() };
    let logprobs = pb::LogprobParams { sampled: true, prompt: true, top: 0 };
    let request =
        pb::GenerateRequest { sampling: Some(sampling), stop: Some(stop), logprobs: Some(logprobs), ..plain() };
    assert!(check(request).is_ok());
    let chat = pb::Chat {
        messages: vec![pb::ChatMessage { role: "user".into(), content: String::new() }],
        add_generation_prompt: Some(false),
    };
    let model = served();
    let bounds = Bounds::new(&model, LIMITS);
    assert_eq!(tokenize::chat(&model, &bounds, chat).unwrap().first(), Some(&BOS));
}
