//! Rotary position embedding, with YaRN's stretching for contexts beyond the one trained on.
//!
//! In: positions, and rows to rotate. Out: rotated rows, pairs left where they were.
//! Never here: a table of all positions; angles are computed for the positions at hand.
//!
//! Sources: YaRN, arXiv 2309.00071, sections 3.2 to 3.4; transformers `modeling_rope_utils.py` for the cases that the
//! paper leaves open (it is the reference we are compared with).

use tch::{Device, Kind, Tensor};

use crate::{
    config::{RopeConfig, Yarn},
    kernels::tensor,
};

/// The frequencies of one model.
#[derive(Debug)]
pub(crate) struct Rope {
    /// Per pair, f32 `[R/2]`.
    inv_freq: Tensor,
    /// On cosine and sine.
    attention_factor: f64,
    /// Pairs are (2i, 2i+1); otherwise (i, i + R/2).
    interleaved: bool,
}

/// Cosines and sines of some rows' positions, f32 `[T, 1, R/2]`.
#[derive(Debug)]
pub(crate) struct Angles {
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
}

/// The same as values, for rows on the processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowAngles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    interleaved: bool,
}

impl Angles {
    /// Panics where they are on a GPU.
    pub(crate) fn rows(&self) -> RowAngles<'_> {
        RowAngles { cos: tensor::f32s(&self.cos), sin: tensor::f32s(&self.sin), interleaved: self.interleaved }
    }
}

impl RowAngles<'_> {
    /// Rotates one head's `[R]` of row `row`, in place.
    pub(crate) fn rotate(self, row: usize, x: &mut [f32]) {
        let half = x.len() / 2;
        let (cos, sin) = (&self.cos[row * half..][..half], &self.sin[row * half..][..half]);
        for (pair, (cos, sin)) in cos.iter().zip(sin).enumerate() {
            let (first, second) = if self.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
            let (a, b) = (x[first], x[second]);
            (x[first], x[second]) = (a * cos - b * sin, a * sin + b * cos);
        }
    }
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig, dim: usize, device: Device) -> Self {
        let inv_freq = inverse_frequencies(config, dim);
        Self {
            inv_freq: Tensor::from_slice(&inv_freq).to_device(device),
            attention_factor: config.scaling.as_ref().map_or(1.0, attention_factor),
            interleaved: config.interleaved,
        }
    }

    /// Angles of rows at `positions`.
    pub(crate) fn angles(&self, positions: &[i64]) -> Angles {
        let interleaved = self.interleaved;
        if self.inv_freq.device() == Device::Cpu {
            // One by one: libtorch takes whole vectors by one cosine and the values left over by another.
            let inv_freq = tensor::f32s(&self.inv_freq);
            let factor = self.attention_factor as f32;
            let angle = |part: fn(f32) -> f32| -> Tensor {
                let row = |position: &i64| {
                    let position = *position as f32;
                    inv_freq.iter().map(move |freq| part(position * freq) * factor)
                };
                let values: Vec<f32> = positions.iter().flat_map(row).collect();
                Tensor::from_slice(&values).view([positions.len() as i64, 1, inv_freq.len() as i64])
            };
            return Angles { cos: angle(f32::cos), sin: angle(f32::sin), interleaved };
        }
        let positions = Tensor::from_slice(positions).to_device(self.inv_freq.device()).to_kind(Kind::Float);
        let angles = positions.unsqueeze(-1) * self.inv_freq.unsqueeze(0); // [T, R/2]
        let (cos, sin) = (angles.cos() * self.attention_factor, angles.sin() * self.attention_factor);
        Angles { cos: cos.unsqueeze(1), sin: sin.unsqueeze(1), interleaved }
    }

    /// Rotates `x: [T, heads, R]`.
    pub(crate) fn rotate(&self, x: &Tensor, angles: &Angles) -> Tensor {
        let size = x.size();
        let half = size[2] / 2;
        let pairs = x.to_kind(Kind::Float);
        let (pairs, axis) = if self.interleaved {
            (pairs.reshape([size[0], size[1], half, 2]), 3)
        } else {
            (pairs.reshape([size[0], size[1], 2, half]), 2)
        };
        let (a, b) = (pairs.select(axis, 0), pairs.select(axis, 1)); // [T, heads, R/2]
        let rotated = Tensor::stack(&[&a * &angles.cos - &b * &angles.sin, &a * &angles.sin + &b * &angles.cos], axis);
        rotated.reshape(size.as_slice()).to_kind(x.kind())
    }
}

/// Per pair i of `dim`: `theta^(-2i/dim)`, blended by YaRN between itself (fast pairs) and itself over `factor`
/// (slow ones). f32 arithmetic, as the reference's.
fn inverse_frequencies(config: &RopeConfig, dim: usize) -> Vec<f32> {
    let plain = (0..dim / 2).map(|pair| 1.0 / (config.theta as f32).powf((2 * pair) as f32 / dim as f32));
    let Some(yarn) = &config.scaling else { return plain.collect() };
    let (low, high) = blend_range(yarn, config.theta, dim);
    plain
        .enumerate()
        .map(|(pair, freq)| {
            let ramp = ((pair as f32 - low) / (high - low)).clamp(0.0, 1.0);
            let stretched = freq / yarn.factor as f32;
            stretched * ramp + freq * (1.0 - ramp)
        })
        .collect()
}

/// The pairs between which the blend runs: those that turn `beta_fast` and `beta_slow` times in the original context.
fn blend_range(yarn: &Yarn, theta: f64, dim: usize) -> (f32, f32) {
    let context = yarn.original_max_position_embeddings as f64;
    let pair_turning =
        |turns: f64| dim as f64 * (context / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    (low as f32, high as f32)
}

/// YaRN's temperature as a factor: `0.1 m ln(s) + 1`.
pub(crate) fn mscale(factor: f64, m: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 }
}

/// What cosine and sine are multiplied by.
fn attention_factor(yarn: &Yarn) -> f64 {
    match yarn.attention_factor {
        Some(explicit) => explicit,
        None if yarn.mscale != 0.0 && yarn.mscale_all_dim != 0.0 => {
            mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)
        }
        None => mscale(yarn.factor, 1.0),
    }
}

/// What attention scores are multiplied by beside `(N+R)^-0.5`: `mscale(factor, mscale_all_dim)^2`.
pub(crate) fn score_factor(config: &RopeConfig) -> f64 {
    match &config.scaling {
        Some(yarn) if yarn.mscale_all_dim != 0.0 => mscale(yarn.factor, yarn.mscale_all_dim).powi(2),
        _ => 1.0,
    }
}
