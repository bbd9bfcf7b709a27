//! What `config.json` says of a model. In: a model folder whose `config.json` is written either as the models' authors
//! publish it or as `transformers` 5 saves it. Out: one `ModelConfig` with every value checked, or one error that names
//! the file, the key and what is allowed. Never here: tensors, defaults that differ from the reference implementation,
//! or a value that is passed on unread.

mod error;
mod fields;
mod gate;
mod rope;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;

pub use error::Error;
pub(crate) use fields::{Fields, read_object, read_text};
pub use gate::GateKind;
pub use rope::{RopeConfig, Yarn};

/// The `model_type`s that can be served.
pub const MODEL_TYPES: [&str; 3] = ["deepseek_v2", "deepseek_v3", "kimi_k2"];

/// What a model family decides where a file leaves a key out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// DeepSeek-V2 and V2-Lite: softmax gate.
    DeepseekV2,
    /// DeepSeek-V3, R1, V3.1, Moonlight: sigmoid gate with a selection bias.
    DeepseekV3,
    /// Kimi-K2: DeepSeek-V3's mathematics under another `model_type`.
    KimiK2,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::DeepseekV2 => "deepseek_v2",
            Family::DeepseekV3 => "deepseek_v3",
            Family::KimiK2 => "kimi_k2",
        })
    }
}

/// Block sizes of an FP8 checkpoint: one `weight_scale_inv` per `rows` × `cols` block of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fp8Blocks {
    pub rows: usize,
    pub cols: usize,
}

/// A model's architecture, under `config.json`'s own names. Sizes are element counts and are at least 1 unless said
/// otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    /// Width of the dense layers' feed-forward network.
    pub intermediate_size: usize,
    /// Width of one routed expert, and of one shared expert.
    pub moe_intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// `None`: queries come from one `q_proj` (V2-Lite, Moonlight).
    pub q_lora_rank: Option<usize>,
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    /// Even.
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    pub n_routed_experts: usize,
    /// 0 = none. Several are one feed-forward network of `n_shared_experts * moe_intermediate_size`.
    pub n_shared_experts: usize,
    pub num_experts_per_tok: usize,
    /// The first layers, which are dense; at most `num_hidden_layers`.
    pub first_k_dense_replace: usize,
    pub moe_layer_freq: usize,
    /// 1 when the gate has no groups.
    pub n_group: usize,
    /// At most `n_group`.
    pub topk_group: usize,
    pub gate: GateKind,
    pub norm_topk_prob: bool,
    pub routed_scaling_factor: f64,
    pub rms_norm_eps: f64,
    /// Of `q_a_layernorm` and `kv_a_layernorm`: 1e-6 whatever `rms_norm_eps` says, as both DeepSeek's own inference code
    /// and `transformers` build these two norms with the default.
    pub qk_norm_eps: f64,
    pub rope: RopeConfig,
    pub max_position_embeddings: usize,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
    pub attention_bias: bool,
    pub tie_word_embeddings: bool,
    /// Multi-token-prediction modules that the file says it has, of which the first is used. An open checkpoint's config
    /// says 0 where the files hold none: `transformers` writes 1 without them.
    pub num_nextn_predict_layers: usize,
    pub quantization: Option<Fp8Blocks>,
    /// Ids within the vocabulary; empty when the file names none.
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    /// The dtype that the file says its weights have; what a tensor really has is in its own header.
    pub dtype: Option<tch::Kind>,
}

