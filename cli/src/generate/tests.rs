//! What a command line asks for, and what leaves on stdout.

use clap::Parser;
use conclave_proto::status::Failure;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn parse(line: &[&str]) -> Result<Args, clap::Error> {
    Command::try_parse_from([&["generate"], line].concat()).map(|command| command.args)
}

#[test]
fn flags_reach_the_request() {
    let line =
        ["--chat", "--temperature", "-1", "--seed", "7", "--stop", "a", "--stop", "b", "--logprobs=3", "--n=2", "hi"];
    let request = request(&parse(&line).unwrap()).unwrap();
    assert!(matches!(request.input, Some(Input::Chat(ref chat)) if chat.messages[0].content == "hi"));
    let sampling = request.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.seed, sampling.top_p), (Some(-1.0), Some(7), None));
    assert_eq!((request.stop.unwrap().strings, request.n), (vec!["a".to_owned(), "b".to_owned()], Some(2)));
    assert_eq!(request.logprobs, Some(pb::LogprobParams { sampled: true, top: 3, prompt: false }));
}

#[test]
fn token_ids_stand_instead_of_a_prompt() {
    let request = request(&parse(&["--tokens", "1,2,3", "--ignore-eos"]).unwrap()).unwrap();
    assert_eq!(request.input, Some(Input::Tokens(pb::TokenIds { ids: vec![1, 2, 3] })));
    assert!(request.stop.unwrap().ignore_eos);
    assert!(parse(&["--tokens", "1", "prompt"]).is_err());
    assert!(parse(&[]).is_err());
}

fn spoken(index: u32, text: &str) -> Event {
    let token = pb::Token { text: text.to_owned(), ..Default::default() };
    Event::Tokens(pb::Tokens { tokens: vec![token], index })
}

fn ended(index: u32) -> Event {
    Event::Finished(pb::Finished { index, trailing_text: ".".to_owned(), ..Default::default() })
}

fn printed(n: usize, events: &[Event]) -> Vec<String> {
    let mut sorted = Sorted::new(n);
    let texts = events.iter().map(|event| sorted.add(event, &text_of(event)).unwrap()).collect();
    assert!(sorted.is_over());
    texts
}

#[test]
fn one_answer_leaves_as_it_comes_and_ends_its_line() {
    assert_eq!(printed(1, &[spoken(0, "a"), spoken(0, "b"), ended(0)]), ["a", "b", ".\n"]);
}

#[test]
fn mixed_answers_leave_one_after_the_other_under_their_numbers() {
    let events = [spoken(1, "x"), spoken(0, "a"), ended(1), spoken(2, "p"), ended(0), spoken(2, "q\n"), ended(2)];
    let texts = ["--- 0\n", "a", "", "", ".\n--- 1\nx.\n--- 2\np", "q\n", ".\n"];
    assert_eq!(printed(3, &events), texts);
    assert_eq!(Sorted::new(2).add(&spoken(2, "x"), "x"), None);
}

#[test]
fn one_grammar_at_a_time_reaches_the_request() {
    use pb::structured_output::Grammar;
    let grammar = |line: &[&str]| Some(request(&parse(line).unwrap()).unwrap().structured?.grammar.unwrap());
    assert_eq!(grammar(&["hi"]), None);
    assert_eq!(grammar(&["--regex", "-?[0-9]+", "hi"]), Some(Grammar::Regex("-?[0-9]+".to_owned())));
    let options = vec!["yes".to_owned(), "no".to_owned()];
    let choice = Some(Grammar::Choice(pb::Choice { options }));
    assert_eq!(grammar(&["--choice", "yes", "--choice", "no", "hi"]), choice);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "{}").unwrap();
    let path = file.path().to_str().unwrap();
    assert_eq!(grammar(&["--json-schema", path, "hi"]), Some(Grammar::JsonSchema("{}".to_owned())));
    assert!(parse(&["--regex", "a", "--choice", "b", "hi"]).is_err());
    let missing = request(&parse(&["--json-schema", "/no/such/file", "hi"]).unwrap());
    assert!(missing.unwrap_err().to_string().contains("/no/such/file"));
}

#[test]
fn logprobs_are_printed_as_short_as_they_are_exact() {
    let token = pb::Token { id: 5, text: " a".to_owned(), logprob: Some(-0.1), top: Vec::new() };
    let line = Line::of(&Event::Tokens(pb::Tokens { tokens: vec![token], index: 0 }));
    let text = serde_json::to_string(&line).unwrap();
    assert_eq!(text, r#"{"event":"tokens","index":0,"tokens":[{"id":5,"text":" a","logprob":-0.1}]}"#);
}

#[test]
fn an_error_is_an_event_too() {
    let status: Status = Failure::invalid("stop.max_tokens", "must be at least 1").into();
    let value = serde_json::to_value(Line::of_error(&status)).unwrap();
    assert_eq!(value["event"], "error");
    assert_eq!(value["code"], "INVALID_ARGUMENT");
    assert_eq!(value["field"], "stop.max_tokens");
}
