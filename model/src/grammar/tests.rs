//! Grammars over the small tokenizer of the tests' files, and over those made here.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::tokenizer::Tokenizer;

/// Logits of a model: more than its tokenizer has tokens.
const SIZE: usize = 400;
const END: u32 = 1;

fn tokenizer() -> Tokenizer {
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    Tokenizer::load(&files).unwrap().unwrap()
}

fn vocabulary() -> Vocabulary {
    Vocabulary::new(&tokenizer(), SIZE).unwrap()
}

fn schema(value: &Value) -> GrammarSpec {
    GrammarSpec::JsonSchema(value.to_string())
}

fn regex(pattern: &str) -> GrammarSpec {
    GrammarSpec::Regex(pattern.to_owned())
}

fn choice(options: &[&str]) -> GrammarSpec {
    GrammarSpec::Choice(options.iter().map(|&option| option.to_owned()).collect())
}

fn compile(spec: &GrammarSpec) -> Result<Grammar, Error> {
    Grammar::compile(&vocabulary(), spec)
}

fn why_not(spec: &GrammarSpec) -> String {
    compile(spec).unwrap_err().to_string()
}

/// Whether the grammar takes `text` whole, token by token.
fn fits(grammar: &Grammar, text: &str) -> bool {
    let mut constraint = grammar.constraint().unwrap();
    for token in tokenizer().encode(text, false).unwrap() {
        let allowed = constraint.allowed(&[END]).unwrap();
        let taken = constraint.take(token);
        assert_eq!(taken.is_ok(), allowed.allows(token), "{text}: the mask says what is taken");
        if taken.is_err() {
            return false;
        }
    }
    let may_end = constraint.may_end().unwrap();
    assert_eq!(constraint.allowed(&[END]).unwrap().allows(END), may_end);
    may_end
}

/// Draws blindly until the end: an answer of a model that knows nothing. `None` when it is not done after 400 tokens.
fn drawn(grammar: &Grammar, mut seed: u64) -> Option<String> {
    let mut constraint = grammar.constraint().unwrap();
    let mut answer = Vec::new();
    while answer.len() < 400 {
        let allowed: Vec<u32> = constraint.allowed(&[END]).unwrap().iter().collect();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let token = allowed[(seed >> 33) as usize % allowed.len()];
        if token == END {
            return Some(tokenizer().decode(&answer, false).unwrap());
        }
        constraint.take(token).unwrap();
        answer.push(token);
    }
    None
}

