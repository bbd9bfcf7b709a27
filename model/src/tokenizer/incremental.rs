//! Text of an answer while it is being drawn. In: one token id at a time. Out: the text that each completes. Never here:
//! half a UTF-8 character, text that later tokens would change, work that grows with the answer's length.
//!
//! The latest tokens are decoded together, and what was not given out before is given out now (vLLM's and TGI's
//! detokenizers do the same). Decoders write an incomplete character as one U+FFFD at the end: that alone is held back.

use super::{Error, Tokenizer};

/// Tokens of the prompt that the first ones are decoded with, so that a decoder which treats the start of a text
/// differently (no leading space) does not take the answer for one.
const PROMPT_TOKENS: usize = 6;
/// Tokens decoded together while none ends a character; a character alone has at most 4.
const MAX_WINDOW: usize = 24;
const INCOMPLETE: char = '\u{fffd}';

/// Turns token ids into text piece by piece: the pieces and [`finish`](Self::finish)'s make up the decoded whole.
#[derive(Debug)]
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The tokens that last ended a character, or the prompt's last, and those after them.
    window: Vec<u32>,
    /// How many of `window` are the former.
    context: usize,
    /// What has been given out of the window's text.
    given: String,
}

impl IncrementalDecoder {
    pub(super) fn new(tokenizer: Tokenizer, prompt: &[u32], skip_special: bool) -> Self {
        let window = prompt[prompt.len().saturating_sub(PROMPT_TOKENS)..].to_vec();
        let text = tokenizer.decode(&window, skip_special).unwrap_or_default();
        // A prompt may end inside a character, which is then the answer's.
        let given = text.strip_suffix(INCOMPLETE).unwrap_or(&text).to_owned();
        Self { tokenizer, skip_special, context: window.len(), window, given }
    }

    /// The text that `id` completes; often one word, empty while a character is incomplete.
    ///
    /// # Errors
    /// The tokenizer's decoder fails; the token then counts as not pushed.
    pub fn push(&mut self, id: u32) -> Result<String, Error> {
        self.window.push(id);
        let text = match self.decode(&self.window) {
            Ok(text) => text,
            Err(error) => {
                self.window.pop();
                return Err(error);
            }
        };
        let certain = text.strip_suffix(INCOMPLETE).unwrap_or(&text);
        let piece = beyond(&self.given, certain).to_owned();
        if certain.len() == text.len() {
            self.begin_after(&piece)?;
        } else if self.window.len() > MAX_WINDOW {
            return Ok(piece + &self.shorten(&text)?);
        } else if !piece.is_empty() {
            certain.clone_into(&mut self.given);
        }
        Ok(piece)
    }

    /// The text held back so far, as it is: the answer ends here. A character that never got complete is U+FFFD.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, Error> {
        let text = self.decode(&self.window)?;
        let piece = beyond(&self.given, &text).to_owned();
        self.given = text;
        Ok(piece)
    }

    /// A character ended: the tokens since the last end are the new context, unless they had no text.
    fn begin_after(&mut self, piece: &str) -> Result<(), Error> {
        if piece.is_empty() {
            self.window.truncate(self.context);
            return Ok(());
        }
        self.window.drain(..self.context);
        self.context = self.window.len();
        self.given = self.decode(&self.window)?;
        Ok(())
    }

    /// The window is full of bytes that end no character. Keeps only its last tokens where it can be cut between two
    /// characters, else gives up on the held one: returns what that adds to the text given out.
    fn shorten(&mut self, text: &str) -> Result<String, Error> {
        let certain = text.len() - INCOMPLETE.len_utf8();
        for at in (self.window.len() - 4..self.window.len()).rev() {
            let (front, back) = (self.decode(&self.window[..at])?, self.decode(&self.window[at..])?);
            if front.len() <= certain && text.strip_prefix(front.as_str()) == Some(&back) {
                self.window.drain(..at);
                self.context = 0;
                text[front.len()..certain].clone_into(&mut self.given);
                return Ok(String::new());
            }
        }
        self.window.clear();
        self.context = 0;
        self.given.clear();
        Ok(INCOMPLETE.to_string())
    }

    fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        self.tokenizer.decode(ids, self.skip_special)
    }
}

/// What `text` has after what it shares with `given` from the start.
fn beyond<'a>(given: &str, text: &'a str) -> &'a str {
    if let Some(rest) = text.strip_prefix(given) {
        return rest;
    }
    let shared = given.chars().zip(text.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    &text[shared..]
}
