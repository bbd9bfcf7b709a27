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
    transfer::placed,
};

/// The frequencies of one model.
#[derive(Debug)]
pub(crate) struct Rope {
    /// Per pair, `[R/2]`.
    inv_freq: Vec<f32>,
    /// On cosine and sine.
    attention_factor: f32,
    /// Pairs are (2i, 2i+1); otherwise (i, i + R/2).
    interleaved: bool,
    device: Device,
}

/// What turns some rows' pairs: cosine and sine of their positions' angles, f32 `[T, 1, R/2, 2]`.
#[derive(Debug)]
pub(crate) struct Angles {
    turns: Tensor,
    interleaved: bool,
}

/// The same as values, for rows on the processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowAngles<'a> {
    /// `[T, R/2]`
    turns: &'a [[f32; 2]],
    interleaved: bool,
}

impl Rope {
    pub(crate) fn new(config: &RopeConfig, dim: usize, device: Device) -> Self {
        Self {
            inv_freq: inverse_frequencies(config, dim),
            attention_factor: config.scaling.as_ref().map_or(1.0, attention_factor) as f32,
            interleaved: config.interleaved,
            device,
        }
    }

    /// Angles of rows at `positions`; the same bits on every device.
    pub(crate) fn angles(&self, positions: &[i64]) -> Angles {
        // One by one: libtorch takes whole vectors by one cosine and the values left over by another.
        let row = |position: &i64| {
            let position = *position as f32;
            self.inv_freq.iter().flat_map(move |freq| {
                let (sin, cos) = (position * freq).sin_cos();
                [cos * self.attention_factor, sin * self.attention_factor]
            })
        };
        let values: Vec<f32> = positions.iter().flat_map(row).collect();
        let turns = placed(&values, self.device).view([positions.len() as i64, 1, self.inv_freq.len() as i64, 2]);
        Angles { turns, interleaved: self.interleaved }
    }
}

impl Angles {
    /// Panics where they are on a GPU.
    pub(crate) fn rows(&self) -> RowAngles<'_> {
        RowAngles { turns: tensor::f32s(&self.turns).as_chunks().0, interleaved: self.interleaved }
    }

    /// f32 `[T, 1, R/2, 2]`, and whether pairs are (2i, 2i+1); otherwise (i, i + R/2).
    pub(crate) fn turns(&self) -> (&Tensor, bool) {
        (&self.turns, self.interleaved)
    }

    /// Rotates `x: [T, heads, R]`, on any device: each pair is a complex number, turned by another.
    pub(crate) fn rotate(&self, x: &Tensor) -> Tensor {
        let size = x.size();
        let half = size[2] / 2;
        let turned =
            |pairs: Tensor| (pairs.contiguous().view_as_complex() * self.turns.view_as_complex()).view_as_real();
        let x32 = x.to_kind(Kind::Float);
        let rotated = if self.interleaved {
            turned(x32.reshape([size[0], size[1], half, 2]))
        } else {
            turned(x32.reshape([size[0], size[1], 2, half]).transpose(2, 3)).transpose(2, 3)
        };
        rotated.reshape(size.as_slice()).to_kind(x.kind())
    }
}

impl RowAngles<'_> {
    /// Rotates one head's `[R]` of row `row`, in place.
    pub(crate) fn rotate(self, row: usize, x: &mut [f32]) {
        let half = x.len() / 2;
        for (pair, [cos, sin]) in self.turns[row * half..][..half].iter().enumerate() {
            let (first, second) = if self.interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + half) };
            let (a, b) = (x[first], x[second]);
            (x[first], x[second]) = (a * cos - b * sin, a * sin + b * cos);
        }
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
