//! Text and chats to the token ids that a model sees, and back.
//!
//! In: text, messages, ids, all of bounded size. Out: ids, text. Never here: tokens that nobody asked for, text
//! that is cut to fit.

use conclave_model::tokenizer::{Message, TemplateError, Tokenizer};
use conclave_proto::{
    inference::v1::{self as pb, tokenize_request::Input},
    status::Failure,
};

use super::{
    ServedModel,
    validate::{self, Bounds},
};

/// Text that is longer than this for each token of the context cannot fit in practice (English has about 4 bytes a
/// token, source code's longest runs of blanks some 80): it is refused before any time is spent on tokenising it. The floor
/// lets a small model still say how many tokens too many there were.
const BYTES_PER_TOKEN_MAX: usize = 64;
const TEXT_BYTES_MIN: usize = 64 << 10;
const TEXT_BYTES_MAX: usize = 4 << 20;
const MESSAGES_MAX: usize = 1_024;
const ROLE_BYTES_MAX: usize = 64;

/// The ids of a prompt's text, with what the tokenizer adds around a text (as `transformers` does it).
///
/// # Errors
/// `InvalidArgument` naming `field`; `FailedPrecondition` without a tokenizer.
pub(super) fn prompt(model: &ServedModel, bounds: &Bounds, field: &str, text: &str) -> Result<Vec<u32>, Failure> {
    let tokenizer = tokenizer_of(model)?;
    encode(tokenizer, bounds, field, text, true)
}

/// The ids of a chat. The template writes its own special tokens, so none are added.
///
/// # Errors
/// `InvalidArgument` naming the part of `chat` at fault, or `chat` where the template refuses the conversation;
/// `FailedPrecondition` without a tokenizer or a template.
pub(super) fn chat(model: &ServedModel, bounds: &Bounds, chat: pb::Chat) -> Result<Vec<u32>, Failure> {
    let tokenizer = tokenizer_of(model)?;
    let Some(template) = &model.chat_template else {
        let message = "this model has no chat template: send a prompt or token ids";
        return Err(Failure::precondition("NO_CHAT_TEMPLATE", message));
    };
    check_messages(&chat.messages, bounds)?;
    let messages: Vec<_> =
        chat.messages.into_iter().map(|message| Message { role: message.role, content: message.content }).collect();
    let rendered = template.render(&messages, chat.add_generation_prompt.unwrap_or(true));
    let text = rendered.map_err(|error| match error {
        TemplateError::Failed(_) | TemplateError::TooManySteps | TemplateError::TooLong => {
            Failure::invalid("chat", error.to_string())
        }
        // Those happen where a template is loaded, not here; their messages name files.
        _ => Failure::internal("the chat template cannot be used"),
    })?;
    encode(tokenizer, bounds, "chat", &text, false)
}

/// The `Tokenize` call.
pub(super) fn tokenize(
    model: &ServedModel,
    bounds: &Bounds,
    request: pb::TokenizeRequest,
) -> Result<pb::TokenizeResponse, Failure> {
    let ids = match request.input {
        Some(Input::Text(text)) => prompt(model, bounds, "text", &text)?,
        Some(Input::Chat(messages)) => chat(model, bounds, messages)?,
        None => return Err(Failure::invalid("input", "one of text and chat must be set")),
    };
    Ok(pb::TokenizeResponse { ids })
}

/// The `Detokenize` call: no more ids than a context holds.
pub(super) fn detokenize(
    model: &ServedModel,
    bounds: &Bounds,
    request: pb::DetokenizeRequest,
) -> Result<pb::DetokenizeResponse, Failure> {
    let tokenizer = tokenizer_of(model)?;
    if request.ids.len() > bounds.context_tokens {
        let message = format!("has {} tokens, more than the context of {}", request.ids.len(), bounds.context_tokens);
        return Err(Failure::invalid("ids", message));
    }
    validate::check_ids("ids", &request.ids, bounds.vocab_size)?;
    let text = tokenizer
        .decode(&request.ids, request.skip_special_tokens)
        .map_err(|error| Failure::invalid("ids", error.to_string()))?;
    Ok(pb::DetokenizeResponse { text })
}

fn tokenizer_of(model: &ServedModel) -> Result<&Tokenizer, Failure> {
    model.tokenizer.as_ref().ok_or_else(|| {
        Failure::precondition("NO_TOKENIZER", "this model has no tokenizer: send token ids, and read ids")
    })
}

fn encode(
    tokenizer: &Tokenizer,
    bounds: &Bounds,
    field: &str,
    text: &str,
    add_special: bool,
) -> Result<Vec<u32>, Failure> {
    check_length(bounds, field, text.len())?;
    let ids = tokenizer.encode(text, add_special).map_err(|error| Failure::invalid(field, error.to_string()))?;
    if validate::check_ids(field, &ids, bounds.vocab_size).is_err() {
        // The folder's tokenizer knows tokens that its model does not.
        return Err(Failure::invalid(field, "holds a token that the model has no embedding for"));
    }
    Ok(ids)
}

fn check_messages(messages: &[pb::ChatMessage], bounds: &Bounds) -> Result<(), Failure> {
    if !(1..=MESSAGES_MAX).contains(&messages.len()) {
        let message = format!("must have 1 to {MESSAGES_MAX} messages, has {}", messages.len());
        return Err(Failure::invalid("chat.messages", message));
    }
    let mut bytes = 0;
    for (at, message) in messages.iter().enumerate() {
        let role = message.role.as_bytes();
        if !(1..=ROLE_BYTES_MAX).contains(&role.len()) || !role.iter().all(u8::is_ascii_graphic) {
            let field = format!("chat.messages[{at}].role");
            return Err(Failure::invalid(field, format!("must be 1 to {ROLE_BYTES_MAX} visible ASCII characters")));
        }
        bytes += message.content.len();
        check_length(bounds, &format!("chat.messages[{at}].content"), bytes)?;
    }
    Ok(())
}

/// `bytes` of text are few enough to be tokenised.
fn check_length(bounds: &Bounds, field: &str, bytes: usize) -> Result<(), Failure> {
    let context = bounds.context_tokens;
    let limit = context.saturating_mul(BYTES_PER_TOKEN_MAX).clamp(TEXT_BYTES_MIN, TEXT_BYTES_MAX);
    if bytes > limit {
        let message =
            format!("is {bytes} bytes of text up to here; a context of {context} tokens takes at most {limit}");
        return Err(Failure::invalid(field, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
