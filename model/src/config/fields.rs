//! Reads typed values out of one JSON object. In: a file, or an object inside one. Out: values checked for type and
//! range, `None` for what is absent or null, or an error with the key's full path. Never here: a default.

use std::fs::File;
use std::io::Read as _;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Error;

/// Kimi-K2's `tokenizer_config.json` is the largest known, well below 1 MB.
const MAX_JSON_BYTES: u64 = 8 << 20;

/// Reads `file` as one JSON object.
pub(crate) fn read_object(file: &Path) -> Result<Map<String, Value>, Error> {
    let text = read_text(file, MAX_JSON_BYTES)?;
    serde_json::from_str(&text).map_err(|error| Error::NotJson { file: file.to_owned(), reason: error.to_string() })
}

/// Reads `file` whole, but no more than `limit` bytes of it.
pub(crate) fn read_text(file: &Path, limit: u64) -> Result<String, Error> {
    let io = |source| Error::Io { file: file.to_owned(), source };
    let mut text = String::new();
    File::open(file).map_err(io)?.take(limit + 1).read_to_string(&mut text).map_err(io)?;
    match text.len() as u64 > limit {
        true => Err(Error::TooLarge { file: file.to_owned(), limit }),
        false => Ok(text),
    }
}

/// One JSON object of one file, and where in the file it lies.
pub(crate) struct Fields<'a> {
    file: &'a Path,
    /// The keys that lead here, each followed by a dot.
    prefix: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(file: &'a Path, object: &'a Map<String, Value>) -> Self {
        Self { file, prefix: String::new(), object }
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.file.to_owned()
    }

    /// Whether the key is written at all, be it as null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// The value under `key`; null is as good as absent.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The object under `key`.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Fields<'a>>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let object = value.as_object().ok_or_else(|| self.wrong_type(key, "an object", value))?;
        Ok(Some(Fields { file: self.file, prefix: format!("{}{key}.", self.prefix), object }))
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong_type(key, "a string", value))
    }

    pub(crate) fn required_string(&self, key: &str) -> Result<&'a str, Error> {
        self.string(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong_type(key, "true or false", value))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str, allowed: RangeInclusive<f64>) -> Result<Option<f64>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| self.wrong_type(key, "a number", value))?;
        match allowed.contains(&number) {
            true => Ok(Some(number)),
            false => Err(self.out_of_range(key, value, &format!("{:e} to {:e}", allowed.start(), allowed.end()))),
        }
    }

    /// A whole number under the first of `keys` that is there: the same thing under its names.
    pub(crate) fn size(&self, keys: &[&str], allowed: RangeInclusive<usize>) -> Result<Option<usize>, Error> {
        let Some((key, value)) = keys.iter().find_map(|&key| Some((key, self.value(key)?))) else {
            return Ok(None);
        };
        self.checked_size(key, value, allowed).map(Some)
    }

    pub(crate) fn required_size(&self, keys: &[&str], allowed: RangeInclusive<usize>) -> Result<usize, Error> {
        self.size(keys, allowed)?.ok_or_else(|| self.missing(keys.first().copied().unwrap_or_default()))
    }

    pub(crate) fn required_even(&self, key: &str, allowed: RangeInclusive<usize>) -> Result<usize, Error> {
        let size = self.required_size(&[key], allowed)?;
        match size.is_multiple_of(2) {
            true => Ok(size),
            false => Err(self.out_of_range(key, size, "an even number")),
        }
    }

    /// A short list of whole numbers.
    pub(crate) fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, Error> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let wrong = || self.wrong_type(key, "a list of whole numbers", value);
        let list = value.as_array().filter(|list| list.len() <= 8).ok_or_else(wrong)?;
        list.iter().map(|item| self.checked_size(key, item, 0..=1 << 20)).collect::<Result<_, _>>().map(Some)
    }

    /// One token id or a list of them. An id outside the vocabulary can never be drawn and is left out: scaled-down
    /// copies of a model keep the ids of the large one.
    pub(crate) fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>, Error> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let one = std::slice::from_ref(value);
        let list = value.as_array().map_or(one, Vec::as_slice);
        if list.len() > 1024 {
            return Err(self.out_of_range(key, format!("{} ids", list.len()), "at most 1024 ids"));
        }
        let mut ids = Vec::with_capacity(list.len());
        for item in list {
            let id = self.checked_size(key, item, 0..=u32::MAX as usize)?;
            match id < vocab_size {
                true => ids.push(id as u32),
                false => {
                    tracing::warn!(file = %self.file.display(), key, id, vocab_size, "token id is outside the vocabulary");
                }
            }
        }
        Ok(ids)
    }

    fn checked_size(&self, key: &str, value: &Value, allowed: RangeInclusive<usize>) -> Result<usize, Error> {
        let range = || format!("{} to {}", allowed.start(), allowed.end());
        match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if allowed.contains(&size) => Ok(size),
            Some(_) => Err(self.out_of_range(key, value, &range())),
            None if value.is_i64() => Err(self.out_of_range(key, value, &range())),
            None => Err(self.wrong_type(key, "a whole number", value)),
        }
    }

    pub(crate) fn missing(&self, key: &str) -> Error {
        Error::Missing { file: self.file(), key: format!("{}{key}", self.prefix) }
    }

    pub(crate) fn out_of_range(&self, key: &str, value: impl ToString, allowed: &str) -> Error {
        Error::OutOfRange {
            file: self.file(),
            key: format!("{}{key}", self.prefix),
            value: value.to_string(),
            allowed: allowed.to_owned(),
        }
    }

    pub(crate) fn unsupported(&self, key: &str, value: &str, supported: &str) -> Error {
        Error::Unsupported {
            file: self.file(),
            key: format!("{}{key}", self.prefix),
            value: shortened(value),
            supported: supported.to_owned(),
        }
    }

    pub(crate) fn wrong_type(&self, key: &str, expected: &'static str, actual: &Value) -> Error {
        Error::WrongType {
            file: self.file(),
            key: format!("{}{key}", self.prefix),
            expected,
            actual: shortened(&actual.to_string()),
        }
    }
}

/// A stranger's text, cut to what fits a message.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
