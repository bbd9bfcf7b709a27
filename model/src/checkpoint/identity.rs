//! What tells two checkpoints apart. In: a checked checkpoint. Out: two SHA-256 digests that every process of a cluster
//! must agree on. Never here: a full read of the weights; some are 600 GB.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use super::{Checkpoint, Error};
use crate::config::ModelConfig;

/// Bytes read at each end of a sampled tensor.
const SAMPLE_BYTES: u64 = 64;
/// Tensors whose bytes are sampled, spread evenly over all by name; names, dtypes and shapes always count.
const MAX_SAMPLED: usize = 8192;

/// Two hexadecimal SHA-256 digests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Of what decides the mathematics, however `config.json` spells it.
    pub config_digest: String,
    /// Of every tensor's name, dtype and shape and a bounded sample of the bytes, however they are split into files.
    pub checkpoint_digest: String,
}

impl Checkpoint {
    /// Digests the checkpoint; reads at most 128 bytes of at most 8,192 tensors.
    ///
    /// # Errors
    /// A file cannot be read any more.
    pub fn identity(&self) -> Result<Identity, Error> {
        let config_digest = hex(&Sha256::digest(canonical(&self.config)));
        let mut names: Vec<_> = self.files.tensors.iter().collect();
        names.sort_unstable_by_key(|(name, _)| *name);
        let stride = names.len().div_ceil(MAX_SAMPLED).max(1);
        let mut digest = Sha256::new();
        let mut sample = [0; SAMPLE_BYTES as usize];
        for (position, (name, located)) in names.into_iter().enumerate() {
            digest.update(format!("{name} {} {:?}\n", located.dtype, located.shape));
            if !position.is_multiple_of(stride) {
                continue;
            }
            let length = SAMPLE_BYTES.min(located.bytes);
            let sample = &mut sample[..length as usize];
            for offset in [located.offset, located.offset + located.bytes - length] {
                self.files.shards[located.shard].read_at(sample, offset)?;
                digest.update(&*sample);
            }
        }
        Ok(Identity { config_digest, checkpoint_digest: hex(&digest.finalize()) })
    }
}

/// One `key value` line for each thing that changes what the model computes. Part of the cluster's protocol: a line that
/// changes makes old and new processes strangers.
fn canonical(config: &ModelConfig) -> String {
    let mut text = String::from("conclave model 1\n");
    let mut line = |key: &str, value: &dyn std::fmt::Debug| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{key} {value:?}");
    };
    line("vocab_size", &config.vocab_size);
    line("hidden_size", &config.hidden_size);
    line("intermediate_size", &config.intermediate_size);
    line("moe_intermediate_size", &config.moe_intermediate_size);
    line("num_hidden_layers", &config.num_hidden_layers);
    line("num_attention_heads", &config.num_attention_heads);
    line("q_lora_rank", &config.q_lora_rank);
    line("kv_lora_rank", &config.kv_lora_rank);
    line("qk_nope_head_dim", &config.qk_nope_head_dim);
    line("qk_rope_head_dim", &config.qk_rope_head_dim);
    line("v_head_dim", &config.v_head_dim);
    line("n_routed_experts", &config.n_routed_experts);
    line("n_shared_experts", &config.n_shared_experts);
    line("num_experts_per_tok", &config.num_experts_per_tok);
    line("first_k_dense_replace", &config.first_k_dense_replace);
    line("moe_layer_freq", &config.moe_layer_freq);
    line("gate", &config.gate);
    line("n_group", &config.n_group);
    line("topk_group", &config.topk_group);
    line("norm_topk_prob", &config.norm_topk_prob);
    line("routed_scaling_factor", &config.routed_scaling_factor);
    line("rms_norm_eps", &config.rms_norm_eps);
    line("rope_theta", &config.rope.theta);
    line("rope_interleave", &config.rope.interleaved);
    if let Some(yarn) = &config.rope.scaling {
        line("yarn factor", &yarn.factor);
        line("yarn beta_fast", &yarn.beta_fast);
        line("yarn beta_slow", &yarn.beta_slow);
        line("yarn mscale", &yarn.mscale);
        line("yarn mscale_all_dim", &yarn.mscale_all_dim);
        line("yarn original_max_position_embeddings", &yarn.original_max_position_embeddings);
        line("yarn attention_factor", &yarn.attention_factor);
        line("yarn truncate", &yarn.truncate);
    }
    line("attention_bias", &config.attention_bias);
    line("tie_word_embeddings", &config.tie_word_embeddings);
    text
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
