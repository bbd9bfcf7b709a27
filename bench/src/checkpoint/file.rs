//! A safetensors file: tensors by name, shape and format come in, a file of random weights goes out, written from its
//! beginning to its end. No tensor is ever whole in memory, let alone two.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use conclave_model::checkpoint::fp8::decode_e4m3;
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Map, json};

/// Random bytes are drawn once and written again and again, each tensor from another place on: drawing five gigabytes
/// would take longer than writing them. A prime number of values, so that rows do not repeat.
const POOL: usize = 1_048_583;

#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: Dtype,
}

/// How a tensor is stored, and so what it holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Dtype {
    /// Ones where there is one dimension, else random numbers that keep the variance of a row.
    Bf16,
    /// Random bytes but for those that are no number.
    E4m3,
    /// f32: what brings the e4m3 weights of a product over `inner` values to that variance.
    Scales { inner: usize },
}

/// What tensors are filled from.
pub(super) struct Random {
    offsets: StdRng,
    /// Uniform in ±√3, so of variance 1.
    numbers: Vec<f32>,
    codes: Vec<u8>,
    /// Root of the mean square of the codes' values.
    code_size: f32,
}

impl Random {
    pub(super) fn new() -> Self {
        let mut random = StdRng::seed_from_u64(0);
        let bound = 3.0f32.sqrt();
        let numbers = (0..POOL).map(|_| random.random_range(-bound..bound)).collect();
        let codes: Vec<u8> =
            (0..POOL).map(|_| random.random_range(0..0x7fu8) | (random.random::<u8>() & 0x80)).collect();
        let squares: f64 = codes.iter().map(|code| f64::from(decode_e4m3(*code)).powi(2)).sum();
        Self { offsets: random, numbers, codes, code_size: (squares / POOL as f64).sqrt() as f32 }
    }

    /// Writes `count` values of a pool's `bytes`, `width` each, from a random place on.
    fn fill(&mut self, out: &mut impl Write, bytes: &[u8], width: usize, count: usize) -> std::io::Result<()> {
        let mut from = self.offsets.random_range(0..POOL) * width;
        let mut left = count * width;
        while left > 0 {
            let here = left.min(bytes.len() - from);
            out.write_all(&bytes[from..from + here])?;
            left -= here;
            from = 0;
        }
        Ok(())
    }
}

/// Writes `tensors` into `file`, in their order.
pub(super) fn write(file: &Path, tensors: &[Tensor], random: &mut Random) -> std::io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(file)?);
    let mut header = header(tensors).to_string().into_bytes();
    // Values begin at a multiple of eight, and each tensor's size is one: so all can be mapped in place.
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut scaled = Scaled::default();
    let codes = std::mem::take(&mut random.codes);
    for tensor in tensors {
        match (tensor.dtype, &tensor.shape[..]) {
            (Dtype::Bf16, [_, inner]) => {
                let pool = scaled.by(1.0 / (*inner as f32).sqrt(), &random.numbers);
                random.fill(&mut out, pool, 2, tensor.values())?;
            }
            (Dtype::Bf16, _) => {
                let one = bf16::ONE.to_le_bytes();
                (0..tensor.values()).try_for_each(|_| out.write_all(&one))?;
            }
            (Dtype::E4m3, _) => random.fill(&mut out, &codes, 1, tensor.values())?,
            (Dtype::Scales { inner }, _) => {
                let scale = (1.0 / (random.code_size * (inner as f32).sqrt())).to_le_bytes();
                (0..tensor.values()).try_for_each(|_| out.write_all(&scale))?;
            }
        }
    }
    random.codes = codes;
    out.flush()
}

/// The pool in bf16 at the scale that was asked for last: neighbours mostly ask for the same.
#[derive(Default)]
struct Scaled {
    scale: f32,
    bytes: Vec<u8>,
}

impl Scaled {
    fn by(&mut self, scale: f32, numbers: &[f32]) -> &[u8] {
        if self.scale != scale || self.bytes.is_empty() {
            self.scale = scale;
            self.bytes = numbers.iter().flat_map(|number| bf16::from_f32(number * scale).to_le_bytes()).collect();
        }
        &self.bytes
    }
}

fn header(tensors: &[Tensor]) -> serde_json::Value {
    let mut header = Map::new();
    let mut from = 0;
    for tensor in tensors {
        let (name, width) = match tensor.dtype {
            Dtype::Bf16 => ("BF16", 2),
            Dtype::E4m3 => ("F8_E4M3", 1),
            Dtype::Scales { .. } => ("F32", 4),
        };
        let until = from + tensor.values() * width;
        let entry = json!({ "dtype": name, "shape": tensor.shape, "data_offsets": [from, until] });
        header.insert(tensor.name.clone(), entry);
        from = until;
    }
    header.into()
}

impl Tensor {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }
}
