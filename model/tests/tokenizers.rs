//! The tokenizer and the chat template against what `transformers` does with the same files (`files/generate.py`).

// Helpers outside of a test function are not seen as tests.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use conclave_model::tokenizer::{ChatTemplate, Message, TemplateError, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&files()).unwrap().unwrap()
}

fn cases(file: &str) -> Vec<Value> {
    serde_json::from_str(&std::fs::read_to_string(files().join(file)).unwrap()).unwrap()
}

fn ids(case: &Value) -> Vec<u32> {
    case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// A template alone in a folder.
fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    ChatTemplate::load(dir.path()).map(Option::unwrap)
}

fn user(content: &str) -> Message {
    Message { role: "user".to_owned(), content: content.to_owned() }
}

#[test]
fn a_folder_without_tokenizer_has_none() {
    let dir = TempDir::new().unwrap();
    assert!(Tokenizer::load(dir.path()).unwrap().is_none());
    assert!(ChatTemplate::load(dir.path()).unwrap().is_none());
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("tokenizer.json"));
}

#[test]
fn texts_are_encoded_and_decoded_as_the_reference_does() {
    let tokenizer = tokenizer();
    for case in cases("encodings.json") {
        let text = case["text"].as_str().unwrap();
        let encoded = tokenizer.encode(text, true).unwrap();
        assert_eq!(encoded, ids(&case), "{text}");
        assert_eq!(tokenizer.decode(&encoded, true).unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text);
    }
}

#[test]
fn a_token_that_only_the_config_calls_special_is_skipped() {
    let dir = TempDir::new().unwrap();
    let json = std::fs::read_to_string(files().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), json).unwrap();
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"eos_token": "<｜User｜>", "pad_token": "<unknown>"}"#,
    )
    .unwrap();
    let special = Tokenizer::load(dir.path()).unwrap().unwrap();
    let encoded = special.encode("a<｜User｜>b", false).unwrap();
    assert_eq!(special.decode(&encoded, true).unwrap(), "ab");
    assert_eq!(tokenizer().decode(&encoded, true).unwrap(), "a<｜User｜>b");
    assert_eq!(special.token_id("<unknown>"), None);
    assert_eq!(special.vocab_size(), tokenizer().vocab_size());
}

#[test]
fn no_piece_of_a_streamed_answer_holds_half_a_character() {
    let tokenizer = tokenizer();
    for case in cases("encodings.json") {
        let ids = ids(&case);
        let mut decoder = tokenizer.incremental(&[], true);
        let pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
        let whole = pieces.concat() + &decoder.finish().unwrap();
        assert_eq!(whole, case["decoded"].as_str().unwrap());
        if !whole.contains('\u{fffd}') {
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        }
    }
}

#[test]
fn an_answer_that_begins_inside_a_character_of_the_prompt() {
    let tokenizer = tokenizer();
    let emoji = tokenizer.encode("x🙂y", false).unwrap();
    for cut in 0..emoji.len() {
        let (prompt, answer) = emoji.split_at(cut);
        let mut decoder = tokenizer.incremental(prompt, false);
        let pieces: String = answer.iter().map(|&id| decoder.push(id).unwrap()).collect();
        assert!((pieces + &decoder.finish().unwrap()).ends_with('y'));
    }
}

#[test]
fn bytes_that_never_become_a_character_are_not_held_for_ever() {
    let tokenizer = tokenizer();
    let start_of_emoji = tokenizer.encode("🙂", false).unwrap()[0];
    let mut decoder = tokenizer.incremental(&[], false);
    let pieces: Vec<String> = (0..100).map(|_| decoder.push(start_of_emoji).unwrap()).collect();
    let longest_silence = pieces.split(|piece| !piece.is_empty()).map(<[String]>::len).max().unwrap();
    assert!(longest_silence < 2, "{longest_silence} tokens without text");
}

proptest! {
    #[test]
    fn every_text_survives_encoding_and_decoding(text: String) {
        let tokenizer = tokenizer();
        let encoded = tokenizer.encode(&text, false).unwrap();
        prop_assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text.as_str());
        let mut decoder = tokenizer.incremental(&[], false);
        let streamed: String = encoded.iter().map(|&id| decoder.push(id).unwrap()).collect();
        prop_assert_eq!(streamed + &decoder.finish().unwrap(), text);
    }

    #[test]
    fn any_ids_stream_to_what_they_decode_to(ids in prop::collection::vec(0u32..330, 0..60), cut in 0usize..10) {
        let tokenizer = tokenizer();
        let (prompt, answer) = ids.split_at(cut.min(ids.len()));
        let mut decoder = tokenizer.incremental(prompt, false);
        let streamed: String = answer.iter().map(|&id| decoder.push(id).unwrap()).collect();
        let streamed = streamed + &decoder.finish().unwrap();
        if prompt.is_empty() {
            prop_assert_eq!(streamed, tokenizer.decode(answer, false).unwrap());
        }
    }
}

