//! Bad input gets one clear answer: a status that names the field, or a process that ends with a line naming the file.

use std::{collections::HashMap, path::Path, time::Duration};

use conclave_proto::inference::v1::{
    Chat, ChatMessage, DetokenizeRequest, GenerateRequest, LogprobParams, SamplingParams, StopParams, StructuredOutput,
    TokenIds, TokenizeRequest, generate_request::Input, structured_output::Grammar,
};
use conclave_tests::{
    checkpoint::Copy,
    client::{Client, explain, greedy},
    cluster::Cluster,
    eventually::PATIENCE,
    golden::Golden,
    process::{Process, binary},
};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

const VOCAB: u32 = 160;
const SERVERS: [&str; 2] = ["conclave-router", "conclave-expert-worker"];

fn sampling(change: impl FnOnce(&mut SamplingParams)) -> GenerateRequest {
    let mut request = greedy(&[3, 4, 5], 4);
    change(request.sampling.as_mut().expect("set"));
    request
}

fn stop(change: impl FnOnce(&mut StopParams)) -> GenerateRequest {
    let mut request = greedy(&[3, 4, 5], 4);
    change(request.stop.as_mut().expect("set"));
    request
}

fn request(change: impl FnOnce(&mut GenerateRequest)) -> GenerateRequest {
    let mut request = greedy(&[3, 4, 5], 4);
    change(&mut request);
    request
}

/// Requests with one field out of range, and the path that the answer must name.
fn out_of_range() -> Vec<(&'static str, GenerateRequest)> {
    let biases = |count: u32| -> HashMap<u32, f32> { (0..count).map(|id| (id, 1.0)).collect() };
    let mut cases = vec![
        ("request_id", request(|r| r.request_id = "x".repeat(129))),
        ("request_id", request(|r| r.request_id = "two words".into())),
        ("input", request(|r| r.input = None)),
        ("tokens.ids", request(|r| r.input = Some(Input::Tokens(TokenIds::default())))),
        ("tokens.ids[1]", request(|r| r.input = Some(Input::Tokens(TokenIds { ids: vec![3, VOCAB] })))),
        ("sampling.top_p", sampling(|s| s.top_p = Some(0.0))),
        ("sampling.repetition_penalty", sampling(|s| s.repetition_penalty = Some(0.0))),
        ("sampling.logit_bias", sampling(|s| s.logit_bias = biases(1025))),
        ("sampling.logit_bias[7]", sampling(|s| s.logit_bias = HashMap::from([(7, 100.5)]))),
        ("sampling.logit_bias[7]", sampling(|s| s.logit_bias = HashMap::from([(7, f32::NAN)]))),
        ("sampling.logit_bias[160]", sampling(|s| s.logit_bias = HashMap::from([(VOCAB, 1.0)]))),
        ("stop.max_tokens", stop(|s| s.max_tokens = Some(0))),
        ("stop.max_tokens", stop(|s| s.max_tokens = Some(1_000_000_000))),
        ("stop.min_tokens", stop(|s| s.min_tokens = 5)),
        ("stop.strings", stop(|s| s.strings = vec!["x".into(); 17])),
        ("stop.strings[1]", stop(|s| s.strings = vec!["x".into(), String::new()])),
        ("stop.strings[0]", stop(|s| s.strings = vec!["x".repeat(257)])),
        ("stop.token_ids", stop(|s| s.token_ids = vec![3; 65])),
        ("stop.token_ids[0]", stop(|s| s.token_ids = vec![VOCAB])),
        ("logprobs.top", request(|r| r.logprobs = Some(LogprobParams { top: 21, ..Default::default() }))),
        ("resume_tokens[2]", request(|r| r.resume_tokens = vec![3, 4, u32::MAX])),
        ("resume_tokens", request(|r| r.resume_tokens = vec![3; 5])),
        ("resume_tokens", request(|r| (r.resume_tokens, r.n) = (vec![3], Some(2)))),
        ("n", request(|r| r.n = Some(0))),
        ("n", request(|r| r.n = Some(17))),
        ("cache_salt", request(|r| r.cache_salt = "x".repeat(129))),
        ("priority", request(|r| r.priority = 101)),
        ("priority", request(|r| r.priority = -101)),
    ];
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.1, 2.1] {
        cases.push(("sampling.temperature", sampling(|s| s.temperature = Some(wrong))));
        cases.push(("sampling.top_p", sampling(|s| s.top_p = Some(wrong))));
        cases.push(("sampling.min_p", sampling(|s| s.min_p = wrong)));
        cases.push(("sampling.repetition_penalty", sampling(|s| s.repetition_penalty = Some(wrong))));
        cases.push(("sampling.presence_penalty", sampling(|s| s.presence_penalty = wrong * 21.0)));
        cases.push(("sampling.frequency_penalty", sampling(|s| s.frequency_penalty = wrong * 21.0)));
    }
    cases
}

