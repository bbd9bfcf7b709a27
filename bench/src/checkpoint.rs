//! A checkpoint to measure long contexts with: a folder comes in, config and random weights are written into it.
//! Attention has the shape of DeepSeek-V2-Lite's, so its cost is real; layers are few and experts small, so that the
//! rest costs little. What it answers means nothing.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::json;

/// What it is, for a table.
pub(crate) const WHAT: &str = "random weights, DeepSeek-V2-Lite's attention, 2 layers";

const VOCAB: usize = 1024;
const HIDDEN: usize = 2048;
const LAYERS: usize = 2;
const HEADS: usize = 16;
const LATENT: usize = 512;
const NOPE: usize = 128;
const ROPE: usize = 64;
const VALUE: usize = 128;
/// Width of the dense layer, which is the first.
const DENSE: usize = 1024;
const EXPERTS: usize = 8;
const EXPERT: usize = 64;
const SHARED: usize = 2;
const CONTEXT: usize = 20_480;

/// Writes `config.json` and `model.safetensors` into `folder`; 80 MB, the same in every run.
pub(crate) fn write(folder: &Path) -> anyhow::Result<()> {
    let config = json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "dtype": "bfloat16",
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": null, "kv_lora_rank": LATENT,
        "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE,
        "intermediate_size": DENSE, "first_k_dense_replace": 1, "moe_intermediate_size": EXPERT,
        "n_routed_experts": EXPERTS, "n_shared_experts": SHARED, "num_experts_per_tok": 2,
        "topk_method": "greedy", "scoring_func": "softmax", "n_group": 1, "topk_group": 1,
        "norm_topk_prob": false, "routed_scaling_factor": 1.0, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0, "max_position_embeddings": CONTEXT, "tie_word_embeddings": false,
    });
    let file = folder.join("config.json");
    std::fs::write(&file, config.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
    let mut random = StdRng::seed_from_u64(0);
    let shapes = shapes();
    let values: Vec<Vec<u8>> = shapes.values().map(|shape| draw(shape, &mut random)).collect();
    let tensors = shapes.iter().zip(&values).map(|((name, shape), bytes)| {
        let tensor = TensorView::new(Dtype::BF16, shape.clone(), bytes);
        tensor.map(|tensor| (name.as_str(), tensor)).with_context(|| name.clone())
    });
    let tensors: Vec<_> = tensors.collect::<anyhow::Result<_>>()?;
    let file = folder.join("model.safetensors");
    serialize_to_file(tensors, None, &file).with_context(|| format!("cannot write {}", file.display()))
}

/// Every tensor by its official name.
fn shapes() -> BTreeMap<String, Vec<usize>> {
    let mut shapes = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| {
        shapes.insert(format!("{name}.weight"), shape.to_vec());
    };
    add("model.embed_tokens".to_owned(), &[VOCAB, HIDDEN]);
    add("model.norm".to_owned(), &[HIDDEN]);
    add("lm_head".to_owned(), &[VOCAB, HIDDEN]);
    for layer in 0..LAYERS {
        let layer_name = format!("model.layers.{layer}");
        add(format!("{layer_name}.input_layernorm"), &[HIDDEN]);
        add(format!("{layer_name}.post_attention_layernorm"), &[HIDDEN]);
        let attention = format!("{layer_name}.self_attn");
        add(format!("{attention}.q_proj"), &[HEADS * (NOPE + ROPE), HIDDEN]);
        add(format!("{attention}.kv_a_proj_with_mqa"), &[LATENT + ROPE, HIDDEN]);
        add(format!("{attention}.kv_a_layernorm"), &[LATENT]);
        add(format!("{attention}.kv_b_proj"), &[HEADS * (NOPE + VALUE), LATENT]);
        add(format!("{attention}.o_proj"), &[HIDDEN, HEADS * VALUE]);
        let mut networks = vec![(format!("{layer_name}.mlp"), DENSE)];
        if layer > 0 {
            add(format!("{layer_name}.mlp.gate"), &[EXPERTS, HIDDEN]);
            networks = (0..EXPERTS).map(|expert| (format!("{layer_name}.mlp.experts.{expert}"), EXPERT)).collect();
            networks.push((format!("{layer_name}.mlp.shared_experts"), SHARED * EXPERT));
        }
        for (network, inner) in networks {
            add(format!("{network}.gate_proj"), &[inner, HIDDEN]);
            add(format!("{network}.up_proj"), &[inner, HIDDEN]);
            add(format!("{network}.down_proj"), &[HIDDEN, inner]);
        }
    }
    shapes
}

/// bf16, little-endian: ones for a norm, else uniform numbers that keep the variance of a row that passes through.
fn draw(shape: &[usize], random: &mut StdRng) -> Vec<u8> {
    let count = shape.iter().product();
    let mut values = Vec::with_capacity(2 * count);
    let bound = match shape {
        [_, inner] => (3.0 / *inner as f32).sqrt(),
        _ => 0.0,
    };
    for _ in 0..count {
        let value = if bound > 0.0 { random.random_range(-bound..bound) } else { 1.0 };
        values.extend_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
    values
}

#[cfg(test)]
mod tests {
    use conclave_model::checkpoint::Checkpoint;

    use super::*;

    #[test]
    fn what_is_written_is_a_whole_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let config = checkpoint.config();
        assert_eq!((config.kv_lora_rank, config.num_attention_heads, config.q_lora_rank), (LATENT, HEADS, None));
        assert_eq!(config.max_position_embeddings, CONTEXT);
        assert_eq!(config.moe_layers().collect::<Vec<_>>(), [1]);
    }
}
