"""Random weights for golden checkpoints, and the forms they are stored in.

The scales are chosen so that every part matters to the logits (attention is sharp enough for a wrong rotation to show,
gates are spread, norms have weights other than one) and yet rounding is not blown up on its way through the layers.
"""

import math

import torch
from shapes import Shape

BLOCK = 128
FP8_MAX = 448.0
GAIN = 1.2
HEAD_GAIN = 2.0
# Of the noise that eh_proj adds to the embedding it lets through, and of what it makes of the hidden state.
DRAFT_NOISE = 0.1
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
NOT_QUANTISED = ("norm.weight", "layernorm.weight", "embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")


def draw(name: str, size: list[int], shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """A random f32 tensor of `size` for the tensor `name` of the official layout."""
    if name.endswith("e_score_correction_bias"):
        low, high = shape.bias
        return low + (high - low) * torch.rand(size, generator=generator)
    noise = torch.randn(size, generator=generator)
    if name.endswith("norm.weight"):
        return 1.0 + 0.2 * noise
    if name.endswith("embed_tokens.weight"):
        # Where it is the output's matrix too, it has that one's scale.
        return noise * (HEAD_GAIN / math.sqrt(size[1]) if shape.config["tie_word_embeddings"] else 1.0)
    return noise * gain(name, size[0], shape) / math.sqrt(size[1])


def gain(name: str, rows: int, shape: Shape) -> float | torch.Tensor:
    """The standard deviation of a linear layer's output, for an input of deviation one; a tensor: one for each row."""
    if "lm_head" in name:
        return HEAD_GAIN
    if shape.residual_gain is not None and ("o_proj" in name or "down_proj" in name):
        return shape.residual_gain
    if "q_a_proj" in name:
        return shape.latent_gain
    if "kv_a_proj" in name:
        gains = torch.full((rows, 1), GAIN)
        gains[: shape.config["kv_lora_rank"]] = shape.latent_gain
        return gains
    return GAIN


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 e4m3 with one f32 scale per 128x128 block, blocks at the edges partial; weight = stored * scale."""
    rows, columns = weight.shape
    scales = torch.empty(math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
    stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            here = (slice(r * BLOCK, (r + 1) * BLOCK), slice(c * BLOCK, (c + 1) * BLOCK))
            scales[r, c] = weight[here].abs().max() / FP8_MAX
            stored[here] = (weight[here] / scales[r, c]).to(torch.float8_e4m3fn)
    return stored, scales


def dequantise(stored: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The f32 weight that `quantise` stored."""
    rows, columns = stored.shape
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return stored.float() * spread[:rows, :columns]


def store(tensors: dict[str, torch.Tensor], storage: str) -> dict[str, torch.Tensor]:
    """The tensors as they lie in the file. The gate's bias is always f32, as in the published checkpoints."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            stored[name] = tensor
        elif storage == "fp8" and not name.endswith(NOT_QUANTISED):
            stored[name], stored[f"{name}_scale_inv"] = quantise(tensor)
        else:
            stored[name] = tensor.to(FLOATS[storage])
    return stored


def restore(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a reader in f32 sees of the file: the reference computes with these, so that rounding cancels out."""
    restored: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scales = stored.get(f"{name}_scale_inv")
        restored[name] = tensor.float() if scales is None else dequantise(tensor, scales)
    return restored


def mtp_tensors(layer: int, tensors: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What a multi-token-prediction module has beside the block of layer `layer`, named as in DeepSeek-V3's own files:
    eh_proj lets the embedding through, nearly, and the norms resemble the main model's; embedding and head are copies."""
    embedding, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    hidden = embedding.shape[1]
    noise = DRAFT_NOISE * torch.randn(hidden, 2 * hidden, generator=generator) / math.sqrt(hidden)
    through = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    parts = {
        "embed_tokens": embedding,
        "enorm": 1.0 + 0.1 * torch.randn(hidden, generator=generator),
        "hnorm": 1.0 + 0.2 * torch.randn(hidden, generator=generator),
        "eh_proj": through + noise,
        "shared_head.norm": norm + 0.05 * torch.randn(hidden, generator=generator),
        "shared_head.head": tensors["lm_head.weight"],
    }
    return {f"model.layers.{layer}.{part}.weight": tensor for part, tensor in parts.items()}


def stray_mtp_tensors(layer: int, hidden: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Some small tensors of a multi-token-prediction layer."""
    prefix = f"model.layers.{layer}."
    norms = ("enorm", "hnorm", "shared_head.norm", "input_layernorm")
    tensors = {f"{prefix}{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16) for norm in norms}
    projection = torch.randn(hidden, 2 * hidden, generator=generator)
    tensors[f"{prefix}eh_proj.weight"] = projection.to(torch.bfloat16)
    return tensors