#[tokio::test]
async fn a_field_out_of_range_is_named_and_the_router_serves_on() {
    let golden = Golden::named("v3_tied");
    let cluster = Cluster::builder(&golden.folder).start().await;
    let client = cluster.client(0).await;
    let model = client.model().await;
    assert_eq!(model.vocab_size, VOCAB);

    for (field, request) in out_of_range() {
        is_named(field, &refused(&client, request).await);
    }

    too_long(&client, model.context_tokens).await;

    let elsewhere = request(|r| r.model = "another-model".into());
    let status = refused(&client, elsewhere).await;
    assert_eq!(status.code(), Code::NotFound, "{}", explain(&status));
    let by_name = client.answer(request(|r| r.model = model.name.clone())).await;
    assert_eq!(by_name.tokens.len(), 4);

    needs_a_tokenizer(&client).await;

    let case = &golden.cases[0];
    assert_eq!(client.generate(&case.prompt, 24).await.ids(), case.greedy, "after all that");
}

#[track_caller]
fn is_named(field: &str, status: &Status) {
    let told = format!("{field}: {}", explain(status));
    assert_eq!(status.code(), Code::InvalidArgument, "{told}");
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap_or_else(|| panic!("no BadRequest: {told}")).field_violations;
    assert_eq!(violations.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), [field], "{told}");
}

#[tokio::test]
async fn text_out_of_range_is_named_where_there_is_a_tokenizer() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let copy = Copy::of(&Golden::named("v3_tied").folder, folder.path().join("with-words"));
    let words = json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"what": 3, "else": 4}, "unk_token": "else"},
    });
    let template = "{% for message in messages %}{{ message.content }} {% endfor %}";
    for (file, content) in [("tokenizer.json", words), ("tokenizer_config.json", json!({"chat_template": template}))] {
        std::fs::write(copy.folder.join(file), content.to_string()).expect("a file in the temporary folder");
    }
    let cluster = Cluster::builder(&copy.folder).start().await;
    let client = cluster.client(0).await;

    let chat = |messages| Input::Chat(Chat { messages, add_generation_prompt: None });
    let said = |role: &str, content: &str| chat(vec![ChatMessage { role: role.into(), content: content.into() }]);
    let long = "what ".repeat(1 << 18);
    for (field, input) in [
        ("prompt", Input::Prompt(long.clone())),
        ("chat.messages", chat(Vec::new())),
        ("chat.messages[0].role", said("two words", "what")),
        ("chat.messages[0].content", said("user", &long)),
    ] {
        is_named(field, &refused(&client, request(|r| r.input = Some(input))).await);
    }
    let answer = client.answer(request(|r| r.input = Some(said("user", "what else")))).await;
    assert_eq!((answer.started.prompt_tokens, answer.tokens.len()), (2, 4));
}

