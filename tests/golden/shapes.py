"""The shapes of the golden checkpoints: each a family's architecture with every size made tiny.

What makes a family special is kept (its gate, its rope, its spelling of config.json, its storage); sizes are chosen so
that mistakes show: heads, groups and experts all differ in number, and rope and latent widths differ from each other.
"""

from dataclasses import dataclass
from typing import Any

VOCAB = 160
EOS = 1


@dataclass(frozen=True)
class Shape:
    """One golden checkpoint. `config` holds the arguments of the reference's configuration class."""

    name: str
    reference: str
    """Configuration family in transformers: "v2" or "v3"."""
    config: dict[str, Any]
    storage: str = "bf16"
    """How linear weights are stored: f32, f16, bf16, or fp8 (e4m3 with one scale per 128x128 block)."""
    official: dict[str, Any] | None = None
    """Keys which only the official config.json carries; None: written by transformers in its own spelling."""
    shard_bytes: int | None = None
    bias: tuple[float, float] = (0.0, 0.0)
    """Range of e_score_correction_bias."""
    latent_gain: float = 1.0
    """Small: the latents' variance comes near their norm's epsilon, so a wrong epsilon shows in the logits."""
    residual_gain: float | None = None
    """Of what attention and feed-forward networks add to the residual stream. Small: what follows a token is decided by
    that token, nearly; so a draft can be right."""
    with_mtp: bool = False
    """Adds a multi-token-prediction module that is often right, and the answers expected of it."""
    stray_mtp_tensors: bool = False
    """Adds tensors of a multi-token-prediction layer that config.json does not speak of; a reader leaves them alone."""
    drop: tuple[str, ...] = ()
    """Keys that this family's official config.json does not have."""


def yarn(factor: float, original: int, mscale: float, beta_fast: int = 32, theta: float = 1e4) -> dict[str, Any]:
    """Arguments for YaRN as the official files spell it; `mscale` is written for both of its keys."""
    scaling = {
        "type": "yarn",
        "factor": factor,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": original,
    }
    return {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": int(factor * original)}


def sizes(**more: Any) -> dict[str, Any]:
    """What most shapes share; a shape overrides what it needs otherwise."""
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 88,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 40,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "first_k_dense_replace": 1,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    return shared | more


def v3_sizes(**more: Any) -> dict[str, Any]:
    """What the shapes of DeepSeek-V3 share."""
    shared = {
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    return sizes() | shared | yarn(40, 64, 1.0) | more


# Keys of the published files that the reference does not know; readers may rely on them.
COMMON_OFFICIAL = {"aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1, "seq_aux": True}
NOAUX = COMMON_OFFICIAL | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}

SHAPES = [
    Shape(
        "v2_lite",
        "v2",
        sizes(
            q_lora_rank=None,
            moe_intermediate_size=20,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=1,
            topk_group=1,
            topk_method="greedy",
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            **yarn(40, 64, 0.707),
        ),
        storage="f32",
    ),
    Shape(
        "v2",
        "v2",
        sizes(
            n_routed_experts=20,
            n_shared_experts=2,
            num_experts_per_tok=4,
            n_group=5,
            topk_group=2,
            topk_method="group_limited_greedy",
            norm_topk_prob=False,
            routed_scaling_factor=4.0,
            qk_rope_head_dim=16,
            **yarn(40, 1024, 0.707, beta_fast=8),
        ),
        official=COMMON_OFFICIAL | {"scoring_func": "softmax"},
        shard_bytes=160_000,
    ),
    Shape(
        "v3",
        "v3",
        v3_sizes(
            num_hidden_layers=4,
            first_k_dense_replace=2,
            intermediate_size=72,
            moe_intermediate_size=16,
            n_routed_experts=16,
            num_experts_per_tok=4,
            num_nextn_predict_layers=1,
        ),
        storage="f32",
        shard_bytes=250_000,
        bias=(0.02, 0.3),
    ),
    Shape(
        "v3_fp8",
        "v3",
        # No size is a multiple of a block's 128, and most matrices have a second, partial block.
        v3_sizes(
            hidden_size=144,
            intermediate_size=200,
            moe_intermediate_size=56,
            q_lora_rank=72,
            kv_lora_rank=48,
            n_routed_experts=8,
            num_nextn_predict_layers=0,
        ),
        storage="fp8",
        official=NOAUX,
        # Every selection score is below zero: masking with 0 instead of minus infinity would pick masked experts.
        bias=(-1.4, -1.1),
        stray_mtp_tensors=True,
    ),
    Shape(
        "v3_aligned",
        "v3",
        # Sizes as round as published ones are: what a GPU's kernels take at once goes into them, so they compute this one.
        v3_sizes(
            hidden_size=128,
            intermediate_size=192,
            moe_intermediate_size=48,
            num_attention_heads=5,
            num_key_value_heads=5,
            q_lora_rank=64,
            kv_lora_rank=64,
            qk_rope_head_dim=16,
            v_head_dim=24,
            n_routed_experts=9,
            n_group=3,
            num_nextn_predict_layers=0,
        ),
        storage="fp8",
        official=NOAUX,
        bias=(0.02, 0.3),
    ),
    Shape(
        "v3_mtp",
        "v3",
        # The module's layer has experts of its own, as many as the others, and counts as layer 2.
        v3_sizes(
            num_hidden_layers=2,
            n_routed_experts=12,
            num_nextn_predict_layers=1,
        ),
        official=NOAUX,
        shard_bytes=200_000,
        bias=(0.02, 0.3),
        residual_gain=0.1,
        with_mtp=True,
    ),
    Shape(
        "moonlight",
        "v3",
        sizes(
            q_lora_rank=None,
            n_routed_experts=16,
            n_shared_experts=2,
            num_experts_per_tok=5,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.446,
            rms_norm_eps=1e-5,
            rope_theta=5e4,
            rope_scaling=None,
            max_position_embeddings=8192,
            num_nextn_predict_layers=0,
        ),
        official=NOAUX,
        drop=("rope_scaling",),
        bias=(0.02, 0.3),
        latent_gain=0.01,
    ),
    Shape(
        "kimi_k2",
        "v3",
        sizes(
            n_routed_experts=24,
            n_shared_experts=1,
            num_experts_per_tok=5,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.827,
            rms_norm_eps=1e-5,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_nextn_predict_layers=0,
            **yarn(32, 64, 1.0, beta_fast=1, theta=5e4),
        ),
        storage="f16",
        official=NOAUX | {"model_type": "kimi_k2"},
        bias=(0.02, 0.3),
        latent_gain=0.01,
    ),
    Shape(
        "v3_tied",
        "v3",
        # What the families' big checkpoints do not have but the format allows: tied embeddings, a list of ends.
        sizes(
            tie_word_embeddings=True,
            eos_token_id=[EOS, EOS + 1],
            n_routed_experts=6,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            num_hidden_layers=2,
            rope_theta=1e4,
            rope_scaling=None,
            max_position_embeddings=512,
            num_nextn_predict_layers=0,
        ),
        bias=(-0.05, 0.05),
    ),
]
