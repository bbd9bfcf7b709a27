//! The golden models: tiny random checkpoints, and what `transformers` made of them.
//!
//! In: the folders that `golden/generate.py` wrote. Out: prompts with the reference's logits and greedy tokens. Never
//! here: a computed expectation; these come from files alone.

use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};

use crate::process::checkout;

/// One checkpoint with the reference's answers.
#[derive(Debug)]
pub struct Golden {
    /// Its folder's name, which says what it looks like.
    pub name: String,
    /// The checkpoint.
    pub folder: PathBuf,
    /// At least one.
    pub cases: Vec<Case>,
}

/// One prompt with what the reference made of it.
#[derive(Debug)]
pub struct Case {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Per token of the prompt: the logits of what follows it, f32 `[prompt, vocab]`.
    pub logits: Vec<Vec<f32>>,
    /// The reference's greedy continuation.
    pub greedy: Vec<u32>,
}

impl Golden {
    /// Every golden model there is; at least one, by name.
    pub fn all() -> Vec<Self> {
        let root = root();
        let folders = std::fs::read_dir(&root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
        let mut names: Vec<String> = folders
            .map(|entry| entry.expect("a readable folder"))
            .filter(|entry| entry.path().join("expected.safetensors").is_file())
            .map(|entry| entry.file_name().into_string().expect("a name in plain ASCII"))
            .collect();
        names.sort();
        assert!(!names.is_empty(), "no golden model in {}", root.display());
        names.iter().map(|name| Self::named(name)).collect()
    }

    /// The one called `name`.
    pub fn named(name: &str) -> Self {
        let folder = root().join(name);
        let path = folder.join("expected.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let cases: Vec<Case> = (0..).map_while(|case| read_case(&tensors, case)).collect();
        assert!(!cases.is_empty(), "{} holds no prompt_0", path.display());
        Self { name: name.to_owned(), folder, cases }
    }
}

impl Case {
    /// Natural logarithms of the probabilities that the reference's logits at `position` of the prompt mean.
    pub fn logprobs(&self, position: usize) -> Vec<f32> {
        let logits = &self.logits[position];
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
        logits.iter().map(|logit| (f64::from(logit - largest) - sum.ln()) as f32).collect()
    }
}

fn root() -> PathBuf {
    checkout().join("tests/golden")
}

fn read_case(tensors: &SafeTensors<'_>, case: usize) -> Option<Case> {
    let prompt = tensors.tensor(&format!("prompt_{case}")).ok()?;
    let logits = tensors.tensor(&format!("logits_{case}")).expect("logits beside each prompt");
    let greedy = tensors.tensor(&format!("greedy_{case}")).expect("greedy tokens beside each prompt");
    assert_eq!(logits.dtype(), Dtype::F32, "logits are f32");
    let vocab = *logits.shape().last().expect("logits have a vocabulary axis");
    let values: Vec<f32> =
        logits.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let logits: Vec<Vec<f32>> = values.chunks_exact(vocab).map(<[f32]>::to_vec).collect();
    Some(Case { prompt: token_ids(&prompt), logits, greedy: token_ids(&greedy) })
}

fn token_ids(tensor: &safetensors::tensor::TensorView<'_>) -> Vec<u32> {
    let id = |value: i64| u32::try_from(value).expect("token ids are not negative");
    match tensor.dtype() {
        Dtype::I64 => tensor.data().chunks_exact(8).map(|b| id(i64::from_le_bytes(b.try_into().expect("8")))).collect(),
        Dtype::I32 => {
            tensor.data().chunks_exact(4).map(|b| id(i64::from(i32::from_le_bytes(b.try_into().expect("4"))))).collect()
        }
        other => panic!("token ids are I64 or I32, not {other:?}"),
    }
}