#[test]
fn a_schema_takes_what_fits_it_and_nothing_else() {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "next": {"$ref": "#"},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
    });
    let grammar = compile(&schema(&person)).unwrap();
    assert!(fits(&grammar, r#"{"name":"Ada","age":36}"#));
    assert!(fits(&grammar, "{\n  \"name\": \"Zoë 🙂\",\n  \"age\": 7,\n  \"next\": {\"name\": \"\", \"age\": 150}\n}"));
    for wrong in
        [r#"{"name":"Ada"}"#, r#"{"name":"Ada","age":151}"#, r#"{"name":1,"age":1}"#, r#"{"name":"Ada","age":36"#]
    {
        assert!(!fits(&grammar, wrong), "{wrong}");
    }
    assert!(!fits(&grammar, &format!("{{{}\"name\":\"a\",\"age\":1}}", " ".repeat(65))), "blanks have an end");
}

#[test]
fn a_regular_expression_is_the_whole_answer_s() {
    for pattern in ["ab+|c", "^ab+|c$", "(?:^ab+$)|^c$"] {
        let grammar = compile(&regex(pattern)).unwrap();
        assert!(fits(&grammar, "abb") && fits(&grammar, "c"), "{pattern}");
        assert!(!fits(&grammar, "xabb") && !fits(&grammar, "abbx") && !fits(&grammar, "a"), "{pattern}");
    }
    let slashes = compile(&regex(r"/a/\/#b//\d\n")).unwrap();
    assert!(fits(&slashes, "/a//#b//1\n") && !fits(&slashes, "/a//#b//1"));
    let nothing = compile(&regex("")).unwrap();
    assert!(fits(&nothing, "") && nothing.constraint().unwrap().is_complete());
    let maybe = compile(&regex("a*")).unwrap();
    assert!(fits(&maybe, "") && fits(&maybe, "aaa") && !maybe.constraint().unwrap().is_complete());
}

#[test]
fn choices_mean_what_they_say() {
    let options = ["yes", "yes/no", ".*", "a|b", "\\d\n\"'[", "<\\b>{2}", " two  words\t", "é🙂\u{85}"];
    let grammar = compile(&choice(&options)).unwrap();
    for option in options {
        assert!(fits(&grammar, option), "{option}");
    }
    for other in ["ye", "yes/", "x", "a", "7\n\"'[", " two words\t", ""] {
        assert!(!fits(&grammar, other), "{other}");
    }
}

#[test]
fn special_added_and_missing_tokens_are_never_allowed() {
    let tokenizer = tokenizer();
    let bytes = tokenizer.token_bytes().unwrap();
    let mut constraint = compile(&regex(r"(.|\n)*")).unwrap().constraint().unwrap();
    let allowed = constraint.allowed(&[]).unwrap();
    for token in 0..SIZE as u32 {
        let is_text = bytes.get(token as usize).is_some_and(Option::is_some);
        assert!(is_text || !allowed.allows(token), "{token}");
    }
    assert_eq!(tokenizer.token_id("<｜User｜>"), Some(319), "an added token, not a special one");
    assert!(allowed.len() > 100 && !allowed.allows(319));
    assert_eq!(constraint.take(319), Err(Error::Unfit { at: 0 }));
    assert_eq!(constraint.take(SIZE as u32), Err(Error::Unfit { at: 0 }));
}

#[test]
fn a_complete_answer_allows_its_end_alone_or_nothing() {
    let grammar = compile(&choice(&["ab", "abc"])).unwrap();
    let mut constraint = grammar.constraint().unwrap();
    constraint.resume(&tokenizer().encode("ab", false).unwrap()).unwrap();
    assert!(constraint.may_end().unwrap() && !constraint.is_complete());
    let mut sibling = constraint.fork();
    constraint.resume(&tokenizer().encode("c", false).unwrap()).unwrap();
    assert!(constraint.is_complete() && constraint.may_end().unwrap());
    assert_eq!(constraint.allowed(&[END, 2]).unwrap().iter().collect::<Vec<_>>(), [END, 2]);
    assert!(constraint.allowed(&[]).unwrap().is_empty());
    assert!(constraint.take(5).is_err());
    assert!(!sibling.is_complete() && sibling.allowed(&[]).unwrap().len() == 1, "the sibling went its own way");
}

#[test]
fn a_resumed_answer_that_does_not_fit_is_told_where() {
    let grammar = compile(&regex("[0-9]{4}")).unwrap();
    let tokens = tokenizer().encode("1x", false).unwrap();
    let mut constraint = grammar.constraint().unwrap();
    assert_eq!(constraint.resume(&tokens), Err(Error::Unfit { at: tokens.len() - 1 }));
}

#[test]
fn what_is_no_grammar_is_refused_with_a_reason() {
    for (spec, reason) in [
        (regex("a(b"), "unclosed group"),
        (regex("a\\"), "backslash"),
        (regex(r"(a)\1"), "backreferences"),
        (regex(r"a\b"), "WordUnicode"),
        (regex("(?P<stop>a)"), "stop"),
        (regex(r"[^\s\S]"), "fits no text"),
        (GrammarSpec::JsonSchema("{".to_owned()), "no JSON"),
        (schema(&json!([1])), "must be an object"),
        (schema(&json!(false)), "Unsatisfiable"),
        (schema(&json!({"type": "integer", "minimum": 5, "maximum": 4})), "Unsatisfiable"),
        (schema(&json!({"not": {"type": "string"}})), "not"),
        (schema(&json!({"$ref": "#"})), "fits no text"),
        (schema(&json!({"$ref": "#/$defs/none"})), "not there"),
        (schema(&json!({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]})), "anyOf would do"),
        (schema(&json!({"type": "string", "pattern": "(?<stop>a)"})), "stop"),
    ] {
        let told = why_not(&spec);
        assert!(told.contains(reason) && !told.contains('\n') && told.len() < 400, "{told}");
    }
}

#[test]
fn another_document_is_never_referred_to() {
    for reference in
        ["http://example.com/a.json", "file:///etc/passwd", "b.json#/x", "//host/x", "#anchor", "", "urn:x:y"]
    {
        let told = why_not(&schema(&json!({"type": "object", "properties": {"a": {"$ref": reference}}})));
        assert!(told.contains("another document"), "{reference}: {told}");
    }
    assert!(compile(&schema(&json!({"$schema": "http://example.com/meta", "type": "null"}))).is_err());
    assert!(compile(&schema(&json!({"items": {"$id": "http://example.com/x"}}))).is_err());
    assert!(compile(&schema(&json!({"$dynamicRef": "#"}))).is_err());
    assert!(compile(&schema(&json!({"const": {"$ref": "http://example.com/a"}}))).is_ok(), "a value refers to nothing");
}

#[test]
fn bombs_are_refused_or_stay_small() {
    let chain = |link: fn(String) -> Value, count: usize| {
        let mut defs: serde_json::Map<String, Value> =
            (0..count).map(|at| (at.to_string(), link(format!("#/$defs/{}", at + 1)))).collect();
        defs.insert(count.to_string(), json!({"type": "null"}));
        schema(&json!({"$ref": "#/$defs/0", "$defs": defs}))
    };
    assert!(fits(&compile(&chain(|next| json!({"$ref": next}), 1_800)).unwrap(), "null"), "deep, but small");
    let large = |spec: &GrammarSpec| {
        let error = compile(spec).unwrap_err();
        assert!(matches!(error, Error::TooLarge(_)), "{error}");
    };
    let values = |n: usize| json!({"enum": (0..n).collect::<Vec<_>>()});
    large(&schema(&json!({"allOf": vec![values(4); 20]})));
    large(&chain(|next| json!({"allOf": [{"$ref": next}, {"anyOf": [{"$ref": next}, {"type": "null"}]}]}), 60));
    large(&GrammarSpec::JsonSchema(format!("{}true{}", r#"{"items":"#.repeat(70), "}".repeat(70))));
    large(&GrammarSpec::JsonSchema(" ".repeat(SCHEMA_BYTES_MAX + 1)));
    large(&regex(&"a".repeat(REGEX_BYTES_MAX + 1)));
    large(&regex(&"(a)?(b)?(c)?(d)?".repeat(1_000)));
    assert!(compile(&regex(&format!("{}a{}", "(".repeat(8_000), ")".repeat(8_000)))).is_err());
    // Some compile, and fail where they are used; never without an end.
    for pattern in ["((((a{0,100}){0,100}){0,100}){0,100}){0,100}", "(a|b)*a(a|b){60}", ".*a.{200}b.{200}"] {
        let Ok(grammar) = compile(&regex(pattern)) else { continue };
        let mut constraint = grammar.constraint().unwrap();
        let token = tokenizer().encode("a", false).unwrap()[0];
        for _ in 0..50 {
            match constraint.allowed(&[END]).and_then(|_| constraint.take(token)) {
                Ok(()) => {}
                Err(Error::TooLarge(_)) => break,
                Err(error) => panic!("{pattern}: {error}"),
            }
        }
    }
}

#[test]
fn counts_and_lengths_of_choices_are_bounded() {
    assert!(matches!(choice(&[]).check(), Err(Error::Invalid(_))));
    assert!(matches!(choice(&["a"; 257]).check(), Err(Error::Invalid(_))));
    assert!(matches!(choice(&["a", ""]).check(), Err(Error::Choice { at: 1, .. })));
    assert!(matches!(choice(&["a", "b", &"c".repeat(1_025)]).check(), Err(Error::Choice { at: 2, .. })));
    let most: Vec<String> = (0..256).map(|at| format!("{at:04}{}", "x".repeat(1_020))).collect();
    let grammar = compile(&GrammarSpec::Choice(most.clone())).unwrap();
    assert!(fits(&grammar, &most[200]));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn blind_answers_to_a_schema_are_json_of_its_shape(seed: u64) {
        let spec = schema(&json!({
            "type": "object",
            "properties": {
                "n": {"type": "integer", "minimum": -9, "maximum": 99},
                "s": {"type": "string", "maxLength": 6},
                "l": {"type": "array", "items": {"enum": ["x", 1, null]}, "maxItems": 3},
            },
            "required": ["n", "s", "l"],
            "additionalProperties": false,
        }));
        let grammar = compile(&spec).unwrap();
        if let Some(text) = drawn(&grammar, seed) {
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
            let object = value.as_object().unwrap();
            prop_assert_eq!(object.len(), 3);
            // As a float: -0 is an integer too.
            prop_assert!((-9.0..=99.0).contains(&object["n"].as_f64().unwrap()));
            prop_assert!(object["s"].as_str().unwrap().chars().count() <= 6);
            let list = object["l"].as_array().unwrap();
            prop_assert!(list.len() <= 3 && list.iter().all(|item| [json!("x"), json!(1), json!(null)].contains(item)));
        }
    }

    #[test]
    fn any_choices_are_literal(options in prop::collection::vec("\\PC{1,8}|[\\x00-\\x7f]{1,8}", 1..4), seed: u64) {
        let grammar = compile(&GrammarSpec::Choice(options.clone())).unwrap();
        let text = drawn(&grammar, seed).unwrap();
        prop_assert!(options.contains(&text), "{:?} is none of {:?}", text, options);
        for option in &options {
            prop_assert!(fits(&grammar, option), "{:?} of {:?}", option, options);
        }
    }

    #[test]
    fn nothing_that_a_client_sends_panics(text in "\\PC{0,40}", deep in 0usize..8) {
        let open = "[({".chars().nth(deep % 3).unwrap().to_string().repeat(deep);
        for spec in [regex(&text), regex(&(open.clone() + &text)), GrammarSpec::JsonSchema(open + &text)] {
            if let Ok(grammar) = compile(&spec) {
                let _ = drawn(&grammar, 1);
            }
        }
    }
}
