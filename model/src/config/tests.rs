//! The published files of every family, in both spellings, and what bad values get.

use serde_json::{Value, json};

use super::*;

fn parse(config: &Value) -> Result<ModelConfig, Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    ModelConfig::load(dir.path())
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(mut config: Value, keys: &[&str]) -> Value {
    for key in keys {
        config.as_object_mut().unwrap().remove(*key);
    }
    config
}

fn v2_lite() -> Value {
    let published = r#"{
        "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
        "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
        "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 102400
    }"#;
    serde_json::from_str(published).unwrap()
}

fn v3() -> Value {
    let published = r#"{
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280
    }"#;
    serde_json::from_str(published).unwrap()
}

fn kimi_k2() -> Value {
    with(
        v3(),
        json!({
            "model_type": "kimi_k2", "num_attention_heads": 64, "n_routed_experts": 384, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "vocab_size": 163840, "bos_token_id": 163584,
            "eos_token_id": 163585, "num_nextn_predict_layers": 0, "rope_theta": 50000.0,
            "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn"}
        }),
    )
}

/// As `transformers` 5 saves DeepSeek-V3 without quantisation.
fn v3_resaved() -> Value {
    let left_out = ["rope_theta", "rope_scaling", "torch_dtype", "scoring_func", "topk_method", "moe_layer_freq"];
    with(
        without(without(v3(), &left_out), &["quantization_config"]),
        json!({
            "dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192, "rope_interleave": true,
            "rope_parameters": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_type": "yarn", "type": "yarn"}
        }),
    )
}

#[test]
fn v2_lite_loads() {
    let config = parse(&v2_lite()).unwrap();
    assert_eq!((config.family, config.gate), (Family::DeepseekV2, GateKind::SoftmaxGreedy));
    assert_eq!((config.q_lora_rank, config.n_group, config.dtype), (None, 1, Some(tch::Kind::BFloat16)));
    assert_eq!(config.rope.scaling.unwrap().mscale, 0.707);
    assert_eq!((config.eos_token_ids.as_slice(), config.bos_token_id), (&[100_001][..], Some(100_000)));
    assert_eq!(config.moe_layers().collect::<Vec<_>>(), (1..27).collect::<Vec<_>>());
}

#[test]
fn v3_and_its_resaved_form_are_the_same_model() {
    let (published, resaved) = (parse(&v3()).unwrap(), parse(&v3_resaved()).unwrap());
    assert_eq!(published.quantization, Some(Fp8Blocks { rows: 128, cols: 128 }));
    assert_eq!(published.gate, GateKind::SigmoidNoauxTc);
    assert_eq!(ModelConfig { quantization: None, ..published }, resaved);
}

#[test]
fn v2_moonlight_and_kimi_k2_load() {
    let v2 = with(
        v2_lite(),
        json!({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "n_routed_experts": 160,
            "q_lora_rank": 1536, "routed_scaling_factor": 16.0}),
    );
    assert_eq!(parse(&v2).unwrap().gate, GateKind::SoftmaxGroupLimitedGreedy);
    let moonlight = with(
        without(v3(), &["quantization_config", "rope_scaling"]),
        json!({"q_lora_rank": null, "n_group": 1, "topk_group": 1, "rope_theta": 50000.0, "rms_norm_eps": 1e-05}),
    );
    let moonlight = parse(&moonlight).unwrap();
    assert_eq!((moonlight.rope.scaling, moonlight.rope.theta), (None, 50_000.0));
    assert_eq!((moonlight.rms_norm_eps, moonlight.qk_norm_eps), (1e-5, 1e-6));
    let kimi = parse(&kimi_k2()).unwrap();
    assert_eq!((kimi.family, kimi.n_routed_experts), (Family::KimiK2, 384));
}

#[test]
fn what_v2_as_resaved_leaves_out_is_the_softmax_gate() {
    let config = without(v2_lite(), &["scoring_func", "topk_method", "norm_topk_prob"]);
    let config = parse(&with(config, json!({"n_group": null, "topk_group": null}))).unwrap();
    assert_eq!((config.gate, config.norm_topk_prob, config.n_group), (GateKind::SoftmaxGreedy, false, 1));
}

