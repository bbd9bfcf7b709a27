//! How positions are encoded. In: `rope_theta` and `rope_scaling` (as published) or `rope_parameters` (as `transformers`
//! 5 saves them). Out: a `RopeConfig`. Never here: frequencies, angles.

use super::{Error, Fields};

/// Rotary position embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// The base of the frequencies.
    pub theta: f64,
    pub scaling: Option<Yarn>,
    /// Whether a pair is (2i, 2i+1), as in all published models, rather than (i, i + dim/2).
    pub interleaved: bool,
}

/// YaRN (arXiv 2309.00071) as `transformers` reads it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    /// Rotations over the original context above which a frequency is kept as it is; 32 when left out.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor` fully; 1 when left out. May equal `beta_fast` (Kimi-K2).
    pub beta_slow: f64,
    /// 0 when left out.
    pub mscale: f64,
    /// 0 when left out: the softmax scale is then not changed.
    pub mscale_all_dim: f64,
    pub original_max_position_embeddings: usize,
    /// Replaces the factor on cosine and sine. When `None` it is m(`mscale`)/m(`mscale_all_dim`) if neither is 0, else
    /// m(1), where m(s) = 0.1 s ln(`factor`) + 1.
    pub attention_factor: Option<f64>,
    /// Whether the two bounds of the ramp are rounded outwards; true when left out.
    pub truncate: bool,
}

pub(super) fn parse(fields: &Fields<'_>, max_position_embeddings: usize, v2: bool) -> Result<RopeConfig, Error> {
    let scaling = match fields.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let inner_theta = scaling.as_ref().map(|scaling| theta(scaling)).transpose()?.flatten();
    let outer_theta = theta(fields)?;
    let scaling = scaling.map(|scaling| parse_scaling(&scaling, max_position_embeddings)).transpose()?.flatten();
    Ok(RopeConfig {
        theta: inner_theta.or(outer_theta).unwrap_or(10_000.0),
        scaling,
        // V2's reference has no such key and always interleaves.
        interleaved: v2 || fields.boolean("rope_interleave")?.unwrap_or(true),
    })
}

fn theta(fields: &Fields<'_>) -> Result<Option<f64>, Error> {
    fields.number("rope_theta", 1.0 + 1e-6..=1e12)
}

fn parse_scaling(fields: &Fields<'_>, max_position_embeddings: usize) -> Result<Option<Yarn>, Error> {
    let key = if fields.value("rope_type").is_some() { "rope_type" } else { "type" };
    if let Some(part) = fields.number("partial_rotary_factor", 0.0..=1.0)?
        && part != 1.0
    {
        return Err(fields.unsupported("partial_rotary_factor", &part.to_string(), "1"));
    }
    match fields.string(key)?.unwrap_or("default") {
        "default" => return Ok(None),
        "yarn" => {}
        other => return Err(fields.unsupported(key, other, "yarn, default")),
    }
    let original =
        fields.size(&["original_max_position_embeddings"], 1..=super::MAX_CONTEXT)?.unwrap_or(max_position_embeddings);
    let beta = |key: &str, otherwise: f64| {
        // 0 counts as left out, as in the reference.
        let given = fields.number(key, 0.0..=1e6)?.filter(|&beta| beta > 0.0);
        Ok::<f64, Error>(given.unwrap_or(otherwise))
    };
    Ok(Some(Yarn {
        factor: fields
            .number("factor", 1.0..=1e6)?
            .unwrap_or(max_position_embeddings as f64 / original as f64)
            .max(1.0),
        beta_fast: beta("beta_fast", 32.0)?,
        beta_slow: beta("beta_slow", 1.0)?,
        mscale: fields.number("mscale", 0.0..=1e3)?.unwrap_or(0.0),
        mscale_all_dim: fields.number("mscale_all_dim", 0.0..=1e3)?.unwrap_or(0.0),
        original_max_position_embeddings: original,
        attention_factor: fields.number("attention_factor", 0.0..=1e6)?,
        truncate: fields.boolean("truncate")?.unwrap_or(true),
    }))
}
