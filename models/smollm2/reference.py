"""Forward passes of the original and of the converted model in numpy, for the test that compares them.

Both are written from the architectures' definitions and share nothing but elementary functions: the original as a Llama
with grouped-query attention, the converted one as DeepSeek-V3 with a gate, experts and latent attention. The whole
sequence is computed at once; there is no cache.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from checkpoint import Reader
from source import Original

LATENT_EPSILON = 1e-6
"""The epsilon of the norm of the latent, whatever config.json says."""


def rms_norm(rows: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """Root-mean-square normalisation of each row."""
    return rows / np.sqrt((rows * rows).mean(-1, keepdims=True) + epsilon) * weight


def swiglu(rows: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """down(silu(gate(rows)) * up(rows))."""
    opened = rows @ gate.T
    return (opened / (1 + np.exp(-opened)) * (rows @ up.T)) @ down.T


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rotate_pairs(rows: np.ndarray, theta: float) -> np.ndarray:
    """RoPE on side-by-side pairs; `rows` is [tokens, heads, width]."""
    width = rows.shape[-1]
    frequencies = theta ** (-np.arange(0, width, 2) / width)
    angles = (np.arange(len(rows))[:, None] * frequencies)[:, None, :]
    even, odd = rows[..., 0::2], rows[..., 1::2]
    turned = np.empty_like(rows)
    turned[..., 0::2] = even * np.cos(angles) - odd * np.sin(angles)
    turned[..., 1::2] = odd * np.cos(angles) + even * np.sin(angles)
    return turned


def attend(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Causal attention; all are [tokens, heads, width], and so is what comes back, its heads side by side."""
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    future = np.triu(np.ones(scores.shape[-2:], bool), 1)
    weights = softmax(np.where(future, -np.inf, scores))
    return np.einsum("hqk,khd->qhd", weights, value).reshape(len(query), -1)


def original_logits(model: Original, tokens: list[int]) -> np.ndarray:
    """[tokens, vocab]: the original model."""
    sizes = model.sizes
    embedding = model.tensor("token_embd.weight")
    hidden = embedding[tokens]
    for layer in range(sizes.layers):
        rows = rms_norm(hidden, model.block(layer, "attn_norm"), sizes.norm_epsilon)
        query, key, value = (
            (rows @ model.block(layer, f"attn_{part}").T).reshape(len(tokens), -1, sizes.head_dim) for part in "qkv"
        )
        query, key = rotate_pairs(query, sizes.rope_theta), rotate_pairs(key, sizes.rope_theta)
        shared_by = sizes.heads // sizes.kv_heads
        mixed = attend(query, key.repeat(shared_by, 1), value.repeat(shared_by, 1))
        hidden = hidden + mixed @ model.block(layer, "attn_output").T
        rows = rms_norm(hidden, model.block(layer, "ffn_norm"), sizes.norm_epsilon)
        hidden = hidden + swiglu(rows, *(model.block(layer, f"ffn_{part}") for part in ("gate", "up", "down")))
    return rms_norm(hidden, model.tensor("output_norm.weight"), sizes.norm_epsilon) @ embedding.T


@dataclass
class Converted:
    """The converted checkpoint of a folder."""

    folder: Path
    rows_per_copy: Counter = field(default_factory=Counter)
    """How many rows went to each (layer, group of experts) so far."""

    def __post_init__(self) -> None:
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        self._reader = Reader(self.folder / "model.safetensors")

    def tensor(self, name: str) -> np.ndarray:
        """The tensor `model.NAME.weight`."""
        return self._reader.tensor(f"model.{name}.weight")

    def mlp(self, rows: np.ndarray, prefix: str) -> np.ndarray:
        """One dense SwiGLU or one expert."""
        return swiglu(rows, *(self.tensor(f"{prefix}{part}_proj") for part in ("gate", "up", "down")))

    def attention(self, rows: np.ndarray, layer: int) -> np.ndarray:
        """Latent attention, written out per head."""
        config, prefix, count = self.config, f"layers.{layer}.self_attn.", len(rows)
        heads, nope, latent = config["num_attention_heads"], config["qk_nope_head_dim"], config["kv_lora_rank"]
        query = (rows @ self.tensor(f"{prefix}q_proj").T).reshape(count, heads, -1)
        compressed = rows @ self.tensor(f"{prefix}kv_a_proj_with_mqa").T
        latents = rms_norm(compressed[:, :latent], self.tensor(f"{prefix}kv_a_layernorm"), LATENT_EPSILON)
        expanded = (latents @ self.tensor(f"{prefix}kv_b_proj").T).reshape(count, heads, -1)
        theta = config["rope_theta"]
        shared_key = rotate_pairs(compressed[:, None, latent:], theta).repeat(heads, 1)
        key = np.concatenate([expanded[..., :nope], shared_key], -1)
        query = np.concatenate([query[..., :nope], rotate_pairs(query[..., nope:], theta)], -1)
        return attend(query, key, expanded[..., nope:]) @ self.tensor(f"{prefix}o_proj").T

    def experts(self, rows: np.ndarray, layer: int) -> np.ndarray:
        """Group-limited routing, routed experts and the shared one."""
        config, prefix = self.config, f"layers.{layer}.mlp."
        chosen, weights = self.choose(rows, layer)
        answer = self.mlp(rows, f"{prefix}shared_experts.")
        for expert in range(config["n_routed_experts"]):
            row, place = np.nonzero(chosen == expert)
            if len(row):
                answer[row] += weights[row, place, None] * self.mlp(rows[row], f"{prefix}experts.{expert}.")
        return answer

    def choose(self, rows: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The experts of each row and their weights, both [rows, top-k]."""
        config, prefix = self.config, f"layers.{layer}.mlp.gate"
        scores = 1 / (1 + np.exp(-(rows @ self.tensor(prefix).T)))
        selection = scores + self._reader.tensor(f"model.{prefix}.e_score_correction_bias")
        groups = selection.reshape(len(rows), config["n_group"], -1)
        strength = np.sort(groups, -1)[..., -2:].sum(-1)
        kept = np.argsort(-strength, -1)[:, : config["topk_group"]]
        self.rows_per_copy.update((layer, int(group)) for group in kept.ravel())
        mask = np.full(strength.shape, -np.inf)
        np.put_along_axis(mask, kept, 0.0, -1)
        masked = (groups + mask[..., None]).reshape(selection.shape)
        chosen = np.argsort(-masked, -1)[:, : config["num_experts_per_tok"]]
        weights = np.take_along_axis(scores, chosen, -1)
        return chosen, weights / weights.sum(-1, keepdims=True) * config["routed_scaling_factor"]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[tokens, vocab]: the converted model."""
        config, epsilon = self.config, self.config["rms_norm_eps"]
        embedding = self.tensor("embed_tokens")
        hidden = embedding[tokens]
        for layer in range(config["num_hidden_layers"]):
            prefix = f"layers.{layer}."
            rows = rms_norm(hidden, self.tensor(f"{prefix}input_layernorm"), epsilon)
            hidden = hidden + self.attention(rows, layer)
            rows = rms_norm(hidden, self.tensor(f"{prefix}post_attention_layernorm"), epsilon)
            dense = layer < config["first_k_dense_replace"]
            hidden = hidden + (self.mlp(rows, f"{prefix}mlp.") if dense else self.experts(rows, layer))
        return rms_norm(hidden, self.tensor("norm"), epsilon) @ embedding.T
