//! Text and chats over a tokenizer of bytes.

use conclave_proto::status::ErrorKind;

use super::*;
use crate::api::test_model::{BOS, CONTEXT, LIMITS, served};

fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

fn said(role: &str, content: &str) -> pb::ChatMessage {
    pb::ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

fn chat_of(messages: Vec<pb::ChatMessage>) -> pb::Chat {
    pb::Chat { messages, add_generation_prompt: None }
}

fn encoded(messages: Vec<pb::ChatMessage>) -> Result<Vec<u32>, Failure> {
    let model = served();
    chat(&model, &Bounds::new(&model, LIMITS), chat_of(messages))
}

#[track_caller]
fn assert_invalid(failure: &Failure, field: &str) {
    assert_eq!((failure.kind, failure.field.as_deref()), (ErrorKind::InvalidArgument, Some(field)), "{failure:?}");
}

#[test]
fn a_prompt_gets_its_special_tokens_and_a_chat_writes_its_own() {
    let model = served();
    let bounds = Bounds::new(&model, LIMITS);
    assert_eq!(prompt(&model, &bounds, "prompt", "hé").unwrap(), [vec![BOS], bytes("hé")].concat());
    let ids = encoded(vec![said("user", "hi")]).unwrap();
    assert_eq!(ids, [vec![BOS], bytes("u:hi\na:")].concat());
    let open = pb::Chat { add_generation_prompt: Some(false), ..chat_of(vec![said("user", "hi")]) };
    assert_eq!(chat(&model, &bounds, open).unwrap(), [vec![BOS], bytes("u:hi\n")].concat());
}

#[test]
fn a_template_may_refuse_a_chat() {
    let failure = encoded(vec![said("tool", "x")]).unwrap_err();
    assert_invalid(&failure, "chat");
    assert!(failure.message.contains("no tools here"), "{failure}");
}

#[test]
fn messages_are_bounded() {
    assert_invalid(&encoded(Vec::new()).unwrap_err(), "chat.messages");
    assert_invalid(&encoded(vec![said("user", "x"); 1_025]).unwrap_err(), "chat.messages");
    assert_invalid(&encoded(vec![said("", "x")]).unwrap_err(), "chat.messages[0].role");
    assert_invalid(&encoded(vec![said("user", "x"), said("a b", "x")]).unwrap_err(), "chat.messages[1].role");
    assert_invalid(&encoded(vec![said(&"r".repeat(65), "x")]).unwrap_err(), "chat.messages[0].role");
    let half = "x".repeat(TEXT_BYTES_MIN / 2 + 1);
    assert_invalid(&encoded(vec![said("user", &half), said("user", &half)]).unwrap_err(), "chat.messages[1].content");
}

#[test]
fn text_is_bounded_before_it_is_tokenised() {
    let model = served();
    let bounds = Bounds::new(&model, LIMITS);
    // Too many tokens, but few enough bytes to count them.
    assert_eq!(prompt(&model, &bounds, "prompt", &"x".repeat(TEXT_BYTES_MIN)).unwrap().len(), TEXT_BYTES_MIN + 1);
    let failure = prompt(&model, &bounds, "prompt", &"x".repeat(TEXT_BYTES_MIN + 1)).unwrap_err();
    assert_invalid(&failure, "prompt");
    assert!(failure.message.contains("65537") && failure.message.contains(&CONTEXT.to_string()), "{failure}");
}

#[test]
fn ids_and_text_round_trip() {
    let model = served();
    let bounds = Bounds::new(&model, LIMITS);
    let text = "Grüße, 世界!";
    let request = pb::TokenizeRequest { input: Some(Input::Text(text.to_owned())) };
    let ids = tokenize(&model, &bounds, request).unwrap().ids;
    let back = |skip_special_tokens| {
        let request = pb::DetokenizeRequest { ids: ids.clone(), skip_special_tokens };
        detokenize(&model, &bounds, request).unwrap().text
    };
    assert_eq!(back(true), text);
    assert_eq!(back(false), format!("<bos>{text}"));
}

#[test]
fn detokenising_is_bounded() {
    let model = served();
    let bounds = Bounds::new(&model, LIMITS);
    let of = |ids| detokenize(&model, &bounds, pb::DetokenizeRequest { ids, skip_special_tokens: false });
    assert_invalid(&of(vec![65, 260]).unwrap_err(), "ids[1]");
    assert_invalid(&of(vec![65; CONTEXT + 1]).unwrap_err(), "ids");
    // Known to the model, not to its tokenizer: no text.
    assert_eq!(of(vec![65, 259]).unwrap().text, "A");
    assert_invalid(&tokenize(&model, &bounds, pb::TokenizeRequest::default()).unwrap_err(), "input");
}

#[test]
fn what_the_folder_lacks_is_said() {
    let mut model = served();
    model.chat_template = None;
    let bounds = Bounds::new(&model, LIMITS);
    let failure = chat(&model, &bounds, chat_of(vec![said("user", "hi")])).unwrap_err();
    assert_eq!((failure.kind, failure.reason), (ErrorKind::FailedPrecondition, "NO_CHAT_TEMPLATE"));
    model.tokenizer = None;
    for failure in [
        prompt(&model, &bounds, "prompt", "hi").unwrap_err(),
        chat(&model, &bounds, chat_of(vec![said("user", "hi")])).unwrap_err(),
        detokenize(&model, &bounds, pb::DetokenizeRequest::default()).unwrap_err(),
    ] {
        assert_eq!((failure.kind, failure.reason), (ErrorKind::FailedPrecondition, "NO_TOKENIZER"));
    }
}

#[test]
fn a_model_describes_itself() {
    let model = served();
    let told = crate::api::model_info::describe(&model, &Bounds::new(&model, LIMITS));
    assert_eq!((told.name.as_str(), told.family.as_str()), ("tiny", "deepseek_v3"));
    assert_eq!((told.context_tokens, told.vocab_size, told.layers, told.moe_layers), (64, 260, 3, 2));
    assert_eq!((told.routed_experts, told.experts_per_token), (8, 2));
    assert_eq!((told.eos_token_ids, told.has_chat_template), (vec![257], true));
    assert_eq!((told.config_digest.as_str(), told.checkpoint_digest.as_str()), ("aa", "bb"));
}
