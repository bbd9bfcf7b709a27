//! Text to token ids and back. In: a model folder's `tokenizer.json`, `tokenizer_config.json` and chat template. Out:
//! ids, text, streamed text, rendered prompts. Never here: code from the folder, the network, tokenizer formats that
//! need code to read (a folder without `tokenizer.json` has no tokenizer and is served by token ids alone).

mod chat_template;
mod incremental;
mod template_functions;
mod token_bytes;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::AddedToken;

pub use chat_template::{ChatTemplate, Message, TemplateError};
pub use incremental::IncrementalDecoder;

use crate::config::{self, Fields, read_object, read_text};

/// DeepSeek's is 8 MB.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// Why a tokenizer could not be read or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error("{}: {reason}", file.display())]
    Unreadable { file: PathBuf, reason: String },
    #[error("text cannot be encoded: {0}")]
    Encode(String),
    #[error("token ids cannot be decoded: {0}")]
    Decode(String),
}

/// A model's tokenizer. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`; `None` when there is no such file.
    ///
    /// As in `transformers` 5, that file alone decides what is added around a text: `add_bos_token` of
    /// `tokenizer_config.json` is not read. The tokens which that file calls special (`bos_token`, `eos_token`, …) are
    /// special even if `tokenizer.json` does not say so.
    ///
    /// # Errors
    /// A file is there but cannot be read.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let file = dir.join("tokenizer.json");
        if !file.is_file() {
            return Ok(None);
        }
        let text = read_text(&file, MAX_TOKENIZER_BYTES)?;
        let unreadable = |error: tokenizers::Error| Error::Unreadable { file: file.clone(), reason: error.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(text).map_err(unreadable)?;
        // Both are for training batches: a prompt is never cut or filled up in silence.
        inner.with_truncation(None).map_err(unreadable)?;
        inner.with_padding(None);
        let special = named_special_tokens(dir)?;
        let known = special.into_values().filter(|token| inner.token_to_id(&token.content).is_some());
        let known: Vec<_> = known.collect();
        inner.add_special_tokens(known).map_err(unreadable)?;
        Ok(Some(Self { inner: Arc::new(inner) }))
    }

    /// The token ids of `text`. Special tokens written out in it become their ids. With `add_special`, what
    /// `tokenizer.json`'s post-processor adds around a text (often nothing, for DeepSeek's) is added.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, Error> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|error| Error::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; with `skip_special` without the special ones. Ids that the tokenizer does not know are left out,
    /// and bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, Error> {
        self.inner.decode(ids, skip_special).map_err(|error| Error::Decode(error.to_string()))
    }

    /// A decoder for an answer that comes token by token, after `prompt`.
    pub fn incremental(&self, prompt: &[u32], skip_special: bool) -> IncrementalDecoder {
        IncrementalDecoder::new(self.clone(), prompt, skip_special)
    }

    /// The id of exactly this token, special or not.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as the vocabulary spells it, which is not text: spaces and bytes have stand-ins.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included. A model's own `vocab_size` is often rounded up from it.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// `bos_token` and the like of `tokenizer_config.json`, by key; none when there is no such file.
fn named_special_tokens(dir: &Path) -> Result<std::collections::BTreeMap<String, AddedToken>, Error> {
    let file = dir.join("tokenizer_config.json");
    let mut tokens = std::collections::BTreeMap::new();
    if !file.is_file() {
        return Ok(tokens);
    }
    let object = read_object(&file)?;
    let fields = Fields::new(&file, &object);
    for key in ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
        let Some(value) = fields.value(key) else { continue };
        tokens.insert(key.to_owned(), special_token(&fields, key, value)?);
    }
    Ok(tokens)
}

/// A token is written as its text, or as an object with flags.
fn special_token(fields: &Fields<'_>, key: &str, value: &Value) -> Result<AddedToken, Error> {
    if let Some(content) = value.as_str() {
        return Ok(AddedToken::from(content, true).normalized(false));
    }
    let Some(token) = fields.object(key)? else {
        return Err(fields.wrong_type(key, "a token", value).into());
    };
    Ok(AddedToken {
        content: token.required_string("content")?.to_owned(),
        single_word: token.boolean("single_word")?.unwrap_or(false),
        lstrip: token.boolean("lstrip")?.unwrap_or(false),
        rstrip: token.boolean("rstrip")?.unwrap_or(false),
        normalized: token.boolean("normalized")?.unwrap_or(false),
        special: true,
    })
}
