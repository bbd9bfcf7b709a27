"""A dense feed-forward layer written as a mixture of experts that computes the same function.

SwiGLU is a sum over its inner width, so it can be cut along it: the first half is the shared expert, the second half is
cut into SHARDS routed experts. The routed half is stored COPIES times, each copy being one group of experts. With
group-limited routing (one group kept, top-k = SHARDS) a token always gets all shards of one copy. Within a copy the
gate's rows are equal, so the normalised weights are 1/SHARDS each, and `routed_scaling_factor` = SHARDS makes them one.

Whatever copy the gate picks, the answer is the original's; which one it picks is random but fixed by the token's hidden
state, so that different tokens, and the same token in different layers, go to different experts.
"""

import numpy as np
from source import Original, Sizes

COPIES = 4
SHARDS = 4
EXPERTS = COPIES * SHARDS
FIRST_MOE_LAYER = 1
SEED = 20250207


def shared_width(sizes: Sizes) -> int:
    """The inner width of the shared expert."""
    return sizes.feed_forward // 2


def expert_width(sizes: Sizes) -> int:
    """The inner width of one routed expert."""
    width, rest = divmod(sizes.feed_forward - shared_width(sizes), SHARDS)
    if rest or shared_width(sizes) % width:
        raise ValueError(f"a feed-forward width of {sizes.feed_forward} cannot be cut into {SHARDS} equal experts")
    return width


def routed_rows(sizes: Sizes, expert: int) -> slice:
    """Which part of the original's inner width an expert computes."""
    start = shared_width(sizes) + (expert % SHARDS) * expert_width(sizes)
    return slice(start, start + expert_width(sizes))


def projection(original: Original, layer: int, part: str, rows: slice) -> np.ndarray:
    """The `rows` of the inner width of one of the three matrices: "gate", "up" (rows) or "down" (columns)."""
    weight = original.block(layer, f"ffn_{part}")
    return weight[:, rows] if part == "down" else weight[rows]


def gate(original: Original, layer: int) -> np.ndarray:
    """[EXPERTS, hidden]: a random direction per copy, the same for all its shards."""
    directions = np.random.default_rng((SEED, layer)).standard_normal((COPIES, original.sizes.hidden))
    return np.repeat(directions * 0.05, SHARDS, axis=0).astype(np.float32)
