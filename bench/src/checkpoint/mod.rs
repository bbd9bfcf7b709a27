//! Checkpoints to measure with: a shape comes in, a folder with config and random weights goes out, the same in every run
//! and scaled so that a row which passes through keeps its size. What they answer means nothing. Real shapes decide what
//! is measured: long contexts need DeepSeek-V2-Lite's attention, experts and whole clusters need its layers.

mod file;

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::{Value, json};

use file::{Dtype, Random, Tensor};

/// Rows and columns that share a scale in an FP8 weight.
const BLOCK: usize = 128;
/// Of the weights; another number makes checkpoints in the cache anew.
const VERSION: u32 = 1;

/// How weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weights {
    Bf16,
    /// As DeepSeek-V3 stores them: linear weights in e4m3 with a `weight_scale_inv` per 128 × 128 values, the rest in bf16.
    Fp8,
}

/// DeepSeek-V2's architecture in numbers.
#[derive(Debug)]
struct Shape {
    vocab: usize,
    hidden: usize,
    layers: usize,
    heads: usize,
    latent: usize,
    nope: usize,
    rope: usize,
    value: usize,
    /// Width of the dense layer, which is the first.
    dense: usize,
    experts: usize,
    /// Width of one.
    expert: usize,
    shared: usize,
    /// Chosen per row.
    top: usize,
    context: usize,
}

/// DeepSeek-V2-Lite's layers, but for their number.
const V2_LITE: Shape = Shape {
    vocab: 102_400,
    hidden: 2048,
    layers: 5,
    heads: 16,
    latent: 512,
    nope: 128,
    rope: 64,
    value: 128,
    dense: 10_944,
    experts: 64,
    expert: 1408,
    shared: 2,
    top: 6,
    context: 4096,
};

/// Its attention, so that the cost of contexts is real; layers are few and experts small, so that the rest costs little.
const LONG: Shape =
    Shape { vocab: 1024, layers: 2, dense: 1024, experts: 8, expert: 64, top: 2, context: 20_480, ..V2_LITE };

/// What [`long_context`] writes, for a table.
pub(crate) const LONG_CONTEXT: &str = "random weights, DeepSeek-V2-Lite's attention, 2 layers";
/// What [`v2_lite`] gives, for a table.
pub(crate) const V2_LITE_IS: &str = "random weights, DeepSeek-V2-Lite's layers, 5 of them";

/// Writes `config.json` and `model.safetensors` into `folder`; 80 MB.
pub(crate) fn long_context(folder: &Path) -> anyhow::Result<()> {
    write(folder, &LONG, Weights::Bf16)
}

/// Where checkpoints are kept that take long to make: in the target folder, for the programs of all profiles.
pub(crate) fn kept() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let target = program.parent().and_then(Path::parent).context("programs lie in the folder of a profile")?;
    Ok(target.join("bench-models"))
}

/// The folder of a checkpoint of DeepSeek-V2-Lite's layers, made at the first call and [`kept`]: 5.7 GB in bf16, 3.3 GB in
/// FP8.
pub(crate) fn v2_lite(weights: Weights) -> anyhow::Result<PathBuf> {
    let name = match weights {
        Weights::Bf16 => "v2-lite-bf16",
        Weights::Fp8 => "v2-lite-fp8",
    };
    let folder = kept()?.join(name);
    // Written last, so a folder that was left half-way is not taken for a whole one.
    let (made, by) = (folder.join("made-by"), VERSION.to_string());
    if std::fs::read_to_string(&made).is_ok_and(|version| version == by) {
        return Ok(folder);
    }
    eprintln!("making {} ({V2_LITE_IS}), once", folder.display());
    let _ = std::fs::remove_file(&made);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    write(&folder, &V2_LITE, weights)?;
    std::fs::write(&made, by)?;
    Ok(folder)
}

/// The layer and the number of every routed expert of [`v2_lite`].
pub(crate) fn v2_lite_experts() -> impl Iterator<Item = (u32, u32)> {
    let experts = V2_LITE.experts as u32;
    (1..V2_LITE.layers as u32).flat_map(move |layer| (0..experts).map(move |expert| (layer, expert)))
}

/// Experts that each row of [`v2_lite`] goes to.
pub(crate) const V2_LITE_TOP: usize = V2_LITE.top;

/// D, and the width of one expert.
pub(crate) fn v2_lite_expert() -> (usize, usize) {
    (V2_LITE.hidden, V2_LITE.expert)
}

fn write(folder: &Path, shape: &Shape, weights: Weights) -> anyhow::Result<()> {
    let config = folder.join("config.json");
    std::fs::write(&config, shape.config(weights).to_string())
        .with_context(|| format!("cannot write {}", config.display()))?;
    let file = folder.join("model.safetensors");
    let tensors = shape.tensors(weights);
    file::write(&file, &tensors, &mut Random::new()).with_context(|| format!("cannot write {}", file.display()))
}

