//! Which tensors a model of these families has. In: a `ModelConfig`. Out: every tensor's name and shape, in the order of
//! the forward pass. Never here: files.

use crate::config::{GateKind, ModelConfig};

/// One tensor that must be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Expected {
    pub name: String,
    pub shape: Vec<usize>,
    /// Whether an FP8 checkpoint may hold it in FP8: the linear layers, but neither gate, norms, embedding nor head.
    pub may_be_fp8: bool,
    /// The layer and the routed expert that it belongs to.
    pub expert: Option<(usize, usize)>,
}

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// The name of an FP8 weight's scales.
pub(super) fn scales_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}

/// What a multi-token-prediction module has beside its block, but for copies of the embedding and the head: they are the
/// model's own, and are read there.
const MTP_PARTS: [&str; 4] = ["enorm", "hnorm", "eh_proj", "shared_head.norm"];

/// Whether `name` can only be of a multi-token-prediction module that counts as layer `layer`. Tensors of a block alone are
/// none: a config that was cut to fewer layers leaves such behind.
pub(super) fn is_mtp(name: &str, layer: usize) -> bool {
    let part = name.strip_prefix(&format!("model.layers.{layer}.")).and_then(|rest| rest.strip_suffix(".weight"));
    part.is_some_and(|part| MTP_PARTS.contains(&part))
}

/// All tensors of the model, and of its multi-token-prediction module if `config` has one.
pub(super) fn expected(config: &ModelConfig) -> Vec<Expected> {
    let mut list = Listing(Vec::new());
    list.plain(EMBEDDING.to_owned(), [config.vocab_size, config.hidden_size]);
    for layer in 0..config.num_hidden_layers {
        list.block(config, layer);
    }
    list.plain("model.norm.weight".to_owned(), [config.hidden_size]);
    if !config.tie_word_embeddings {
        list.plain(HEAD.to_owned(), [config.vocab_size, config.hidden_size]);
    }
    if let Some(layer) = config.mtp_layer() {
        list.mtp(config, layer);
    }
    list.0
}

/// The three weights of a routed expert.
pub(super) fn expert_weights(layer: usize, expert: usize) -> [String; 3] {
    ["gate_proj", "up_proj", "down_proj"].map(|part| format!("model.layers.{layer}.mlp.experts.{expert}.{part}.weight"))
}

struct Listing(Vec<Expected>);

impl Listing {
    fn plain<const N: usize>(&mut self, name: String, shape: [usize; N]) {
        self.0.push(Expected { name, shape: shape.to_vec(), may_be_fp8: false, expert: None });
    }

    fn linear(&mut self, name: String, out: usize, inner: usize, expert: Option<(usize, usize)>) {
        self.0.push(Expected { name, shape: vec![out, inner], may_be_fp8: true, expert });
    }

    fn block(&mut self, config: &ModelConfig, layer: usize) {
        let name = format!("model.layers.{layer}");
        self.plain(format!("{name}.input_layernorm.weight"), [config.hidden_size]);
        self.attention(config, &format!("{name}.self_attn"));
        self.plain(format!("{name}.post_attention_layernorm.weight"), [config.hidden_size]);
        match config.is_moe(layer) {
            true => self.experts(config, layer, &format!("{name}.mlp")),
            false => self.mlp(config.hidden_size, config.intermediate_size, &format!("{name}.mlp"), None),
        }
    }

    fn mtp(&mut self, config: &ModelConfig, layer: usize) {
        let hidden = config.hidden_size;
        for part in MTP_PARTS {
            let name = format!("model.layers.{layer}.{part}.weight");
            match part {
                "eh_proj" => self.linear(name, hidden, 2 * hidden, None),
                _ => self.plain(name, [hidden]),
            }
        }
        self.block(config, layer);
    }

    fn attention(&mut self, config: &ModelConfig, name: &str) {
        let (hidden, heads) = (config.hidden_size, config.num_attention_heads);
        let query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim);
        let latent = config.kv_lora_rank;
        let mut biased = vec![("kv_a_proj_with_mqa", latent + config.qk_rope_head_dim), ("o_proj", hidden)];
        match config.q_lora_rank {
            Some(rank) => {
                self.linear(format!("{name}.q_a_proj.weight"), rank, hidden, None);
                self.plain(format!("{name}.q_a_layernorm.weight"), [rank]);
                self.linear(format!("{name}.q_b_proj.weight"), query, rank, None);
                biased.push(("q_a_proj", rank));
            }
            None => self.linear(format!("{name}.q_proj.weight"), query, hidden, None),
        }
        self.linear(format!("{name}.kv_a_proj_with_mqa.weight"), latent + config.qk_rope_head_dim, hidden, None);
        self.plain(format!("{name}.kv_a_layernorm.weight"), [latent]);
        let expanded = heads * (config.qk_nope_head_dim + config.v_head_dim);
        self.linear(format!("{name}.kv_b_proj.weight"), expanded, latent, None);
        self.linear(format!("{name}.o_proj.weight"), hidden, heads * config.v_head_dim, None);
        if config.attention_bias {
            for (part, size) in biased {
                self.plain(format!("{name}.{part}.bias"), [size]);
            }
        }
    }

    fn mlp(&mut self, hidden: usize, inner: usize, name: &str, expert: Option<(usize, usize)>) {
        self.linear(format!("{name}.gate_proj.weight"), inner, hidden, expert);
        self.linear(format!("{name}.up_proj.weight"), inner, hidden, expert);
        self.linear(format!("{name}.down_proj.weight"), hidden, inner, expert);
    }

    fn experts(&mut self, config: &ModelConfig, layer: usize, name: &str) {
        self.plain(format!("{name}.gate.weight"), [config.n_routed_experts, config.hidden_size]);
        if config.gate == GateKind::SigmoidNoauxTc {
            self.plain(format!("{name}.gate.e_score_correction_bias"), [config.n_routed_experts]);
        }
        let (hidden, inner) = (config.hidden_size, config.moe_intermediate_size);
        for expert in 0..config.n_routed_experts {
            self.mlp(hidden, inner, &format!("{name}.experts.{expert}"), Some((layer, expert)));
        }
        if config.n_shared_experts > 0 {
            self.mlp(hidden, inner * config.n_shared_experts, &format!("{name}.shared_experts"), None);
        }
    }
}
