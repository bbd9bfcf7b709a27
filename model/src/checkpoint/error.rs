//! What can be wrong with a checkpoint. Every message names the file, and the tensor where one is concerned.

use std::io;
use std::path::PathBuf;

use crate::config;

/// Why a checkpoint, or one of its tensors, was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: io::Error },
    #[error("{}: no model.safetensors and no model.safetensors.index.json here{hint}", dir.display())]
    NoSafetensors { dir: PathBuf, hint: &'static str },
    #[error("{}: {reason}", file.display())]
    BadIndex { file: PathBuf, reason: String },
    #[error("{}: the shard is missing; it should hold tensor {tensor}", file.display())]
    MissingShard { file: PathBuf, tensor: String },
    #[error("{}: truncated: {part} ends at byte {expected}, the file has {actual}", file.display())]
    Truncated { file: PathBuf, part: String, expected: u64, actual: u64 },
    #[error("{}: the header says it is {bytes} bytes long, the limit is {limit}", file.display())]
    HeaderTooLarge { file: PathBuf, bytes: u64, limit: u64 },
    #[error("{}: bad safetensors header: {reason}", file.display())]
    BadHeader { file: PathBuf, reason: String },
    #[error("{}: tensor {tensor} is missing", file.display())]
    MissingTensor { file: PathBuf, tensor: String },
    #[error("{}: expert {expert} of layer {layer} is missing: no tensor {tensor}", file.display())]
    MissingExpert { file: PathBuf, layer: usize, expert: usize, tensor: String },
    #[error("{}: tensor {tensor} has shape {actual:?}, expected {expected:?}", file.display())]
    WrongShape { file: PathBuf, tensor: String, expected: Vec<usize>, actual: Vec<usize> },
    #[error("{}: tensor {tensor} has dtype {actual}, expected {expected}", file.display())]
    WrongDtype { file: PathBuf, tensor: String, expected: &'static str, actual: String },
    #[error("{}: tensor {tensor}: {reason}", file.display())]
    Tensor { file: PathBuf, tensor: String, reason: String },
}