/// No dimension of a model of these families comes near it, and products of three stay below 2^63.
const MAX_SIZE: usize = 1 << 20;
/// One layer of multi-token prediction comes on top.
const MAX_LAYERS: usize = (1 << 10) - 1;
/// Expert ids travel as u16.
const MAX_EXPERTS: usize = 1 << 16;
const MAX_CONTEXT: usize = 1 << 31;

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// The file is missing, too large or no JSON object; a key is missing, of the wrong type or out of range; or it asks
    /// for something that is not supported (another `model_type`, quantisation, activation, MLP biases, RoPE type).
    pub fn load(dir: &Path) -> Result<Self, Error> {
        let file = dir.join("config.json");
        let object = read_object(&file)?;
        Self::parse(&Fields::new(&file, &object))
    }

    fn parse(fields: &Fields<'_>) -> Result<Self, Error> {
        let family = parse_family(fields)?;
        refuse_unsupported(fields)?;
        let v2 = family == Family::DeepseekV2;
        let size = |key: &str| fields.required_size(&[key], 1..=MAX_SIZE);
        let num_hidden_layers = fields.required_size(&["num_hidden_layers"], 1..=MAX_LAYERS)?;
        let vocab_size = fields.required_size(&["vocab_size"], 1..=1 << 24)?;
        let max_position_embeddings = fields.required_size(&["max_position_embeddings"], 1..=MAX_CONTEXT)?;
        let experts = ["n_routed_experts", "num_experts", "num_local_experts"];
        let n_routed_experts = fields.required_size(&experts, 1..=MAX_EXPERTS)?;
        // Absent is what the reference classes take for absent; null is none.
        let or_absent = |key: &str, absent: usize| if fields.has(key) { None } else { Some(absent) };
        let config =
            Self {
                family,
                vocab_size,
                hidden_size: size("hidden_size")?,
                intermediate_size: size("intermediate_size")?,
                moe_intermediate_size: size("moe_intermediate_size")?,
                num_hidden_layers,
                num_attention_heads: fields.required_size(&["num_attention_heads"], 1..=1 << 14)?,
                // V2-Lite and Moonlight write null.
                q_lora_rank: fields.size(&["q_lora_rank"], 1..=MAX_SIZE)?.or(or_absent("q_lora_rank", 1536)),
                kv_lora_rank: size("kv_lora_rank")?,
                qk_nope_head_dim: fields.required_size(&["qk_nope_head_dim"], 1..=1 << 14)?,
                qk_rope_head_dim: fields.required_even("qk_rope_head_dim", 2..=1 << 14)?,
                v_head_dim: fields.required_size(&["v_head_dim"], 1..=1 << 14)?,
                n_routed_experts,
                n_shared_experts: fields
                    .size(&["n_shared_experts"], 0..=1024)?
                    .or(or_absent("n_shared_experts", if v2 { 2 } else { 1 }))
                    .unwrap_or(0),
                num_experts_per_tok: fields.required_size(&["num_experts_per_tok"], 1..=n_routed_experts)?,
                first_k_dense_replace: fields
                    .size(&["first_k_dense_replace"], 0..=num_hidden_layers)?
                    .unwrap_or(if v2 { 0 } else { 3.min(num_hidden_layers) }),
                moe_layer_freq: fields.size(&["moe_layer_freq"], 1..=MAX_LAYERS)?.unwrap_or(1),
                n_group: fields
                    .size(&["n_group"], 1..=n_routed_experts)?
                    .or(or_absent("n_group", if v2 { 1 } else { 8 }))
                    .unwrap_or(1),
                topk_group: fields
                    .size(&["topk_group"], 1..=n_routed_experts)?
                    .or(or_absent("topk_group", if v2 { 1 } else { 4 }))
                    .unwrap_or(1),
                gate: gate::parse(fields, family)?,
                norm_topk_prob: fields.boolean("norm_topk_prob")?.unwrap_or(!v2),
                routed_scaling_factor: fields.number("routed_scaling_factor", 1e-6..=1e6)?.unwrap_or(if v2 {
                    1.0
                } else {
                    2.5
                }),
                rms_norm_eps: fields.number("rms_norm_eps", 1e-20..=1e-1)?.unwrap_or(1e-6),
                qk_norm_eps: 1e-6,
                rope: rope::parse(fields, max_position_embeddings, v2)?,
                max_position_embeddings,
                attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
                tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
                num_nextn_predict_layers: fields
                    .size(&["num_nextn_predict_layers", "num_mtp_layers"], 0..=MAX_LAYERS)?
                    .unwrap_or(0),
                quantization: parse_quantization(fields)?,
                eos_token_ids: fields.token_ids("eos_token_id", vocab_size)?,
                bos_token_id: fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
                dtype: parse_dtype(fields)?,
            };
        gate::check_groups(fields, &config)?;
        Ok(config)
    }

    /// The layer that multi-token prediction counts as: the first after the model's own.
    pub fn mtp_layer(&self) -> Option<usize> {
        (self.num_nextn_predict_layers > 0).then_some(self.num_hidden_layers)
    }

    /// The model's own layers and that of multi-token prediction.
    pub fn layers(&self) -> usize {
        self.mtp_layer().map_or(self.num_hidden_layers, |layer| layer + 1)
    }

    /// Whether layer `layer` sends its rows to routed experts; the others are dense. As DeepSeek's own model code has it.
    pub fn is_moe(&self, layer: usize) -> bool {
        (self.first_k_dense_replace..self.layers()).contains(&layer) && layer.is_multiple_of(self.moe_layer_freq)
    }

    /// The layers with routed experts, ascending; that of multi-token prediction is the last of them.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers()).filter(|&layer| self.is_moe(layer))
    }
}

