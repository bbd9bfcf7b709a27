//! An answer's text, token by token.
//!
//! In: drawn token ids. Out: the text that each completes, less what a stop string may claim. Never here: half a
//! character; text that depends on where a stream was cut and resumed.

use conclave_model::tokenizer::{self, IncrementalDecoder, Tokenizer};
use conclave_proto::status::Failure;

use super::stop_strings::{HoldBack, Released};

/// The text of one answer. Without a tokenizer there is none, whatever the tokens.
#[derive(Debug)]
pub(super) struct AnswerText {
    decoder: Option<IncrementalDecoder>,
    hold_back: HoldBack,
}

impl AnswerText {
    /// The text of an answer to `prompt`, which ends before the first of `stops`. Special tokens have no text.
    pub(super) fn new(tokenizer: Option<&Tokenizer>, prompt: &[u32], stops: Vec<String>) -> Self {
        let decoder = tokenizer.map(|tokenizer| tokenizer.incremental(prompt, true));
        Self { decoder, hold_back: HoldBack::new(stops) }
    }

    /// Takes the next token. Not to be called after a stop string was found.
    ///
    /// # Errors
    /// `Internal` when the tokenizer cannot decode it.
    pub(super) fn push(&mut self, id: u32) -> Result<Released, Failure> {
        let piece = match &mut self.decoder {
            Some(decoder) => decoder.push(id).map_err(|error| undecodable(&error))?,
            None => String::new(),
        };
        Ok(self.hold_back.push(&piece))
    }

    /// Takes the tokens of an answer that were delivered earlier. Their text was delivered with them; what was held
    /// back then is held back now. The stop string that they complete, if they complete one.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub(super) fn resume(&mut self, ids: &[u32]) -> Result<Option<String>, Failure> {
        for &id in ids {
            let released = self.push(id)?;
            if released.stop.is_some() {
                return Ok(released.stop);
            }
        }
        Ok(None)
    }

    /// What is still held, when no token comes any more. Bytes that are no character become U+FFFD, and may complete a
    /// stop string even now.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub(super) fn finish(&mut self) -> Result<Released, Failure> {
        let piece = match &mut self.decoder {
            Some(decoder) => decoder.finish().map_err(|error| undecodable(&error))?,
            None => String::new(),
        };
        let mut released = self.hold_back.push(&piece);
        if released.stop.is_none() {
            released.text.push_str(&self.hold_back.take());
        }
        Ok(released)
    }
}

/// The text that each token of a prompt completes, special ones written out; as many as there are tokens.
///
/// # Errors
/// `Internal` when the tokenizer cannot decode one.
pub(super) fn of_prompt(tokenizer: Option<&Tokenizer>, prompt: &[u32]) -> Result<Vec<String>, Failure> {
    let Some(tokenizer) = tokenizer else { return Ok(vec![String::new(); prompt.len()]) };
    let mut decoder = tokenizer.incremental(&[], false);
    prompt.iter().map(|&id| decoder.push(id).map_err(|error| undecodable(&error))).collect()
}

fn undecodable(error: &tokenizer::Error) -> Failure {
    Failure::internal(format!("the tokenizer cannot decode a token: {error}"))
}
