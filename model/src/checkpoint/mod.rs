//! A checkpoint folder, checked whole before anything is served from it. In: a folder of the Hugging Face layout. Out:
//! its config, and each weight on request, mapped rather than read. Never here: pickle, code from the folder, a weight
//! that nobody asked for, or mathematics beyond undoing FP8 blocks.

mod error;
pub mod fp8;
mod identity;
mod layout;
mod safetensors;
mod stored;
mod weight;

use std::path::{Path, PathBuf};

use ::safetensors::tensor::Dtype;
use tch::{Kind, Tensor};

pub use error::Error;
pub use identity::Identity;
pub(crate) use stored::Stored;
pub use weight::Weight;

use crate::config::{Fp8Blocks, ModelConfig};
use crate::device::{Compute, Device};
use crate::gpu::experts::{Format, Kernels};
use layout::Expected;
use safetensors::{Files, Located};

const FLOATS: &str = "F32, BF16 or F16";
const FLOATS_OR_FP8: &str = "F32, BF16, F16 or F8_E4M3";
const SCALES: &str = "F32 or BF16";

/// An open checkpoint: every tensor that its config asks for is there, in the right shape and a dtype that can be read.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    /// `config.json` speaks of multi-token prediction, and the files hold none.
    lacks_mtp: bool,
    /// Only the tensors that the model uses; others in the files (a tied head, a second embedding) are forgotten.
    files: Files,
}

