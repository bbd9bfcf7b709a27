//! What is served here, for `GetModel`.
//!
//! In: the served model. Out: its description. Never here: anything about the cluster.

use conclave_proto::inference::v1 as pb;

use super::{ServedModel, validate::Bounds};

pub(super) fn describe(model: &ServedModel, bounds: &Bounds) -> pb::GetModelResponse {
    let config = &model.config;
    // Every size was bounded far below u32::MAX when the config was read.
    let narrow = |size: usize| u32::try_from(size).unwrap_or(u32::MAX);
    pb::GetModelResponse {
        name: model.name.clone(),
        family: config.family.to_string(),
        context_tokens: narrow(bounds.context_tokens),
        vocab_size: narrow(config.vocab_size),
        layers: narrow(config.num_hidden_layers),
        // The decoder's own: multi-token prediction is not the client's business.
        moe_layers: narrow((0..config.num_hidden_layers).filter(|&layer| config.is_moe(layer)).count()),
        routed_experts: narrow(config.n_routed_experts),
        experts_per_token: narrow(config.num_experts_per_tok),
        eos_token_ids: bounds.eos_token_ids.clone(),
        has_chat_template: model.tokenizer.is_some() && model.chat_template.is_some(),
        config_digest: model.identity.config_digest.clone(),
        checkpoint_digest: model.identity.checkpoint_digest.clone(),
    }
}
