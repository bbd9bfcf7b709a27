//! What can be wrong with a model folder's JSON files. Every message names the file and, where there is one, the key.

use std::io;
use std::path::PathBuf;

/// Why a JSON file of a model folder was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("{}: {source}", file.display())]
    Io { file: PathBuf, source: io::Error },
    #[error("{}: larger than the {limit} bytes that are read", file.display())]
    TooLarge { file: PathBuf, limit: u64 },
    #[error("{}: not a JSON object: {reason}", file.display())]
    NotJson { file: PathBuf, reason: String },
    #[error("{}: {key} is missing", file.display())]
    Missing { file: PathBuf, key: String },
    #[error("{}: {key} is {actual}, expected {expected}", file.display())]
    WrongType { file: PathBuf, key: String, expected: &'static str, actual: String },
    #[error("{}: {key} is {value}, out of range: {allowed}", file.display())]
    OutOfRange { file: PathBuf, key: String, value: String, allowed: String },
    #[error("{}: model_type \"{model_type}\" is not supported; supported: {supported}", file.display())]
    UnknownModelType { file: PathBuf, model_type: String, supported: String },
    #[error("{}: {key} = {value} is not supported; supported: {supported}", file.display())]
    Unsupported { file: PathBuf, key: String, value: String, supported: String },
}
