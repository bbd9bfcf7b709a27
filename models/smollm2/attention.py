"""Grouped-query attention written as multi-head latent attention.

The latent is the normalised input itself: `kv_a_proj` starts with the identity and `kv_lora_rank` is the hidden size.
RMSNorm of something that was RMS-normalised just before changes nothing, so `kv_a_layernorm` (weights one) is a no-op,
and `kv_b_proj` makes the values from the latent exactly as `v_proj` made them from the input. For this the weight of
`input_layernorm` is folded into q, k and v, and the norm itself keeps ones.

Latent attention has one rotary key for all heads, the original has one per group. They share: the rotary key is
`kv_heads` times as wide, pair `kv_heads * j + g` of it carries pair j of group g, and a query has zeros in the pairs of
the other groups. The frequency of pair i of n pairs is theta^(-i/n); group 0 gets exactly its own frequencies, group g
those of a text stretched by theta^(-g/n) (0.89 and 0.79 here): the one inexact step of the attention.

A query is then `nope + rope` wide instead of `head_dim`, and the softmax scale with it; q is multiplied by the root of
the ratio, which is exactly 2 here. There is no unrotated part in the original: those rows are zero.
"""

from dataclasses import dataclass

import numpy as np
from source import Original, Sizes


@dataclass(frozen=True)
class LatentShape:
    """The widths of the converted attention."""

    latent: int
    nope: int
    rope: int
    value: int

    @staticmethod
    def of(sizes: Sizes) -> "LatentShape":
        """The widths that hold the original's attention."""
        return LatentShape(sizes.hidden, sizes.head_dim, sizes.head_dim * sizes.kv_heads, sizes.head_dim)

    @property
    def query(self) -> int:
        """The width of one head's query."""
        return self.nope + self.rope


def rotary_places(sizes: Sizes, group: int) -> np.ndarray:
    """Where the dimensions of a group's key lie in the shared one.

    GGUF files and DeepSeek both keep the two halves of a rotated pair side by side.
    """
    dimension = np.arange(sizes.head_dim)
    return 2 * (sizes.kv_heads * (dimension // 2) + group) + dimension % 2


def folded(original: Original, layer: int, part: str) -> np.ndarray:
    """A projection [heads, head_dim, hidden] with the input norm's weight folded into it."""
    weight = original.block(layer, part) * original.block(layer, "attn_norm")
    return weight.reshape(-1, original.sizes.head_dim, original.sizes.hidden)


def q_proj(original: Original, layer: int) -> np.ndarray:
    """[heads * (nope + rope), hidden]."""
    sizes, shape = original.sizes, LatentShape.of(original.sizes)
    query = folded(original, layer, "attn_q") * np.sqrt(shape.query / sizes.head_dim)
    placed = np.zeros((sizes.heads, shape.query, sizes.hidden), np.float32)
    for head in range(sizes.heads):
        group = head // (sizes.heads // sizes.kv_heads)
        placed[head, shape.nope + rotary_places(sizes, group)] = query[head]
    return placed.reshape(-1, sizes.hidden)


def kv_a_proj(original: Original, layer: int) -> np.ndarray:
    """[latent + rope, hidden]: the identity, then the shared rotary key."""
    sizes, shape = original.sizes, LatentShape.of(original.sizes)
    key = folded(original, layer, "attn_k")
    shared = np.zeros((shape.rope, sizes.hidden), np.float32)
    for group in range(sizes.kv_heads):
        shared[rotary_places(sizes, group)] = key[group]
    return np.concatenate([np.eye(shape.latent, dtype=np.float32), shared])


def kv_b_proj(original: Original, layer: int) -> np.ndarray:
    """[heads * (nope + value), latent]: zeros for the unrotated key, then the values of the head's group."""
    sizes, shape = original.sizes, LatentShape.of(original.sizes)
    value = folded(original, layer, "attn_v")
    placed = np.zeros((sizes.heads, shape.nope + shape.value, shape.latent), np.float32)
    for head in range(sizes.heads):
        placed[head, shape.nope :] = value[head // (sizes.heads // sizes.kv_heads)]
    return placed.reshape(-1, shape.latent)