fn parse_family(fields: &Fields<'_>) -> Result<Family, Error> {
    match fields.required_string("model_type")? {
        "deepseek_v2" => Ok(Family::DeepseekV2),
        "deepseek_v3" => Ok(Family::DeepseekV3),
        "kimi_k2" => Ok(Family::KimiK2),
        other => Err(Error::UnknownModelType {
            file: fields.file(),
            model_type: other.chars().take(64).collect(),
            supported: MODEL_TYPES.join(", "),
        }),
    }
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), Error> {
    if let Some(activation) = fields.string("hidden_act")?
        && activation != "silu"
    {
        return Err(fields.unsupported("hidden_act", activation, "\"silu\""));
    }
    match fields.boolean("mlp_bias")? {
        Some(true) => Err(fields.unsupported("mlp_bias", "true", "false")),
        _ => Ok(()),
    }
}

/// Only DeepSeek's own FP8 form: e4m3 weights with one F32 scale per block of 128 × 128.
fn parse_quantization(fields: &Fields<'_>) -> Result<Option<Fp8Blocks>, Error> {
    let Some(quantization) = fields.object("quantization_config")? else {
        return Ok(None);
    };
    let expect = |key: &str, supported: &[&str], otherwise: &'static str| {
        let value = quantization.string(key)?.unwrap_or(otherwise);
        match supported.contains(&value) {
            true => Ok(()),
            false => Err(quantization.unsupported(key, value, &supported.join(", "))),
        }
    };
    expect("quant_method", &["fp8"], "none given")?;
    expect("fmt", &["e4m3"], "e4m3")?;
    expect("activation_scheme", &["dynamic"], "dynamic")?;
    expect("expert_dtype", &["fp8"], "fp8")?;
    match quantization.sizes("weight_block_size")?.as_deref() {
        Some([128, 128]) => Ok(Some(Fp8Blocks { rows: 128, cols: 128 })),
        Some(other) => Err(quantization.unsupported("weight_block_size", &format!("{other:?}"), "[128, 128]")),
        None => Err(quantization.unsupported("weight_block_size", "null", "[128, 128]")),
    }
}

fn parse_dtype(fields: &Fields<'_>) -> Result<Option<tch::Kind>, Error> {
    let name = match fields.string("dtype")? {
        Some(name) => Some(name),
        None => fields.string("torch_dtype")?,
    };
    Ok(name.and_then(|name| match name.trim_start_matches("torch.") {
        "float32" => Some(tch::Kind::Float),
        "bfloat16" => Some(tch::Kind::BFloat16),
        "float16" => Some(tch::Kind::Half),
        _ => None,
    }))
}