/// A prompt longer than the context: the answer has both numbers.
async fn too_long(client: &Client, context: u32) {
    let long = context + 1;
    let status = refused(client, greedy(&vec![3; long as usize], 1)).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{}", explain(&status));
    for number in [context, long] {
        assert!(status.message().contains(&number.to_string()), "no {number} in: {}", status.message());
    }
}

/// The golden models have no tokenizer: text is refused as something that this deployment lacks, not as a fault.
async fn needs_a_tokenizer(client: &Client) {
    let text = request(|r| r.input = Some(Input::Prompt("hello".into())));
    let chat = request(|r| r.input = Some(Input::Chat(Chat::default())));
    let grammar = StructuredOutput { grammar: Some(Grammar::Regex("a".into())) };
    let form = request(|r| r.structured = Some(grammar));
    for status in [
        refused(client, text).await,
        refused(client, form).await,
        refused(client, chat).await,
        client.raw().tokenize(TokenizeRequest::default()).await.expect_err("no input"),
        client.raw().detokenize(DetokenizeRequest { ids: vec![3], ..Default::default() }).await.expect_err("no words"),
    ] {
        let code = status.code();
        assert!(matches!(code, Code::FailedPrecondition | Code::InvalidArgument), "{}", explain(&status));
    }
}

async fn refused(client: &Client, request: GenerateRequest) -> Status {
    client.ask(request, PATIENCE).await.expect_err("a bad request is refused")
}

#[tokio::test]
async fn without_a_worker_a_request_waits_and_is_then_told_when_to_come_back() {
    let golden = Golden::named("v3_tied");
    let case = &golden.cases[0];
    let mut cluster = Cluster::builder(&golden.folder).workers(0).launch().await;
    let client = cluster.client(0).await;

    let status = client.ask(greedy(&case.prompt, 24), Duration::from_secs(2)).await.expect_err("nobody computes");
    assert_eq!(status.code(), Code::Unavailable, "{}", explain(&status));
    let details = status.get_error_details();
    assert!(details.retry_info().is_some_and(|info| info.retry_delay.is_some()), "{}", explain(&status));

    let waiting = client.answer(greedy(&case.prompt, 24));
    cluster.add_worker();
    assert_eq!(waiting.await.ids(), case.greedy, "a request that waited for the first worker");
}

#[tokio::test]
async fn who_serves_another_checkpoint_refuses_to_join_and_says_why() {
    let golden = Golden::named("v3_tied");
    let cluster = Cluster::builder(&golden.folder).start().await;
    let folder = tempfile::tempdir().expect("a temporary folder");

    let weights = Copy::of(&golden.folder, folder.path().join("other-weights"));
    weights.scramble("model.safetensors");
    let config = Copy::of(&golden.folder, folder.path().join("other-config"));
    config.edit_config(|config| drop(config.insert("routed_scaling_factor".into(), json!(1.25))));

    for (stranger, word) in [(weights, "checkpoint"), (config, "config")] {
        for server in SERVERS {
            let arguments = cluster.arguments("stranger", &stranger.folder);
            let log = ends_badly(&format!("{server}-{word}"), server, &arguments, cluster.log_folder()).await;
            let why = |line: &str| line.contains("digest") && line.contains(word);
            assert!(log.lines().any(why), "{server}: no line says that the {word} digest differs:\n{log}");
        }
    }
    let state = cluster.state();
    assert!(state.workers.len() == 1 && state.routers.len() == 1, "strangers registered: {state:?}");
    let case = &golden.cases[0];
    assert_eq!(cluster.client(0).await.generate(&case.prompt, 24).await.ids(), case.greedy);
}

/// A way to break a checkpoint, and the words that one line of the complaint must have.
type Breakage = (&'static str, &'static str, fn(&Copy), &'static [&'static str]);

