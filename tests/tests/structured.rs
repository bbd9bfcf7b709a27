//! Structured output: a model that knows nothing, drawn from at temperature 1, answers in the form that was asked for.

use conclave_proto::inference::v1::{
    Choice, DetokenizeRequest, FinishReason, GenerateRequest, StructuredOutput, finished::MatchedStop,
    structured_output::Grammar,
};
use conclave_tests::{
    checkpoint::Copy,
    client::{Answer, Client, explain, sampled, with_logprobs},
    cluster::Cluster,
    eventually::PATIENCE,
    golden::Golden,
    tokenizer::write_tokenizer,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;
use tonic_types::StatusExt;

const ENDS: [u32; 2] = [1, 2];
const CHOICES: [&str; 5] = ["yes", "yes, the", "no", "a|b.*", "é€\n"];
const PATTERN: &str = "[A-Z]{2}-[0-9]{3,5}( (yes|no))?";

/// A cluster that serves a golden model with a tokenizer.
struct House {
    cluster: Cluster,
    prompt: Vec<u32>,
    _folder: TempDir,
}

impl House {
    async fn open() -> Self {
        let golden = Golden::named("v3_tied");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let copy = Copy::of(&golden.folder, folder.path().join("with-tokenizer"));
        write_tokenizer(&copy.folder);
        let cluster = Cluster::builder(&copy.folder).start().await;
        Self { cluster, prompt: golden.cases[0].prompt.clone(), _folder: folder }
    }

    async fn client(&self) -> Client {
        self.cluster.client(0).await
    }

    /// Up to 400 tokens with `seed`, until the model ends its answer.
    fn asking(&self, grammar: Grammar, seed: u64) -> GenerateRequest {
        let mut request = sampled(&self.prompt, 400, seed);
        request.stop.as_mut().expect("set").ignore_eos = false;
        request.structured = Some(StructuredOutput { grammar: Some(grammar) });
        request
    }
}

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["new", "known", 7, null]}, "maxItems": 3},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    })
}

fn is_person(text: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str(text) else { return false };
    let known = object.keys().all(|key| ["name", "age", "tags", "ok"].contains(&key.as_str()));
    let name = object["name"].as_str().is_some_and(|name| name.chars().count() <= 8);
    // As a float: -0 is an integer too.
    let age = object["age"].as_f64().is_some_and(|age| age.fract() == 0.0 && (0.0..=150.0).contains(&age));
    let tag = |tag: &Value| [json!("new"), json!("known"), json!(7), json!(null)].contains(tag);
    let tags = object["tags"].as_array().is_some_and(|tags| tags.len() <= 3 && tags.iter().all(tag));
    known && name && age && tags && object.get("ok").is_none_or(Value::is_boolean)
}

/// `PATTERN`, by hand.
fn is_plate(text: &str) -> bool {
    let Some((letters, rest)) = text.split_once('-') else { return false };
    let (digits, word) = rest.split_once(' ').map_or((rest, None), |(digits, word)| (digits, Some(word)));
    letters.len() == 2
        && letters.bytes().all(|letter| letter.is_ascii_uppercase())
        && (3..=5).contains(&digits.len())
        && digits.bytes().all(|digit| digit.is_ascii_digit())
        && word.is_none_or(|word| ["yes", "no"].contains(&word))
}

fn schema(value: &Value) -> Grammar {
    Grammar::JsonSchema(value.to_string())
}

fn regex(pattern: &str) -> Grammar {
    Grammar::Regex(pattern.to_owned())
}

fn choice(options: &[&str]) -> Grammar {
    Grammar::Choice(Choice { options: options.iter().map(|&option| option.to_owned()).collect() })
}

fn ended_by_a_token(answer: &Answer) -> bool {
    let matched = answer.finished.matched_stop.as_ref();
    answer.finished.reason() == FinishReason::Stop
        && matched.is_some_and(|stop| matches!(stop, MatchedStop::StopTokenId(id) if ENDS.contains(id)))
}

#[tokio::test]
async fn answers_of_a_model_that_knows_nothing_have_the_form_that_was_asked_for() {
    let house = House::open().await;
    let client = house.client().await;
    type Fits = fn(&str) -> bool;
    let kinds: [(Grammar, Fits); 3] = [
        (schema(&person()), is_person),
        (regex(PATTERN), is_plate),
        (choice(&CHOICES), |text| CHOICES.contains(&text)),
    ];
    let mut seen = Vec::new();
    for (grammar, fits) in kinds {
        for seed in 0..20 {
            let answer = client.answer(house.asking(grammar.clone(), seed)).await;
            let text = answer.text();
            assert!(fits(&text), "seed {seed}: {text:?}");
            assert!(ended_by_a_token(&answer), "seed {seed}: {:?}", answer.finished);
            let ids = DetokenizeRequest { ids: answer.ids(), skip_special_tokens: false };
            let whole = client.raw().detokenize(ids).await.expect("the tokenizer decodes its own").into_inner().text;
            assert_eq!(text, whole, "what was streamed is what the tokens say");
            seen.push(text);
        }
    }
    seen.sort();
    seen.dedup();
    assert!(seen.len() > 30, "the model had a choice: {seen:?}");
}

