//! A checkpoint small enough to check by hand: weights are made up from a seed, files go out. Layer 0 is dense, layer 1
//! has four experts. The reference expert below is plain loops and knows nothing of the crate under test.

use std::path::Path;

pub(crate) const HIDDEN: usize = 8;
pub(crate) const INNER: usize = 4;
pub(crate) const EXPERTS: usize = 4;
pub(crate) const MOE_LAYER: u32 = 1;

/// What `config.json` of such a model says.
const CONFIG: &str = r#"{
  "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_act": "silu",
  "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "num_hidden_layers": 2,
  "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": null, "kv_lora_rank": 4, "qk_nope_head_dim": 2,
  "qk_rope_head_dim": 2, "v_head_dim": 2, "n_routed_experts": 4, "n_shared_experts": null, "num_experts_per_tok": 2,
  "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
  "scoring_func": "softmax", "norm_topk_prob": false, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true, "torch_dtype": "float32"
}"#;

/// Writes the checkpoint that `seed` makes.
pub(crate) fn write(dir: &Path, seed: u64) {
    std::fs::write(dir.join("config.json"), CONFIG).unwrap();
    let mut header = String::from("{");
    let mut values = Vec::new();
    for (name, shape) in tensors() {
        let tensor = values_of(&name, &shape, seed);
        let (start, end) = (values.len(), values.len() + tensor.len() * 4);
        values.extend(tensor.into_iter().flat_map(f32::to_le_bytes));
        let comma = if start == 0 { "" } else { "," };
        header += &format!(r#"{comma}"{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{start},{end}]}}"#);
    }
    header += "}";
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(values);
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

fn tensors() -> Vec<(String, Vec<usize>)> {
    let mut list = vec![("model.embed_tokens.weight".to_owned(), vec![16, HIDDEN])];
    for layer in 0..2 {
        let mut add =
            |name: &str, shape: &[usize]| list.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        add("input_layernorm", &[HIDDEN]);
        add("self_attn.q_proj", &[8, HIDDEN]);
        add("self_attn.kv_a_proj_with_mqa", &[6, HIDDEN]);
        add("self_attn.kv_a_layernorm", &[4]);
        add("self_attn.kv_b_proj", &[8, 4]);
        add("self_attn.o_proj", &[HIDDEN, 4]);
        add("post_attention_layernorm", &[HIDDEN]);
        let mut mlp = |name: &str, inner: usize| {
            add(&format!("{name}.gate_proj"), &[inner, HIDDEN]);
            add(&format!("{name}.up_proj"), &[inner, HIDDEN]);
            add(&format!("{name}.down_proj"), &[HIDDEN, inner]);
        };
        if layer == MOE_LAYER {
            (0..EXPERTS).for_each(|expert| mlp(&format!("mlp.experts.{expert}"), INNER));
            add("mlp.gate", &[EXPERTS, HIDDEN]);
        } else {
            mlp("mlp", 8);
        }
    }
    list.push(("model.norm.weight".to_owned(), vec![HIDDEN]));
    list
}

/// Values in [-0.5, 0.5) that depend on the seed, the tensor's name and the position.
fn values_of(name: &str, shape: &[usize], seed: u64) -> Vec<f32> {
    let start = name.bytes().fold(seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let next = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some((*state >> 40) as f32 / (1u64 << 24) as f32 - 0.5)
    };
    std::iter::repeat(()).scan(start, |state, ()| next(state)).take(shape.iter().product()).collect()
}

/// `down(silu(gate x) * up x)` of one expert on one row.
pub(crate) fn expert(seed: u64, id: u16, row: &[f32]) -> Vec<f32> {
    let weight = |part: &str, shape: [usize; 2]| {
        values_of(&format!("model.layers.{MOE_LAYER}.mlp.experts.{id}.{part}.weight"), &shape, seed)
    };
    let product = |weight: &[f32], x: &[f32]| -> Vec<f32> {
        weight.chunks_exact(x.len()).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    };
    let gate = product(&weight("gate_proj", [INNER, HIDDEN]), row);
    let up = product(&weight("up_proj", [INNER, HIDDEN]), row);
    let inner: Vec<f32> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
    product(&weight("down_proj", [HIDDEN, INNER]), &inner)
}
