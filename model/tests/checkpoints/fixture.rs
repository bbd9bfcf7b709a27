//! Writes small checkpoints to spoil. In: nothing, or changes to a `Draft`. Out: a folder. Never here: the crate under
//! test: the tensors' names and shapes are listed a second time, by hand.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

/// One tensor as it will lie in the file.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Draft {
    /// F32 values that differ from element to element.
    pub(crate) fn floats(shape: &[usize], seed: usize) -> Self {
        let values = (0..shape.iter().product()).map(|i| ((i * 7 + seed * 13) % 101) as f32 / 50.0 - 1.0);
        Self { dtype: Dtype::F32, shape: shape.to_vec(), bytes: values.flat_map(f32::to_le_bytes).collect() }
    }

    pub(crate) fn values(&self) -> Vec<f32> {
        self.bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    pub(crate) fn into_bf16(mut self) -> Self {
        self.bytes = self.values().into_iter().flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect();
        self.dtype = Dtype::BF16;
        self
    }
}

/// A checkpoint before it is written.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    pub(crate) config: Value,
    pub(crate) tensors: BTreeMap<String, Draft>,
}

pub(crate) const EXPERTS: usize = 4;

impl Folder {
    /// DeepSeek-V3 with two layers, the first dense, and four experts; all tensors F32.
    pub(crate) fn v3(hidden: usize, moe: usize) -> Self {
        let config = json!({
            "model_type": "deepseek_v3", "hidden_act": "silu", "vocab_size": 16, "hidden_size": hidden,
            "intermediate_size": 12, "moe_intermediate_size": moe, "num_hidden_layers": 2, "num_attention_heads": 2,
            "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
            "n_routed_experts": EXPERTS, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
            "n_group": 2, "topk_group": 1, "max_position_embeddings": 64, "eos_token_id": 1, "rope_theta": 10000.0
        });
        let mut folder = Self { config, tensors: BTreeMap::new() };
        folder.add("model.embed_tokens.weight", &[16, hidden]);
        folder.add("model.norm.weight", &[hidden]);
        folder.add("lm_head.weight", &[16, hidden]);
        folder.attention(0, hidden);
        folder.attention(1, hidden);
        folder.mlp("model.layers.0.mlp", hidden, 12);
        folder.moe(1, hidden, moe);
        folder
    }

    /// [`Folder::small`] with a whole multi-token-prediction module, its own embedding and head included.
    pub(crate) fn small_with_mtp() -> Self {
        let mut folder = Self::small();
        folder.config["num_nextn_predict_layers"] = json!(1);
        folder.attention(2, 8);
        folder.moe(2, 8, 4);
        for (part, shape) in [("enorm", [8].as_slice()), ("hnorm", &[8]), ("eh_proj", &[8, 16])] {
            folder.add(&format!("model.layers.2.{part}.weight"), shape);
        }
        folder.add("model.layers.2.embed_tokens.weight", &[16, 8]);
        folder.add("model.layers.2.shared_head.norm.weight", &[8]);
        folder.add("model.layers.2.shared_head.head.weight", &[16, 8]);
        folder
    }

    pub(crate) fn small() -> Self {
        Self::v3(8, 4)
    }

    fn attention(&mut self, layer: usize, hidden: usize) {
        let name = format!("model.layers.{layer}");
        self.add(&format!("{name}.input_layernorm.weight"), &[hidden]);
        self.add(&format!("{name}.post_attention_layernorm.weight"), &[hidden]);
        self.add(&format!("{name}.self_attn.q_a_proj.weight"), &[6, hidden]);
        self.add(&format!("{name}.self_attn.q_a_layernorm.weight"), &[6]);
        self.add(&format!("{name}.self_attn.q_b_proj.weight"), &[12, 6]);
        self.add(&format!("{name}.self_attn.kv_a_proj_with_mqa.weight"), &[7, hidden]);
        self.add(&format!("{name}.self_attn.kv_a_layernorm.weight"), &[5]);
        self.add(&format!("{name}.self_attn.kv_b_proj.weight"), &[14, 5]);
        self.add(&format!("{name}.self_attn.o_proj.weight"), &[hidden, 6]);
    }

    fn moe(&mut self, layer: usize, hidden: usize, moe: usize) {
        let name = format!("model.layers.{layer}.mlp");
        self.add(&format!("{name}.gate.weight"), &[EXPERTS, hidden]);
        self.add(&format!("{name}.gate.e_score_correction_bias"), &[EXPERTS]);
        self.mlp(&format!("{name}.shared_experts"), hidden, 2 * moe);
        for expert in 0..EXPERTS {
            self.mlp(&format!("{name}.experts.{expert}"), hidden, moe);
        }
    }

    fn mlp(&mut self, name: &str, hidden: usize, inner: usize) {
        self.add(&format!("{name}.gate_proj.weight"), &[inner, hidden]);
        self.add(&format!("{name}.up_proj.weight"), &[inner, hidden]);
        self.add(&format!("{name}.down_proj.weight"), &[hidden, inner]);
    }

    pub(crate) fn add(&mut self, name: &str, shape: &[usize]) {
        let seed = self.tensors.len();
        self.tensors.insert(name.to_owned(), Draft::floats(shape, seed));
    }

    /// Turns every linear layer except the gate into FP8 blocks of 128 × 128 with the given scales' dtype left F32.
    pub(crate) fn in_fp8(mut self) -> Self {
        self.config["quantization_config"] = json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
        });
        let linear = |name: &str| name.contains("_proj") && name.ends_with(".weight");
        let names: Vec<String> = self.tensors.keys().filter(|name| linear(name)).cloned().collect();
        for (seed, name) in names.into_iter().enumerate() {
            let weight = self.tensors.get_mut(&name).unwrap();
            // Codes of all signs and exponents, but no NaN.
            weight.bytes = (0..weight.bytes.len() / 4).map(|i| ((i * 37 + seed) % 251) as u8 & 0xfb).collect();
            weight.dtype = Dtype::F8_E4M3;
            let scales = [weight.shape[0].div_ceil(128), weight.shape[1].div_ceil(128)];
            self.tensors.insert(format!("{name}_scale_inv"), Draft::floats(&scales, seed));
        }
        self
    }

    pub(crate) fn write(&self, dir: &Path) {
        self.write_config(dir);
        std::fs::write(dir.join("model.safetensors"), serialised(self.tensors.iter())).unwrap();
    }

    /// Deals the tensors out over `shards` files, in turn by name, and writes the index.
    pub(crate) fn write_sharded(&self, dir: &Path, shards: usize) {
        self.write_config(dir);
        let mut weight_map = serde_json::Map::new();
        for shard in 0..shards {
            let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
            let part: Vec<_> = self.tensors.iter().skip(shard).step_by(shards).collect();
            weight_map.extend(part.iter().map(|(name, _)| ((*name).clone(), json!(file))));
            std::fs::write(dir.join(file), serialised(part.into_iter())).unwrap();
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }

    fn write_config(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
    }
}

fn serialised<'a>(tensors: impl Iterator<Item = (&'a String, &'a Draft)>) -> Vec<u8> {
    let views = tensors
        .map(|(name, draft)| (name.clone(), TensorView::new(draft.dtype, draft.shape.clone(), &draft.bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}
