//! The safetensors files of a checkpoint. In: a folder with `model.safetensors`, or with `model.safetensors.index.json`
//! and its shards. Out: where each tensor lies, its dtype and shape, and its bytes on request. Never here: a byte of a
//! tensor read before it is asked for, a file outside the folder, pickle.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Dtype, Metadata};
use serde_json::Value;

use super::Error;
use crate::config::read_text;

/// DeepSeek-V3's largest header is below 200 kB.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Kimi-K2's index is 15 MB.
const MAX_INDEX_BYTES: u64 = 128 << 20;
/// Of one checkpoint; Kimi-K2 in FP8 has about 140,000.
const MAX_TENSORS: usize = 1_000_000;
const MAX_SHARDS: usize = 10_000;

/// One tensor's place.
#[derive(Debug, Clone)]
pub(super) struct Located {
    pub shard: usize,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// From the start of the file.
    pub offset: u64,
    pub bytes: u64,
}

impl Located {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// One open safetensors file.
#[derive(Debug)]
pub(super) struct Shard {
    pub path: PathBuf,
    pub file: File,
}

impl Shard {
    pub(super) fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), Error> {
        self.file.read_exact_at(buffer, offset).map_err(|source| Error::Io { file: self.path.clone(), source })
    }
}

/// All files of a checkpoint and all tensors in them.
#[derive(Debug)]
pub(super) struct Files {
    pub shards: Vec<Shard>,
    pub tensors: HashMap<String, Located>,
    /// The file that says which tensors there are: the index, or the single file.
    pub listing: PathBuf,
}

impl Files {
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.is_file() {
            Self::open_single(single)
        } else if index.is_file() {
            Self::open_sharded(dir, index)
        } else {
            let pickled =
                ["pytorch_model.bin", "pytorch_model.bin.index.json"].iter().any(|name| dir.join(name).is_file());
            let hint = match pickled {
                true => {
                    " (pytorch_model.bin is not read: loading a pickle runs its code; save the model as safetensors)"
                }
                false => "",
            };
            Err(Error::NoSafetensors { dir: dir.to_owned(), hint })
        }
    }

    fn open_single(path: PathBuf) -> Result<Self, Error> {
        let (shard, tensors) = open_shard(&path, 0).map_err(|error| error.0)?;
        Ok(Self { shards: vec![shard], tensors: tensors.into_iter().collect(), listing: path })
    }

    fn open_sharded(dir: &Path, index: PathBuf) -> Result<Self, Error> {
        let mut shards = Vec::new();
        let mut tensors = HashMap::new();
        for (name, wanted) in read_index(&index)? {
            let path = dir.join(name);
            let (shard, held) = open_shard(&path, shards.len()).map_err(|OpenError(error, source)| match source {
                Some(io::ErrorKind::NotFound) => {
                    Error::MissingShard { file: path.clone(), tensor: wanted.first().cloned().unwrap_or_default() }
                }
                _ => error,
            })?;
            let mut held: HashMap<_, _> = held.into_iter().collect();
            for tensor in wanted {
                let Some(located) = held.remove(&tensor) else {
                    return Err(Error::MissingTensor { file: path, tensor });
                };
                tensors.insert(tensor, located);
            }
            shards.push(shard);
        }
        Ok(Self { shards, tensors, listing: index })
    }
}

/// The shards that an index names, each with its tensors, in the order of first mention.
fn read_index(index: &Path) -> Result<Vec<(String, Vec<String>)>, Error> {
    let bad = |reason: String| Error::BadIndex { file: index.to_owned(), reason };
    let text = read_text(index, MAX_INDEX_BYTES)?;
    let json: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("no weight_map".to_owned()))?;
    if map.len() > MAX_TENSORS {
        return Err(bad(format!("{} tensors, the limit is {MAX_TENSORS}", map.len())));
    }
    let mut order: HashMap<&str, usize> = HashMap::new();
    let mut shards: Vec<(String, Vec<String>)> = Vec::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| bad(format!("the file of {tensor} is not a string")))?;
        let position = *order.entry(file).or_insert(shards.len());
        if position == shards.len() {
            let plain = Path::new(file).file_name().is_some_and(|name| name == file);
            if !plain || shards.len() == MAX_SHARDS {
                return Err(bad(format!(
                    "tensor {tensor} is said to lie in {file:?}, which is no file name of this folder"
                )));
            }
            shards.push((file.to_owned(), Vec::new()));
        }
        shards[position].1.push(tensor.clone());
    }
    Ok(shards)
}

/// An error, and its kind if it came from opening the file.
struct OpenError(Error, Option<io::ErrorKind>);

impl From<Error> for OpenError {
    fn from(error: Error) -> Self {
        Self(error, None)
    }
}

/// Opens one file and reads its header: its length as u64 little-endian, JSON, then the tensors without gaps.
fn open_shard(path: &Path, position: usize) -> Result<(Shard, Vec<(String, Located)>), OpenError> {
    let opening = |source: io::Error| {
        let kind = source.kind();
        OpenError(Error::Io { file: path.to_owned(), source }, Some(kind))
    };
    let file = File::open(path).map_err(opening)?;
    let actual = file.metadata().map_err(opening)?.len();
    let shard = Shard { path: path.to_owned(), file };
    let header = read_header(&shard, actual)?;
    let data_start = 8 + header.len() as u64;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| Error::BadHeader { file: path.to_owned(), reason: error.to_string() })?;
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let offset = data_start.saturating_add(start);
        let located =
            Located { shard: position, dtype: info.dtype, shape: info.shape.clone(), offset, bytes: end - start };
        tensors.push((name, located));
    }
    if tensors.len() > MAX_TENSORS {
        let reason = format!("{} tensors, the limit is {MAX_TENSORS}", tensors.len());
        return Err(Error::BadHeader { file: path.to_owned(), reason }.into());
    }
    // Offsets come from the file: sums of them saturate rather than wrap.
    let data_end = data_start.saturating_add(metadata.data_len() as u64);
    if actual < data_end {
        let cut =
            tensors.iter().filter(|(_, located)| located.end() > actual).min_by_key(|(_, located)| located.offset);
        let (part, expected) = match cut {
            Some((name, located)) => (format!("tensor {name}"), located.end()),
            None => ("the data".to_owned(), data_end),
        };
        return Err(Error::Truncated { file: path.to_owned(), part, expected, actual }.into());
    }
    if actual > data_end {
        let reason = format!("{} bytes after the last tensor", actual - data_end);
        return Err(Error::BadHeader { file: path.to_owned(), reason }.into());
    }
    Ok((shard, tensors))
}

fn read_header(shard: &Shard, actual: u64) -> Result<Vec<u8>, Error> {
    let file = || shard.path.clone();
    let truncated = |expected| Error::Truncated { file: file(), part: "the header".to_owned(), expected, actual };
    if actual < 8 {
        return Err(truncated(8));
    }
    let mut length = [0; 8];
    shard.read_at(&mut length, 0)?;
    if &length == b"version " {
        let reason = "this is a Git LFS pointer, not the file it stands for".to_owned();
        return Err(Error::BadHeader { file: file(), reason });
    }
    let bytes = u64::from_le_bytes(length);
    if bytes > MAX_HEADER_BYTES {
        return Err(Error::HeaderTooLarge { file: file(), bytes, limit: MAX_HEADER_BYTES });
    }
    if actual < 8 + bytes {
        return Err(truncated(8 + bytes));
    }
    let mut header = vec![0; bytes as usize];
    shard.read_at(&mut header, 8)?;
    Ok(header)
}
