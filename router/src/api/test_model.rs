//! A served model for this folder's tests: a folder of tiny files, read as any model's would be.
//!
//! Its tokenizer has one token for each byte (the id is the byte) and `<bos>`, which it puts before a text.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use conclave_model::{
    checkpoint::Identity,
    config::ModelConfig,
    generation::GenerationConfig,
    sampler::SamplingParams,
    tokenizer::{ChatTemplate, Tokenizer},
};
use serde_json::{Value, json};

use super::{Limits, ServedModel};
use crate::sequence::{LogprobRules, StopRules, ValidRequest};

/// Of the token before every text.
pub(super) const BOS: u32 = 256;
/// Tokens of prompt and answer together.
pub(super) const CONTEXT: usize = 64;

/// A router that has room for all of it.
pub(super) const LIMITS: Limits =
    Limits { request_timeout: Duration::from_secs(600), context_tokens: 1 << 20, answers_max: 8 };

const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}\
    {% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\
    {{ message.role[0] }}:{{ message.content }}\n{% endfor %}\
    {% if add_generation_prompt %}a:{% endif %}";

/// Bytes as the vocabulary of a byte-level tokenizer spells them (GPT-2's table): visible ones as themselves, the
/// others as the characters from U+0100 on, in order.
fn spelling(byte: u8) -> char {
    let visible = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if visible(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !visible(other)).count();
    char::from_u32(0x100 + before as u32).expect("far below the surrogates")
}

fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        (0..=255_u8).map(|byte| (spelling(byte).to_string(), json!(byte))).collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [{
            "id": BOS, "content": "<bos>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
        },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [],
        },
    })
}

fn config_json() -> Value {
    json!({
        "model_type": "deepseek_v3", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 32,
        "moe_intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": null,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "max_position_embeddings": CONTEXT, "eos_token_id": 257,
    })
}

/// The tokenizer alone.
pub(super) fn byte_tokenizer() -> Tokenizer {
    served().tokenizer.expect("the folder has one")
}

/// The whole model.
pub(super) fn served() -> ServedModel {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, content: &Value| {
        std::fs::write(dir.path().join(name), content.to_string()).expect("a file in the temporary folder");
    };
    write("config.json", &config_json());
    write("tokenizer.json", &tokenizer_json());
    write("tokenizer_config.json", &json!({"bos_token": "<bos>", "chat_template": CHAT_TEMPLATE}));
    read(dir.path())
}

fn read(dir: &Path) -> ServedModel {
    let config = ModelConfig::load(dir).expect("the config");
    let generation = GenerationConfig::load(dir, config.vocab_size).expect("the generation config");
    ServedModel {
        name: "tiny".to_owned(),
        config,
        identity: Identity { config_digest: "aa".to_owned(), checkpoint_digest: "bb".to_owned() },
        tokenizer: Tokenizer::load(dir).expect("the tokenizer"),
        chat_template: ChatTemplate::load(dir).expect("the template"),
        generation,
    }
}

/// A checked request for so many answers to three tokens, due in an hour.
pub(super) fn request(answers: usize) -> ValidRequest {
    ValidRequest {
        constraint: None,
        request_id: "req-1".into(),
        prompt: vec![1, 2, 3],
        resumed: Vec::new(),
        sampling: SamplingParams::greedy(),
        stop: StopRules { max_tokens: 60, min_tokens: 0, token_ids: Arc::new([]) },
        logprobs: LogprobRules { sampled: true, top: 1, prompt: false },
        answers,
        priority: 0,
        cache_salt: "".into(),
        deadline: Instant::now() + Duration::from_secs(3600),
    }
}
