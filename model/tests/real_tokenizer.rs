//! DeepSeek's own tokenizers, 128 thousand tokens each, against what `transformers` does with the same files, which
//! `files/generate.py` wrote to `files/deepseek.json`. `make setup` brings the tokenizers; without them the tests fail.

// Helpers outside of a test function are not seen as tests.
#![allow(clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    sync::LazyLock,
};

use conclave_model::grammar::{Grammar, GrammarSpec, Vocabulary};
use conclave_model::tokenizer::{ChatTemplate, Message, TemplateError, Tokenizer};
use proptest::prelude::*;
use serde_json::Value;

const NAMES: [&str; 2] = ["deepseek_v3", "deepseek_v4"];
static TOKENIZERS: LazyLock<[Tokenizer; 2]> =
    LazyLock::new(|| NAMES.map(|name| Tokenizer::load(&folder(name)).unwrap().unwrap()));
static BYTES: LazyLock<[Vec<Option<Vec<u8>>>; 2]> =
    LazyLock::new(|| [0, 1].map(|which| TOKENIZERS[which].token_bytes().unwrap()));

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/tokenizers").join(name);
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        assert!(folder.join(file).is_file(), "{} is missing: run `make setup`", folder.join(file).display());
    }
    folder
}

/// What the reference makes of each, by name.
fn expected(name: &str) -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files/deepseek.json");
    let mut all: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    all[name].take()
}

/// Each text with its ids, and the text that is left of them without special tokens.
fn encodings(name: &str) -> Vec<(String, Vec<u32>, String)> {
    let expected = expected(name);
    let cases = expected["encodings"].as_array().unwrap();
    assert!(cases.len() > 20, "{name}: texts in many scripts");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let ids = |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    cases.iter().map(|case| (text(&case["text"]), ids(&case["ids"]), text(&case["decoded"]))).collect()
}

#[test]
fn texts_in_many_scripts_are_encoded_and_decoded_as_the_reference_does() {
    for (name, tokenizer) in NAMES.iter().zip(&*TOKENIZERS) {
        assert_eq!(Some(tokenizer.vocab_size() as u64), expected(name)["vocab_size"].as_u64(), "{name}");
        for (text, ids, decoded) in encodings(name) {
            let encoded = tokenizer.encode(&text, true).unwrap();
            assert_eq!(encoded, ids, "{name}: {text}");
            assert_eq!(tokenizer.decode(&encoded, true).unwrap(), decoded, "{name}");
            assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text, "{name}");
        }
    }
}

#[test]
fn the_bytes_of_tokens_make_up_the_text_that_they_decode_to() {
    for (name, tokenizer) in NAMES.iter().zip(&*TOKENIZERS) {
        let bytes = tokenizer.token_bytes().unwrap();
        let of = |ids: &[u32]| -> Vec<u8> {
            ids.iter().flat_map(|&id| bytes[id as usize].clone().unwrap_or_default()).collect()
        };
        for (text, _, _) in encodings(name) {
            let ids = tokenizer.encode(&text, false).unwrap();
            if ids.iter().all(|&id| bytes[id as usize].is_some()) {
                assert_eq!(of(&ids), text.as_bytes(), "{name}: {text}");
            }
        }
        for id in 0..bytes.len() as u32 {
            if bytes[id as usize].is_some() {
                let alone = String::from_utf8_lossy(&of(&[id])).into_owned();
                assert_eq!(alone, tokenizer.decode(&[id], false).unwrap(), "{name}: token {id}");
            }
        }
        // Named or not, what was added is no text: its id is never in a grammar's tree.
        assert!(bytes.iter().filter(|bytes| bytes.is_none()).count() > 800, "{name}");
    }
}