impl Checkpoint {
    /// Opens `dir`: reads `config.json`, the index and the headers, and checks them against each other. No weight is read.
    ///
    /// Multi-token prediction is there whole, or not at all, whatever `config.json` says; then the config has it no more.
    ///
    /// # Errors
    /// The first thing found wrong; see [`Error`].
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let mut config = ModelConfig::load(dir)?;
        let files = Files::open(dir)?;
        let held = |layer| files.tensors.keys().any(|name| layout::is_mtp(name, layer));
        let lacks_mtp = config.mtp_layer().is_some_and(|layer| !held(layer));
        if lacks_mtp {
            config.num_nextn_predict_layers = 0;
        }
        let mut checkpoint = Self { dir: dir.to_owned(), config, lacks_mtp, files };
        checkpoint.check()?;
        Ok(checkpoint)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder's own name, which is what people call the model.
    pub fn name(&self) -> String {
        self.dir.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether `config.json` speaks of multi-token prediction though the files hold no tensor of it.
    pub fn lacks_mtp(&self) -> bool {
        self.lacks_mtp
    }

    /// The weight `name` of shape `shape`, on the CPU: F32, BF16 and F16 without a copy where the file aligns them, FP8
    /// blocks multiplied out to f32. `lm_head.weight` is the embedding where the two are tied.
    ///
    /// # Errors
    /// There is no such tensor in the model, it has another shape, or its file cannot be read any more.
    pub fn load(&self, name: &str, shape: &[usize]) -> Result<Weight, Error> {
        let tied = name == layout::HEAD && self.config.tie_word_embeddings;
        let name = if tied { layout::EMBEDDING } else { name };
        let located = self.locate(name)?;
        self.check_shape(name, located, shape)?;
        let shard = &self.files.shards[located.shard];
        let broken = |reason| Error::Tensor { file: shard.path.clone(), tensor: name.to_owned(), reason };
        match (kind(located.dtype), self.config.quantization) {
            (Some(kind), _) => Weight::map(&shard.file, located, kind).map_err(broken),
            (None, Some(blocks)) if located.dtype == Dtype::F8_E4M3 => self.dequantise(name, located, blocks),
            _ => Err(self.wrong_dtype(name, located, FLOATS)),
        }
    }

    /// The same as stored, for kernels that read it in place: FP8 stays FP8.
    ///
    /// # Errors
    /// As [`load`](Self::load)'s.
    pub(crate) fn load_stored(&self, name: &str, [out, inner]: [usize; 2]) -> Result<Stored, Error> {
        let located = self.files.tensors.get(name);
        let Some((located, blocks)) =
            located.filter(|located| located.dtype == Dtype::F8_E4M3).zip(self.config.quantization)
        else {
            return Ok(Stored::Plain(self.load(name, &[out, inner])?));
        };
        self.check_shape(name, located, &[out, inner])?;
        let shard = &self.files.shards[located.shard];
        let broken = |reason| Error::Tensor { file: shard.path.clone(), tensor: name.to_owned(), reason };
        let codes = Weight::map(&shard.file, located, Kind::Uint8).map_err(broken)?;
        let scales = Weight::owned(Tensor::from_slice(&self.scales(name, [out, inner], blocks)?));
        Ok(Stored::Fp8 { codes, scales, block: blocks.rows })
    }

    /// How kernels on a GPU read the weights of expert `expert` of layer `layer`, without one being copied or expanded: all of
    /// them are stored alike. `None` where they are not, or there are no such kernels; then weights become numbers of the
    /// computation.
    pub(crate) fn expert_format(&self, layer: usize, expert: usize, compute: Compute) -> Option<Format> {
        let format = |name: &String| match (self.files.tensors.get(name)?.dtype, self.config.quantization) {
            (Dtype::BF16, _) => Some(Format::Bf16),
            (Dtype::F8_E4M3, Some(blocks)) => Some(Format::Fp8 { block: blocks.rows }),
            _ => None,
        };
        let [first, rest @ ..] = layout::expert_weights(layer, expert).map(|name| format(&name));
        let format = first.filter(|_| rest.iter().all(|other| *other == first))?;
        let suits = Kernels::suit(self.config.hidden_size, self.config.moe_intermediate_size, format);
        if suits { Kernels::of(compute).map(|_| format) } else { None }
    }

    /// Stored bytes of one routed expert, scales included; 0 for a model without any. All are the same size, give or take
    /// tensors stored in different dtypes.
    pub fn expert_bytes(&self) -> u64 {
        let Some(layer) = self.config.moe_layers().next() else { return 0 };
        let bytes = |name: &str| self.files.tensors.get(name).map_or(0, |located| located.bytes);
        layout::expert_weights(layer, 0).iter().map(|name| bytes(name) + bytes(&layout::scales_of(name))).sum()
    }

    /// Bytes that one routed expert takes where it is computed as `compute` says; as [`Self::expert_bytes`] for one that is read
    /// as stored. On the processor BF16 and FP8 are, on a GPU what its kernels read; what else there is becomes numbers of the
    /// computation.
    pub fn resident_expert_bytes(&self, compute: Compute) -> u64 {
        let Some(layer) = self.config.moe_layers().next() else { return 0 };
        let value = compute.kind().elt_size_in_bytes() as u64;
        let kept = self.expert_format(layer, 0, compute).is_some();
        let bytes = |name: &String| {
            let Some(located) = self.files.tensors.get(name) else { return 0 };
            let scales = self.files.tensors.get(&layout::scales_of(name)).map_or(0, |located| located.bytes);
            match (compute.device, located.dtype) {
                (Device::Cpu, Dtype::BF16 | Dtype::F8_E4M3) => located.bytes + scales,
                (Device::Cuda(_), _) if kept => located.bytes + scales,
                _ => located.shape.iter().map(|dim| *dim as u64).product::<u64>() * value,
            }
        };
        layout::expert_weights(layer, 0).iter().map(bytes).sum()
    }

    /// That a tensor's pages could not be read.
    pub(crate) fn unreadable(&self, tensor: &str, error: &std::io::Error) -> Error {
        let shard = self.files.tensors.get(tensor).map(|located| self.files.shards[located.shard].path.clone());
        Error::Tensor {
            file: shard.unwrap_or_default(),
            tensor: tensor.to_owned(),
            reason: format!("cannot be read: {error}"),
        }
    }

    /// Stored bytes of all tensors that the model uses.
    pub fn tensor_bytes(&self) -> u64 {
        self.files.tensors.values().map(|located| located.bytes).sum()
    }

    /// Checks every tensor of the model and forgets the others.
    fn check(&mut self) -> Result<(), Error> {
        let mut used = std::collections::HashMap::new();
        for expected in layout::expected(&self.config) {
            let located = self.check_tensor(&expected)?.clone();
            if located.dtype == Dtype::F8_E4M3 {
                let name = layout::scales_of(&expected.name);
                let scales = self.check_scales(&name, &expected)?.clone();
                used.insert(name, scales);
            }
            used.insert(expected.name, located);
        }
        self.files.tensors = used;
        Ok(())
    }

    fn check_tensor(&self, expected: &Expected) -> Result<&Located, Error> {
        let located = self.files.tensors.get(&expected.name).ok_or_else(|| self.missing(&expected.name, expected))?;
        self.check_shape(&expected.name, located, &expected.shape)?;
        let fp8 = expected.may_be_fp8 && self.config.quantization.is_some();
        match kind(located.dtype) {
            Some(_) => Ok(located),
            None if fp8 && located.dtype == Dtype::F8_E4M3 => Ok(located),
            None => Err(self.wrong_dtype(&expected.name, located, if fp8 { FLOATS_OR_FP8 } else { FLOATS })),
        }
    }

    fn check_scales(&self, name: &str, weight: &Expected) -> Result<&Located, Error> {
        let located = self.files.tensors.get(name).ok_or_else(|| self.missing(name, weight))?;
        let (Some(blocks), [rows, cols]) = (self.config.quantization, weight.shape.as_slice()) else {
            return Err(self.missing(name, weight));
        };
        self.check_shape(name, located, &[rows.div_ceil(blocks.rows), cols.div_ceil(blocks.cols)])?;
        match located.dtype {
            Dtype::F32 | Dtype::BF16 => Ok(located),
            _ => Err(self.wrong_dtype(name, located, SCALES)),
        }
    }

    fn dequantise(&self, name: &str, located: &Located, blocks: Fp8Blocks) -> Result<Weight, Error> {
        let shard = &self.files.shards[located.shard];
        let broken = |reason: String| Error::Tensor { file: shard.path.clone(), tensor: name.to_owned(), reason };
        let [rows, cols] = located.shape[..] else {
            return Err(broken("an FP8 weight must have two dimensions".to_owned()));
        };
        let scales = self.scales(name, [rows, cols], blocks)?;
        let codes = weight::map_range(&shard.file, located).map_err(|error| broken(error.to_string()))?;
        let values = fp8::dequantise(&codes, &scales, cols, blocks.rows);
        let tensor = Tensor::f_from_slice(&values).and_then(|flat| flat.f_view([rows as i64, cols as i64]));
        tensor.map(Weight::owned).map_err(|error| broken(error.to_string()))
    }

    /// Those of an FP8 weight of this shape.
    fn scales(&self, name: &str, [rows, cols]: [usize; 2], blocks: Fp8Blocks) -> Result<Vec<f32>, Error> {
        let scales = self.load(&layout::scales_of(name), &[rows.div_ceil(blocks.rows), cols.div_ceil(blocks.cols)])?;
        tch::no_grad(|| Vec::<f32>::try_from(scales.to_kind(Kind::Float).flatten(0, -1))).map_err(|error| {
            let file = self.locate(name).map(|located| self.files.shards[located.shard].path.clone());
            Error::Tensor { file: file.unwrap_or_default(), tensor: layout::scales_of(name), reason: error.to_string() }
        })
    }

    fn locate(&self, name: &str) -> Result<&Located, Error> {
        let missing = || Error::MissingTensor { file: self.files.listing.clone(), tensor: name.to_owned() };
        self.files.tensors.get(name).ok_or_else(missing)
    }

    fn missing(&self, tensor: &str, expected: &Expected) -> Error {
        let (file, tensor) = (self.files.listing.clone(), tensor.to_owned());
        match expected.expert {
            Some((layer, expert)) => Error::MissingExpert { file, layer, expert, tensor },
            None => Error::MissingTensor { file, tensor },
        }
    }

    fn check_shape(&self, name: &str, located: &Located, expected: &[usize]) -> Result<(), Error> {
        match located.shape == expected {
            true => Ok(()),
            false => Err(Error::WrongShape {
                file: self.files.shards[located.shard].path.clone(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                actual: located.shape.clone(),
            }),
        }
    }

    fn wrong_dtype(&self, name: &str, located: &Located, expected: &'static str) -> Error {
        Error::WrongDtype {
            file: self.files.shards[located.shard].path.clone(),
            tensor: name.to_owned(),
            expected,
            actual: located.dtype.to_string(),
        }
    }
}

/// The kinds that are read as they are.
fn kind(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::BF16 => Some(Kind::BFloat16),
        Dtype::F16 => Some(Kind::Half),
        _ => None,
    }
}