const UP: &str = "model.layers.1.mlp.experts.3.up_proj.weight";
const SHARD: &str = "model-00002-of-00004.safetensors";
const SINGLE: &str = "model.safetensors";
const BREAKAGES: [Breakage; 10] = [
    ("truncated file", "v2_lite", |copy| copy.truncate(SINGLE, 100), &[SINGLE, "truncated"]),
    ("truncated shard", "v3", |copy| copy.truncate(SHARD, 100), &[SHARD, "truncated"]),
    ("missing shard", "v3", |copy| copy.remove(SHARD), &[SHARD, "missing"]),
    ("header too large", "v2_lite", |copy| copy.claim_header(SINGLE, 1 << 40), &[SINGLE, "header"]),
    ("wrong shape", "v2_lite", |copy| set(copy, "shape", &json!([64, 20])), &[SINGLE, UP, "shape"]),
    ("wrong dtype", "v2_lite", |copy| set(copy, "dtype", &json!("I32")), &[SINGLE, UP, "I32"]),
    ("missing expert", "v2_lite", without_an_expert, &[SINGLE, UP]),
    (
        "unknown model",
        "v2_lite",
        |copy| configure(copy, "model_type", &json!("llama")),
        &["config.json", "model_type", "llama"],
    ),
    (
        "unknown quantisation",
        "v2_lite",
        |copy| configure(copy, "quantization_config", &json!({"quant_method": "gptq"})),
        &["config.json", "quantization_config", "gptq"],
    ),
    (
        "config out of range",
        "v2_lite",
        |copy| configure(copy, "num_experts_per_tok", &json!(99)),
        &["config.json", "num_experts_per_tok", "99"],
    ),
];

fn set(copy: &Copy, key: &str, value: &serde_json::Value) {
    copy.edit_header(SINGLE, |header| header[UP][key] = value.clone());
}

fn without_an_expert(copy: &Copy) {
    copy.edit_header(SINGLE, |header| {
        let tensor = header.remove(UP).expect("an expert's tensor");
        header.insert(format!("{UP}.gone"), tensor);
    });
}

fn configure(copy: &Copy, key: &str, value: &serde_json::Value) {
    copy.edit_config(|config| drop(config.insert(key.into(), value.clone())));
}

#[tokio::test]
async fn a_broken_checkpoint_is_named_by_file_and_tensor_and_never_served() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cluster = Cluster::builder(folder.path()).workers(0).routers(0).launch().await;
    for (breakage, name, break_it, words) in BREAKAGES {
        let copy = Copy::of(&Golden::named(name).folder, folder.path().join(breakage.replace(' ', "-")));
        let last = [SINGLE, SHARD].iter().find(|file| words[0] == **file && words[1] == "truncated");
        let cut = last.map(|file| copy.last_tensor(file));
        break_it(&copy);
        let arguments = cluster.arguments("broken", &copy.folder);
        let ends = SERVERS.map(|server| {
            let (name, arguments, logs) = (format!("{server}-{breakage}"), &arguments, cluster.log_folder());
            async move { (server, ends_badly(&name, server, arguments, logs).await) }
        });
        for (server, log) in futures::future::join_all(ends).await {
            let clear = |line: &str| words.iter().copied().chain(cut.as_deref()).all(|word| line.contains(word));
            assert!(log.lines().any(clear), "{breakage}, {server}: no line with {words:?} and {cut:?} in:\n{log}");
        }
    }
    let left = cluster.store.list(cluster.keys.prefix()).await.expect("the store answers").entries;
    assert!(left.is_empty(), "something registered: {left:?}");
}

/// Starts `server`, which must end by itself with a failure and without a panic; returns what it said.
async fn ends_badly(name: &str, server: &str, arguments: &[String], logs: &Path) -> String {
    let mut process = Process::spawn(name, &binary(server), arguments, logs);
    let status = process.ended().await;
    let log = process.log();
    assert!(status.code().is_some_and(|code| code != 0), "{name} ended with {status}:\n{log}");
    assert!(!log.contains("panicked"), "{name} panicked:\n{log}");
    log
}