#[tokio::test]
async fn a_resumed_answer_goes_on_in_its_form_as_if_it_had_not_been_cut() {
    let house = House::open().await;
    let client = house.client().await;
    for (grammar, seed) in [(schema(&person()), 3), (regex(PATTERN), 4), (choice(&CHOICES), 5)] {
        let whole = client.answer(house.asking(grammar.clone(), seed)).await;
        let ids = whole.ids();
        for cut in [1, ids.len() / 2, ids.len() - 1, ids.len()] {
            let mut request = house.asking(grammar.clone(), seed);
            request.resume_tokens = ids[..cut].to_vec();
            let rest = client.answer(request).await;
            assert_eq!(rest.ids(), ids[cut..], "cut at {cut} of {}", ids.len());
            assert!(ended_by_a_token(&rest), "{:?}", rest.finished);
        }
    }
    let mut request = house.asking(regex("[a-z]{8}"), 1);
    let digit = client.answer(house.asking(regex("[0-9]"), 1)).await.ids();
    request.resume_tokens = digit;
    let status = client.ask(request, PATIENCE).await.expect_err("a digit is no letter");
    assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec!["resume_tokens[0]".to_owned()]));
}

#[tokio::test]
async fn an_answer_in_a_form_ends_where_it_must() {
    let house = House::open().await;
    let client = house.client().await;
    let asking = |grammar, ignore_eos, min_tokens, max_tokens| {
        let mut request = house.asking(grammar, 7);
        let stop = request.stop.as_mut().expect("set");
        (stop.ignore_eos, stop.min_tokens, stop.max_tokens) = (ignore_eos, min_tokens, Some(max_tokens));
        request
    };

    let complete = client.answer(asking(choice(&["no", "yes"]), true, 0, 400)).await;
    assert!(["no", "yes"].contains(&complete.text().as_str()));
    assert_eq!((complete.finished.reason(), &complete.finished.matched_stop), (FinishReason::Stop, &None));

    let nothing = client.answer(asking(regex(""), true, 0, 400)).await;
    assert_eq!((nothing.tokens.len(), nothing.finished.reason()), (0, FinishReason::Stop));

    let short = client.answer(asking(choice(&["no"]), false, 20, 400)).await;
    assert!(short.text() == "no" && ended_by_a_token(&short), "min_tokens cannot make it longer: {short:?}");

    let longer = client.answer(asking(regex("a*"), false, 20, 400)).await;
    assert!(longer.tokens.len() >= 20, "min_tokens holds where the form leaves room");

    let cut = client.answer(asking(regex("[ab]{200}"), false, 0, 10)).await;
    assert_eq!((cut.tokens.len(), cut.finished.reason()), (10, FinishReason::Length));
    assert!(cut.text().bytes().all(|letter| b"ab".contains(&letter)));

    let free = GenerateRequest { structured: None, ..asking(regex(""), false, 0, 1) };
    let held = client.answer(with_logprobs(asking(regex("[ab]{200}"), false, 0, 1), 5)).await;
    let free = client.answer(with_logprobs(free, 5)).await;
    assert_eq!(held.tokens[0].top, free.tokens[0].top, "logprobs are the model's own");
}

#[tokio::test]
async fn what_is_no_grammar_is_refused_by_name() {
    let house = House::open().await;
    let client = house.client().await;
    let bomb = json!({"allOf": vec![json!({"enum": [1, 2, 3, 4]}); 30]});
    let deep = format!("{}true{}", r#"{"items":"#.repeat(100), "}".repeat(100));
    let many = vec!["x"; 257];
    for (field, grammar) in [
        ("structured.json_schema", Grammar::JsonSchema("{".to_owned())),
        ("structured.json_schema", schema(&json!({"type": "integer", "minimum": 2, "maximum": 1}))),
        ("structured.json_schema", schema(&json!({"$ref": "http://127.0.0.1:1/schema.json"}))),
        ("structured.json_schema", schema(&json!({"$ref": "file:///etc/hostname"}))),
        ("structured.json_schema", schema(&bomb)),
        ("structured.json_schema", Grammar::JsonSchema(deep)),
        ("structured.json_schema", Grammar::JsonSchema(" ".repeat(65 << 10))),
        ("structured.regex", regex("a(")),
        ("structured.regex", regex(r"[^\s\S]")),
        ("structured.regex", regex(&"a".repeat(17 << 10))),
        ("structured.choice.options", choice(&[])),
        ("structured.choice.options", choice(&many)),
        ("structured.choice.options[1]", choice(&["a", ""])),
    ] {
        let status = client.ask(house.asking(grammar, 1), PATIENCE).await.expect_err("no grammar, no answer");
        let told = explain(&status);
        assert_eq!((status.code(), fields(&status)), (Code::InvalidArgument, vec![field.to_owned()]), "{told}");
    }
    let mut none = house.asking(regex("a"), 1);
    none.structured = Some(StructuredOutput::default());
    let status = client.ask(none, PATIENCE).await.expect_err("no grammar at all");
    assert_eq!(fields(&status), ["structured"]);

    // One that compiles and is too much work where it is used fails alone.
    let _ = client.ask(house.asking(regex("((((a{0,99}){0,99}){0,99}){0,99}){0,99}"), 1), PATIENCE).await;
    let after = client.answer(house.asking(choice(&["no"]), 1)).await;
    assert_eq!(after.text(), "no", "after all that");
}

fn fields(status: &tonic::Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    violations.into_iter().map(|violation| violation.field).collect()
}