#[test]
fn conversations_are_rendered_as_the_reference_renders_them() {
    let template = ChatTemplate::load(&files()).unwrap().unwrap();
    for case in cases("renderings.json") {
        let part = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
        let messages = case["messages"].as_array().unwrap().iter();
        let messages: Vec<Message> = messages
            .map(|message| Message { role: part(message, "role"), content: part(message, "content") })
            .collect();
        match (template.render(&messages, case["add_generation_prompt"].as_bool().unwrap()), case["text"].as_str()) {
            (Ok(text), expected) => assert_eq!(Some(text.as_str()), expected),
            (Err(error), None) => assert!(matches!(error, TemplateError::Failed(_)), "{error}"),
            (Err(error), Some(text)) => panic!("{error} instead of {text}"),
        }
    }
}

#[test]
fn without_a_jinja_file_the_configs_default_template_is_taken() {
    let dir = TempDir::new().unwrap();
    std::fs::copy(files().join("tokenizer_config.json"), dir.path().join("tokenizer_config.json")).unwrap();
    let template = ChatTemplate::load(dir.path()).unwrap().unwrap();
    assert_eq!(template.render(&[user("hi")], true).unwrap(), "<｜begin▁of▁sentence｜>user: hi\n");
}

#[test]
fn a_template_that_is_none_is_refused() {
    for source in ["{% if %}", "{{ x", "{% endfor %}"] {
        let message = template(source).unwrap_err().to_string();
        assert!(message.contains("chat_template.jinja"), "{message}");
    }
}

#[test]
fn a_refusal_says_what_the_template_says() {
    let error = template("{{ raise_exception('no\\nsystem') }}").unwrap().render(&[], false).unwrap_err();
    assert_eq!(error.to_string(), "chat template failed: no system (line 1)");
}

#[test]
fn a_template_can_reach_nothing_but_its_variables() {
    for source in [
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends 'chat_template' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ open('/etc/passwd') }}",
    ] {
        let rendered = template(source).and_then(|template| template.render(&[user("hi")], false));
        assert!(rendered.is_err(), "{source} gave {rendered:?}");
    }
}

#[test]
fn a_template_without_end_is_stopped() {
    for source in [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'x' * 100000000000 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [[[[[[[[ns.x]]]]]]]] %}{% endfor %}{{ 1 / 0 }}",
        "{{ debug() }}",
        "{{ messages | pprint }}",
    ] {
        let error = template(source).unwrap().render(&[user(&"long ".repeat(1000))], false).unwrap_err();
        assert!(!error.to_string().is_empty(), "{source}");
    }
}

#[test]
fn a_long_conversation_is_within_the_bounds() {
    let template = ChatTemplate::load(&files()).unwrap().unwrap();
    let messages: Vec<Message> = (0..2000)
        .map(|turn| Message { role: ["user", "assistant"][turn % 2].to_owned(), content: "word ".repeat(100) })
        .collect();
    assert!(template.render(&messages, true).unwrap().len() > 1_000_000);
}

/// A tokenizer with Llama's spelling: a low line for a space, and single bytes for what is no piece.
fn byte_fallback(decoder: &Value) -> Tokenizer {
    let mut vocab = serde_json::Map::new();
    for piece in ["<unk>", "<s>", "</s>"].into_iter().map(str::to_owned).chain((0..256).map(|b| format!("<0x{b:02X}>")))
    {
        vocab.insert(piece, json!(vocab.len()));
    }
    for piece in ["▁", "a", "▁a", "▁▁", "é", "世"] {
        vocab.insert(piece.to_owned(), json!(vocab.len()));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let dir = TempDir::new().unwrap();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": ["▁ a", "▁ ▁"],
        },
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Tokenizer::load(dir.path()).unwrap().unwrap()
}

fn llama_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]})
}

#[test]
fn tokens_of_a_byte_fallback_vocabulary_have_their_bytes() {
    for decoder in [llama_decoder(), json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})] {
        let falls_back = decoder["type"] == "Sequence";
        let tokenizer = byte_fallback(&decoder);
        let bytes = tokenizer.token_bytes().unwrap();
        let of = |token: &str| bytes[tokenizer.token_id(token).unwrap() as usize].clone();
        assert_eq!(of("</s>"), None);
        assert_eq!(of("▁a"), Some(b" a".to_vec()));
        assert_eq!(of("▁▁"), Some(b"  ".to_vec()));
        assert_eq!(of("世"), Some("世".as_bytes().to_vec()));
        // A decoder that knows nothing of bytes writes them out.
        assert_eq!(of("<0xE2>"), Some(if falls_back { vec![0xe2] } else { b"<0xE2>".to_vec() }));
    }
    let tokenizer = byte_fallback(&llama_decoder());
    let bytes = tokenizer.token_bytes().unwrap();
    for text in ["a a  é 世界", "🙂 a\nбa"] {
        let ids = tokenizer.encode(text, false).unwrap();
        let whole: Vec<u8> = ids.iter().flat_map(|&id| bytes[id as usize].clone().unwrap()).collect();
        assert_eq!(String::from_utf8(whole).unwrap(), text);
    }
}

#[test]
fn a_decoder_that_looks_at_a_token_s_neighbours_gives_it_no_bytes() {
    let repeats = json!({"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": false});
    for decoder in [repeats, Value::Null] {
        assert!(byte_fallback(&decoder).token_bytes().unwrap_err().to_string().contains("no bytes of its own"));
    }
}