#[test]
fn json_by_these_vocabularies_follows_a_schema() {
    for (name, tokenizer) in NAMES.iter().zip(&*TOKENIZERS) {
        let vocabulary = Vocabulary::new(tokenizer, 129_280).unwrap();
        let schema = r#"{"type": "object", "properties": {"名": {"type": "string"}, "n": {"type": "integer"}},
            "required": ["名", "n"], "additionalProperties": false}"#;
        let grammar = Grammar::compile(&vocabulary, &GrammarSpec::JsonSchema(schema.to_owned())).unwrap();
        for (text, fits) in
            [(r#"{"名": "Привет, 世界 🙂", "n": -12}"#, true), (r#"{"n": 1}"#, false), (r#"{"名": 3, "n": 1}"#, false)]
        {
            let mut constraint = grammar.constraint().unwrap();
            let ids = tokenizer.encode(text, false).unwrap();
            let taken = ids.iter().all(|&id| {
                let allowed = constraint.allowed(&[1]).unwrap().allows(id);
                allowed && constraint.take(id).is_ok()
            });
            assert_eq!(taken && constraint.is_complete(), fits, "{name}: {text}");
        }
        let allowed = grammar.constraint().unwrap().allowed(&[1]).unwrap();
        assert!(allowed.iter().all(|id| id < 128_000), "{name}: neither special, added nor missing tokens");
    }
}

#[test]
fn streamed_texts_come_in_whole_characters() {
    for (name, tokenizer) in NAMES.iter().zip(&*TOKENIZERS) {
        for (_, ids, decoded) in encodings(name) {
            let mut decoder = tokenizer.incremental(&[], true);
            let mut given = String::new();
            for id in ids {
                let piece = decoder.push(id).unwrap();
                assert!(!piece.contains('\u{fffd}') || decoded.contains('\u{fffd}'), "{name}: {piece:?} in {decoded}");
                given += &piece;
                assert!(decoded.starts_with(&given), "{name}: {given:?} was given of {decoded:?}");
            }
            assert_eq!(given + &decoder.finish().unwrap(), decoded, "{name}");
        }
    }
}

#[test]
fn conversations_are_rendered_and_encoded_as_the_reference_renders_them() {
    let template = ChatTemplate::load(&folder("deepseek_v3")).unwrap().unwrap();
    let tokenizer = &TOKENIZERS[0];
    let expected = expected("deepseek_v3");
    let cases = expected["renderings"].as_array().unwrap();
    assert!(cases.len() > 10);
    for case in cases {
        let part = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
        let messages = case["messages"].as_array().unwrap().iter();
        let messages: Vec<Message> = messages
            .map(|message| Message { role: part(message, "role"), content: part(message, "content") })
            .collect();
        match (template.render(&messages, case["add_generation_prompt"].as_bool().unwrap()), case["text"].as_str()) {
            (Ok(text), expected) => {
                assert_eq!(Some(text.as_str()), expected);
                let ids = tokenizer.encode(&text, false).unwrap();
                assert_eq!(ids.iter().filter(|&&id| id == 0).count(), 1, "one token that begins the text");
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            }
            (Err(error), None) => assert!(matches!(error, TemplateError::Failed(_)), "{error}"),
            (Err(error), Some(text)) => panic!("{error} instead of {text}"),
        }
    }
    assert!(ChatTemplate::load(&folder("deepseek_v4")).unwrap().is_none(), "its folder has no template");
}

proptest! {
    // A missing tokenizer is no case to write down.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_text_survives_encoding_and_streaming(text: String, which in 0..NAMES.len()) {
        let tokenizer = &TOKENIZERS[which];
        let encoded = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text.as_str());
        let mut decoder = tokenizer.incremental(&[], false);
        let streamed: String = encoded.iter().map(|&id| decoder.push(id).unwrap()).collect();
        prop_assert_eq!(streamed + &decoder.finish().unwrap(), text);
    }

    #[test]
    fn every_text_is_the_bytes_of_its_tokens(text: String, which in 0..NAMES.len()) {
        let tokenizer = &TOKENIZERS[which];
        let encoded = tokenizer.encode(&text, false).unwrap();
        let bytes: Option<Vec<Vec<u8>>> = encoded.iter().map(|&id| BYTES[which][id as usize].clone()).collect();
        prop_assert_eq!(bytes.unwrap().concat(), text.as_bytes());
    }

    #[test]
    fn any_ids_stream_to_what_they_decode_to(
        ids in prop::collection::vec(0u32..130_000, 0..60),
        which in 0..NAMES.len(),
    ) {
        let tokenizer = &TOKENIZERS[which];
        let mut decoder = tokenizer.incremental(&[], true);
        let streamed: String = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        prop_assert_eq!(streamed + &decoder.finish().unwrap(), tokenizer.decode(&ids, true).unwrap());
    }
}