#[test]
fn several_end_tokens_and_ids_outside_the_vocabulary() {
    let config = parse(&with(v3(), json!({"eos_token_id": [1, 5, 200_000], "bos_token_id": null}))).unwrap();
    assert_eq!((config.eos_token_ids.as_slice(), config.bos_token_id), (&[1, 5][..], None));
}

#[test]
fn every_bad_value_gets_one_error_that_names_file_key_and_range() {
    let scaling = v3()["rope_scaling"].clone();
    let quantization = v3()["quantization_config"].clone();
    let cases = [
        (json!({"hidden_size": 0}), "hidden_size is 0, out of range: 1 to"),
        (json!({"hidden_size": -1}), "hidden_size is -1, out of range"),
        (json!({"hidden_size": 1e99}), "hidden_size is 1e+99, expected a whole number"),
        (json!({"hidden_size": "7168"}), "hidden_size is \"7168\", expected a whole number"),
        (json!({"vocab_size": null}), "vocab_size is missing"),
        (json!({"num_hidden_layers": 5000}), "num_hidden_layers is 5000, out of range: 1 to 1023"),
        (json!({"n_routed_experts": 65537}), "n_routed_experts is 65537, out of range"),
        (json!({"num_experts_per_tok": 257}), "num_experts_per_tok is 257, out of range: 1 to 256"),
        (json!({"num_experts_per_tok": 129}), "num_experts_per_tok is 129, out of range: 1 to 128"),
        (json!({"n_group": 7}), "n_group is 7, out of range: a divisor of n_routed_experts = 256"),
        (json!({"n_group": 256}), "n_group is 256, out of range: at most"),
        (json!({"topk_group": 9}), "topk_group is 9, out of range: 1 to n_group = 8"),
        (json!({"first_k_dense_replace": 62}), "first_k_dense_replace is 62, out of range: 0 to 61"),
        (json!({"qk_rope_head_dim": 63}), "qk_rope_head_dim is 63, out of range: an even number"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps is 0.0, out of range"),
        (json!({"rope_theta": 0}), "rope_theta is 0, out of range"),
        (json!({"norm_topk_prob": 1}), "norm_topk_prob is 1, expected true or false"),
        (json!({"hidden_act": "gelu"}), "hidden_act = gelu is not supported; supported: \"silu\""),
        (json!({"scoring_func": "sqrtsoftplus"}), "scoring_func = sqrtsoftplus is not supported"),
        (json!({"topk_method": "greedy"}), "topk_method = greedy is not supported"),
        (
            json!({"model_type": "llama"}),
            "model_type \"llama\" is not supported; supported: deepseek_v2, deepseek_v3, kimi_k2",
        ),
        (json!({"rope_scaling": with(scaling.clone(), json!({"type": "linear"}))}), "rope_scaling.type = linear"),
        (json!({"rope_scaling": with(scaling, json!({"factor": 0.5}))}), "rope_scaling.factor is 0.5, out of range"),
        (
            json!({"quantization_config": {"quant_method": "awq"}}),
            "quantization_config.quant_method = awq is not supported",
        ),
        (
            json!({"quantization_config": with(quantization.clone(), json!({"fmt": "e5m2"}))}),
            "quantization_config.fmt = e5m2 is not supported; supported: e4m3",
        ),
        (
            json!({"quantization_config": with(quantization, json!({"weight_block_size": [32, 32]}))}),
            "quantization_config.weight_block_size = [32, 32] is not supported; supported: [128, 128]",
        ),
    ];
    for (change, expected) in cases {
        let message = parse(&with(v3(), change)).unwrap_err().to_string();
        assert!(message.contains("config.json: ") && message.contains(expected), "{message}\nshould say {expected}");
    }
}

#[test]
fn a_file_that_is_no_config_is_refused() {
    for text in ["", "[]", "{", "\u{0}", "{\"model_type\": 3}"] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        assert!(ModelConfig::load(dir.path()).unwrap_err().to_string().contains("config.json"));
    }
    let nowhere = ModelConfig::load(Path::new("/nowhere")).unwrap_err();
    assert!(matches!(nowhere, Error::Io { .. }), "{nowhere}");
}
