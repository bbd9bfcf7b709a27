//! What the model's authors say of sampling from it. In: `generation_config.json`, which may be missing. Out: their
//! defaults, checked. Never here: a request's own parameters.

use std::path::Path;

use crate::config::{self, Fields, read_object};

/// `generation_config.json`'s values; `None` is what it leaves open.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Ids within the vocabulary; empty when the file names none.
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    /// In [0, 100]; 0 is greedy, which is also what `do_sample: false` means.
    pub temperature: Option<f64>,
    /// In (0, 1].
    pub top_p: Option<f64>,
    /// At least 1.
    pub top_k: Option<u32>,
    /// In (0, 100].
    pub repetition_penalty: Option<f64>,
}

impl GenerationConfig {
    /// Reads `dir/generation_config.json`. All is left open when there is no such file.
    ///
    /// # Errors
    /// The file is no JSON object, or a value has the wrong type or is out of range.
    pub fn load(dir: &Path, vocab_size: usize) -> Result<Self, config::Error> {
        let file = dir.join("generation_config.json");
        if !file.is_file() {
            return Ok(Self::default());
        }
        let object = read_object(&file)?;
        let fields = Fields::new(&file, &object);
        let temperature = fields.number("temperature", 0.0..=100.0)?;
        let greedy = fields.boolean("do_sample")? == Some(false);
        let top_k = fields.size(&["top_k"], 0..=u32::MAX as usize)?;
        Ok(Self {
            eos_token_ids: fields.token_ids("eos_token_id", vocab_size)?,
            bos_token_id: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
            temperature: if greedy { Some(0.0) } else { temperature },
            top_p: fields.number("top_p", f64::MIN_POSITIVE..=1.0)?,
            // 0 is the reference's "no limit".
            top_k: top_k.filter(|&top_k| top_k > 0).map(|top_k| top_k as u32),
            repetition_penalty: fields.number("repetition_penalty", f64::MIN_POSITIVE..=100.0)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig, config::Error> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        GenerationConfig::load(dir.path(), 1000)
    }

    #[test]
    fn no_file_leaves_all_open() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::load(dir.path(), 10).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn one_end_of_sequence_token_or_several() {
        assert_eq!(parse(r#"{"eos_token_id": 7}"#).unwrap().eos_token_ids, [7]);
        let several =
            parse(r#"{"eos_token_id": [7, 8], "bos_token_id": 1, "temperature": 0.6, "top_p": 0.95}"#).unwrap();
        assert_eq!((several.eos_token_ids.as_slice(), several.bos_token_id), (&[7, 8][..], Some(1)));
        assert_eq!((several.temperature, several.top_p), (Some(0.6), Some(0.95)));
    }

    #[test]
    fn not_sampling_is_temperature_zero() {
        assert_eq!(parse(r#"{"do_sample": false, "temperature": 0.6}"#).unwrap().temperature, Some(0.0));
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        for (text, key) in [
            (r#"{"top_p": 1.5}"#, "top_p"),
            (r#"{"temperature": -1}"#, "temperature"),
            (r#"{"top_k": -3}"#, "top_k"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty"),
            (r#"{"eos_token_id": "end"}"#, "eos_token_id"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains("generation_config.json") && message.contains(key), "{message}");
        }
    }
}
