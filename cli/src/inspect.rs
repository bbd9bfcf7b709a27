//! `conclave checkpoint inspect`: a model folder comes in, what it would take to serve it goes out. Headers are read and
//! checked as a server would; weights are not.

use std::path::PathBuf;
use std::process::ExitCode;

use conclave_model::checkpoint::Checkpoint;
use conclave_model::config::ModelConfig;
use serde::Serialize;

use crate::terminal::{self, Output};

/// Family, sizes, experts, and bytes per worker.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  conclave checkpoint inspect models/smollm2/build/smollm2-moe
  conclave checkpoint inspect DIR --workers 16 --json")]
pub(crate) struct Args {
    /// The checkpoint folder.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// Share the routed experts among this many workers.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=65536))]
    workers: u32,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let checkpoint = Checkpoint::open(&args.folder)?;
    let report = Report::of(&checkpoint, args.workers)?;
    let mut output = Output::stdout();
    if args.json {
        output.line(&serde_json::to_string_pretty(&report)?)?;
    } else {
        output.text(&report.text())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What is printed; the keys are a contract with scripts. Bytes are those of the files.
#[derive(Debug, Serialize)]
struct Report {
    family: String,
    config_digest: String,
    checkpoint_digest: String,
    layers: usize,
    dense_layers: usize,
    moe_layers: usize,
    /// The layer of multi-token prediction, which comes after the others; none where the files do not hold it.
    mtp_layer: Option<usize>,
    hidden_size: usize,
    vocab_size: usize,
    context_tokens: usize,
    attention_heads: usize,
    kv_lora_rank: usize,
    routed_experts: usize,
    experts_per_token: usize,
    shared_experts: usize,
    expert_groups: usize,
    moe_intermediate_size: usize,
    dtype: String,
    quantization: Option<String>,
    parameters: u64,
    parameters_per_token: u64,
    total_bytes: u64,
    expert_bytes: u64,
    routed_bytes: u64,
    router_bytes: u64,
    workers: u32,
    experts_per_worker_max: u64,
    bytes_per_worker_max: u64,
}

impl Report {
    fn of(checkpoint: &Checkpoint, workers: u32) -> anyhow::Result<Self> {
        let config = checkpoint.config();
        let identity = checkpoint.identity()?;
        let moe_layers = own_moe_layers(config);
        let experts = config.moe_layers().count() as u64 * config.n_routed_experts as u64;
        let expert_bytes = checkpoint.expert_bytes();
        let total_bytes = checkpoint.tensor_bytes();
        let routed_bytes = experts * expert_bytes;
        let experts_per_worker_max = experts.div_ceil(u64::from(workers));
        let parameters = Parameters::of(config);
        Ok(Self {
            family: config.family.to_string(),
            config_digest: identity.config_digest,
            checkpoint_digest: identity.checkpoint_digest,
            layers: config.num_hidden_layers,
            dense_layers: config.num_hidden_layers - moe_layers,
            moe_layers,
            mtp_layer: config.mtp_layer(),
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
            context_tokens: config.max_position_embeddings,
            attention_heads: config.num_attention_heads,
            kv_lora_rank: config.kv_lora_rank,
            routed_experts: config.n_routed_experts,
            experts_per_token: config.num_experts_per_tok,
            shared_experts: config.n_shared_experts,
            expert_groups: config.n_group,
            moe_intermediate_size: config.moe_intermediate_size,
            dtype: dtype(config),
            quantization: config.quantization.map(|blocks| format!("fp8 e4m3, {}x{} blocks", blocks.rows, blocks.cols)),
            parameters: parameters.total,
            parameters_per_token: parameters.per_token,
            total_bytes,
            expert_bytes,
            routed_bytes,
            router_bytes: total_bytes.saturating_sub(routed_bytes),
            workers,
            experts_per_worker_max,
            bytes_per_worker_max: experts_per_worker_max * expert_bytes,
        })
    }

    fn text(&self) -> String {
        let weights = match &self.quantization {
            Some(quantization) => format!("{}, {quantization}", self.dtype),
            None => self.dtype.clone(),
        };
        let per_token = format!("{} per token", terminal::count(self.parameters_per_token));
        let rows = [
            ("family", self.family.clone()),
            ("layers", format!("{} ({} dense, {} with experts)", self.layers, self.dense_layers, self.moe_layers)),
            (
                "  token prediction",
                self.mtp_layer.map_or_else(|| "none".to_owned(), |layer| format!("layer {layer}, experts of its own")),
            ),
            (
                "sizes",
                format!(
                    "hidden {}, vocabulary {}, context {}, {} heads, latent {}",
                    self.hidden_size, self.vocab_size, self.context_tokens, self.attention_heads, self.kv_lora_rank
                ),
            ),
            (
                "experts",
                format!(
                    "{} routed in {}, {} per token, {} shared, width {}",
                    self.routed_experts,
                    terminal::plural(self.expert_groups, "group"),
                    self.experts_per_token,
                    self.shared_experts,
                    self.moe_intermediate_size
                ),
            ),
            ("weights", weights),
            ("parameters", format!("{}, {per_token}", terminal::count(self.parameters))),
            ("bytes", terminal::bytes(self.total_bytes)),
            (
                "  routed experts",
                format!("{}, {} each", terminal::bytes(self.routed_bytes), terminal::bytes(self.expert_bytes)),
            ),
            ("  router's part", terminal::bytes(self.router_bytes)),
            (
                "  per worker",
                format!(
                    "{} with {}, {} experts at most",
                    terminal::bytes(self.bytes_per_worker_max),
                    terminal::plural(self.workers as usize, "worker"),
                    self.experts_per_worker_max
                ),
            ),
            ("checkpoint digest", self.checkpoint_digest.clone()),
        ];
        terminal::table(&rows.map(|(key, value)| vec![key.to_owned(), value]))
    }
}

/// The decoder's layers with experts, that of multi-token prediction not included.
fn own_moe_layers(config: &ModelConfig) -> usize {
    (0..config.num_hidden_layers).filter(|&layer| config.is_moe(layer)).count()
}

/// What `config.json` says the weights are.
fn dtype(config: &ModelConfig) -> String {
    let name = config.dtype.map(|kind| format!("{kind:?}"));
    match name.as_deref() {
        Some("Float") => "f32".to_owned(),
        Some("BFloat16") => "bf16".to_owned(),
        Some("Half") => "f16".to_owned(),
        Some(other) => other.to_lowercase(),
        None => "not stated".to_owned(),
    }
}

/// Weights by count, as model cards count them: FP8 scales and multi-token prediction not included.
struct Parameters {
    total: u64,
    /// Those that one token meets.
    per_token: u64,
}

impl Parameters {
    fn of(config: &ModelConfig) -> Self {
        let of = |size: usize| size as u64;
        let hidden = of(config.hidden_size);
        let heads = of(config.num_attention_heads);
        let (nope, rope) = (of(config.qk_nope_head_dim), of(config.qk_rope_head_dim));
        let (value, latent) = (of(config.v_head_dim), of(config.kv_lora_rank));
        let query = heads * (nope + rope);
        let queries = match config.q_lora_rank {
            Some(rank) => of(rank) * (hidden + 1 + query),
            None => hidden * query,
        };
        let keys_and_values = hidden * (latent + rope) + latent + latent * heads * (nope + value);
        let attention = queries + keys_and_values + heads * value * hidden + 2 * hidden;
        let expert = 3 * hidden * of(config.moe_intermediate_size);
        let experts = of(config.n_routed_experts);
        let bias = u64::from(config.gate == conclave_model::config::GateKind::SigmoidNoauxTc);
        let gate = experts * (hidden + bias);
        let moe_layers = of(own_moe_layers(config));
        let dense_layers = of(config.num_hidden_layers) - moe_layers;
        let embedding = of(config.vocab_size) * hidden;
        let head = if config.tie_word_embeddings { 0 } else { embedding };
        let outside_experts = embedding
            + head
            + hidden
            + of(config.num_hidden_layers) * attention
            + dense_layers * 3 * hidden * of(config.intermediate_size)
            + moe_layers * (gate + of(config.n_shared_experts) * expert);
        Self {
            total: outside_experts + moe_layers * experts * expert,
            per_token: outside_experts + moe_layers * of(config.num_experts_per_tok) * expert,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ModelConfig {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), json).unwrap();
        ModelConfig::load(folder.path()).unwrap()
    }

    /// DeepSeek-V2-Lite's published sizes; its model card says 15.7 B, 2.4 B of them per token.
    #[test]
    fn parameters_are_those_of_the_published_model() {
        let parameters = Parameters::of(&config(
            r#"{"model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
                "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": null,
                "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
                "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
                "topk_method": "greedy", "scoring_func": "softmax", "max_position_embeddings": 4096}"#,
        ));
        assert_eq!(parameters.total, 15_706_484_224);
        assert_eq!(parameters.per_token / 100_000_000, 26);
    }

    #[test]
    fn a_folder_without_a_config_is_one_clear_line() {
        let folder = tempfile::tempdir().unwrap();
        let args = Args { folder: folder.path().to_owned(), workers: 4, json: false };
        let error = run(&args).unwrap_err();
        let line = format!("{error:#}");
        assert!(line.contains("config.json") && !line.contains('\n'), "{line}");
    }
}
