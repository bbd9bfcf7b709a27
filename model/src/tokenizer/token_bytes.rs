//! The bytes that a token adds to a text. In: a vocabulary's spellings and its decoder. Out: bytes, for each ordinary
//! token. Never here: special and added tokens, which are no text.
//!
//! A byte-level vocabulary (GPT-2's) spells each byte as one visible character. Any other is asked what its own decoder
//! makes of the token between two letters, where no rule for the start or the end of a text applies; with byte fallback
//! some tokens are single bytes, which alone are no text.

use std::collections::HashMap;

use tokenizers::{Decoder, DecoderWrapper};

use super::{Error, Tokenizer};

/// Stands before and behind a token that the decoder is asked about.
const LETTER: &str = "a";

impl Tokenizer {
    /// What each token adds to a text, by id, as many as there are ids; `None` for special and added tokens and for ids
    /// that have no token.
    ///
    /// # Errors
    /// The tokenizer's decoder gives tokens no bytes of their own: what it makes of one depends on its neighbours.
    pub fn token_bytes(&self) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let unclear = |what: String| Error::Decode(format!("{what}, so that a token has no bytes of its own"));
        let decoder = self.inner.get_decoder().ok_or_else(|| unclear("there is no decoder".to_owned()))?;
        let spelling = match decoder {
            DecoderWrapper::ByteLevel(_) => Spelling::ByteLevel(byte_level_alphabet()),
            DecoderWrapper::CTC(_) => return Err(unclear("the decoder drops repeated tokens".to_owned())),
            DecoderWrapper::Sequence(steps) if steps.get_decoders().iter().any(is_byte_level) => {
                return Err(unclear("the decoder does more than undo a byte-level spelling".to_owned()));
            }
            other => Spelling::Own { decoder: other, byte_fallback: falls_back_to_bytes(other) },
        };
        let added = self.inner.get_added_tokens_decoder();
        let vocabulary = self.inner.get_vocab(true);
        let ids = vocabulary.values().max().map_or(0, |&highest| highest as usize + 1);
        let mut bytes = vec![None; ids];
        for (token, id) in vocabulary {
            if !added.contains_key(&id) {
                let spelled = spelling.bytes(&token).ok_or_else(|| unclear(format!("token {id} changes others")))?;
                bytes[id as usize] = Some(spelled);
            }
        }
        Ok(bytes)
    }
}

/// How a vocabulary writes down the bytes of its tokens.
enum Spelling<'a> {
    ByteLevel(HashMap<char, u8>),
    Own { decoder: &'a DecoderWrapper, byte_fallback: bool },
}

impl Spelling<'_> {
    fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        match self {
            // A token with a character outside of the alphabet stands for itself, as the decoder has it.
            Self::ByteLevel(alphabet) => {
                let bytes: Option<Vec<u8>> = token.chars().map(|letter| alphabet.get(&letter).copied()).collect();
                Some(bytes.unwrap_or_else(|| token.as_bytes().to_vec()))
            }
            Self::Own { decoder, byte_fallback } => match single_byte(token).filter(|_| *byte_fallback) {
                Some(byte) => Some(vec![byte]),
                None => {
                    let text = decoder.decode(vec![LETTER.to_owned(), token.to_owned(), LETTER.to_owned()]).ok()?;
                    Some(text.strip_prefix(LETTER)?.strip_suffix(LETTER)?.as_bytes().to_vec())
                }
            },
        }
    }
}

fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    matches!(decoder, DecoderWrapper::ByteLevel(_))
}

fn falls_back_to_bytes(decoder: &DecoderWrapper) -> bool {
    match decoder {
        DecoderWrapper::ByteFallback(_) => true,
        DecoderWrapper::Sequence(steps) => steps.get_decoders().iter().any(falls_back_to_bytes),
        _ => false,
    }
}

/// `<0x0A>` is the byte 10.
fn single_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's alphabet: visible Latin-1 characters stand for their own byte, and the bytes that are none are, in order, the
/// characters from U+0100 on.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut stand_ins = '\u{100}'..;
    (0..=u8::MAX)
        .filter_map(|byte| {
            let visible = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let letter = if visible { Some(char::from(byte)) } else { stand_ins.next() };
            letter.map(|letter| (letter, byte))
        })
        .collect()
}