impl Shape {
    fn config(&self, weights: Weights) -> Value {
        let mut config = json!({
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "dtype": "bfloat16",
            "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
            "vocab_size": self.vocab, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "q_lora_rank": null,
            "kv_lora_rank": self.latent, "qk_nope_head_dim": self.nope, "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value, "intermediate_size": self.dense, "first_k_dense_replace": 1,
            "moe_intermediate_size": self.expert, "n_routed_experts": self.experts, "n_shared_experts": self.shared,
            "num_experts_per_tok": self.top, "topk_method": "greedy", "scoring_func": "softmax", "n_group": 1,
            "topk_group": 1, "norm_topk_prob": false, "routed_scaling_factor": 1.0, "hidden_act": "silu",
            "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": self.context,
            "tie_word_embeddings": false,
        });
        if weights == Weights::Fp8 {
            config["quantization_config"] = json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
            });
        }
        config
    }

    /// Every tensor by its official name.
    fn tensors(&self, weights: Weights) -> Vec<Tensor> {
        let mut tensors = Tensors { weights, all: Vec::new() };
        let hidden = self.hidden;
        tensors.plain("model.embed_tokens", &[self.vocab, hidden]);
        tensors.plain("model.norm", &[hidden]);
        tensors.plain("lm_head", &[self.vocab, hidden]);
        for layer in 0..self.layers {
            let layer_name = format!("model.layers.{layer}");
            tensors.plain(&format!("{layer_name}.input_layernorm"), &[hidden]);
            tensors.plain(&format!("{layer_name}.post_attention_layernorm"), &[hidden]);
            let attention = format!("{layer_name}.self_attn");
            tensors.linear(&format!("{attention}.q_proj"), [self.heads * (self.nope + self.rope), hidden]);
            tensors.linear(&format!("{attention}.kv_a_proj_with_mqa"), [self.latent + self.rope, hidden]);
            tensors.plain(&format!("{attention}.kv_a_layernorm"), &[self.latent]);
            tensors.linear(&format!("{attention}.kv_b_proj"), [self.heads * (self.nope + self.value), self.latent]);
            tensors.linear(&format!("{attention}.o_proj"), [hidden, self.heads * self.value]);
            let mut networks = vec![(format!("{layer_name}.mlp"), self.dense)];
            if layer > 0 {
                tensors.plain(&format!("{layer_name}.mlp.gate"), &[self.experts, hidden]);
                let name = |expert| format!("{layer_name}.mlp.experts.{expert}");
                networks = (0..self.experts).map(|expert| (name(expert), self.expert)).collect();
                networks.push((format!("{layer_name}.mlp.shared_experts"), self.shared * self.expert));
            }
            for (network, inner) in networks {
                tensors.linear(&format!("{network}.gate_proj"), [inner, hidden]);
                tensors.linear(&format!("{network}.up_proj"), [inner, hidden]);
                tensors.linear(&format!("{network}.down_proj"), [hidden, inner]);
            }
        }
        tensors.all
    }
}

/// Collects them.
struct Tensors {
    weights: Weights,
    all: Vec<Tensor>,
}

impl Tensors {
    /// In bf16 whatever the format: ones for a norm, random otherwise.
    fn plain(&mut self, name: &str, shape: &[usize]) {
        self.all.push(Tensor { name: format!("{name}.weight"), shape: shape.to_vec(), dtype: Dtype::Bf16 });
    }

    /// With its scales, where the format has them.
    fn linear(&mut self, name: &str, [out, inner]: [usize; 2]) {
        if self.weights == Weights::Bf16 {
            return self.plain(name, &[out, inner]);
        }
        self.all.push(Tensor { name: format!("{name}.weight"), shape: vec![out, inner], dtype: Dtype::E4m3 });
        self.all.push(Tensor {
            name: format!("{name}.weight_scale_inv"),
            shape: vec![out.div_ceil(BLOCK), inner.div_ceil(BLOCK)],
            dtype: Dtype::Scales { inner },
        });
    }
}

#[cfg(test)]
mod tests {
    use conclave_model::checkpoint::Checkpoint;
    use conclave_model::device::{Compute, Device, Dtype, Numerics, init_thread};
    use conclave_model::expert::Expert;
    use conclave_model::hidden::Hidden;

    use super::*;

    #[test]
    fn what_is_written_is_a_whole_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        long_context(folder.path()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let config = checkpoint.config();
        assert_eq!(
            (config.kv_lora_rank, config.num_attention_heads, config.q_lora_rank),
            (LONG.latent, LONG.heads, None)
        );
        assert_eq!(config.max_position_embeddings, LONG.context);
        assert_eq!(config.moe_layers().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn an_expert_of_either_format_keeps_a_row_within_sight_of_its_size() {
        init_thread(1);
        let compute = Compute { device: Device::Cpu, dtype: Dtype::Bf16, numerics: Numerics::Fast };
        for weights in [Weights::Bf16, Weights::Fp8] {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &LONG, weights).unwrap();
            let expert = Expert::load(&Checkpoint::open(folder.path()).unwrap(), 1, 3, compute).unwrap();
            let row: Vec<f32> = (0..LONG.hidden).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
            let out = expert.forward(&Hidden::from_rows(&row, LONG.hidden, compute)).unwrap().to_rows();
            let size = (out.iter().map(|value| value * value).sum::<f32>() / out.len() as f32).sqrt();
            assert!((0.05..2.0).contains(&size), "{weights:?}: {size}");
        }
    }
}
