"""What `transformers` computes for a checkpoint, in f32 with eager attention and eager experts; and how sure it is.

A golden is only worth something where two correct implementations cannot disagree. So the distance to the nearest
other decision is recorded, of every drawn token and of every choice of experts, and close calls are thrown away.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

CONFIGS = {"v2": DeepseekV2Config, "v3": DeepseekV3Config}
MODELS = {"v2": DeepseekV2ForCausalLM, "v3": DeepseekV3ForCausalLM}


@dataclass
class Margins:
    """The closest calls of a run."""

    token: float = float("inf")
    """Between the best and the second logit of a drawn token."""
    expert: float = float("inf")
    """Between the last chosen expert's selection score and the first one left out."""
    group: float = float("inf")
    """The same for groups of experts."""
    lowest_score: float = float("inf")
    highest_score: float = -float("inf")
    chosen: set[tuple[int, int]] = field(default_factory=set)
    """(layer, expert) pairs that were chosen at least once."""


@dataclass
class Answer:
    """The reference's answer to one prompt."""

    prompt: torch.Tensor
    logits: torch.Tensor
    """[tokens, vocab]: of every position of the prompt."""
    greedy: torch.Tensor


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The reference model for a checkpoint that transformers itself can read."""
    model = MODELS[family].from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", local_files_only=True
    )
    return model.eval()


def gap(scores: torch.Tensor, kept: int) -> float:
    """The smallest distance, over all rows, between the `kept`-th best score and the next."""
    if kept >= scores.shape[-1]:
        return float("inf")
    best = scores.topk(kept + 1, dim=-1).values
    return (best[..., kept - 1] - best[..., kept]).min().item()


def watch_gates(model: PreTrainedModel, family: str, margins: Margins) -> None:
    """Has every gate of the model note its margins."""
    config = model.config

    def note(layer: int, gate: nn.Module, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        scores = logits.softmax(-1) if family == "v2" else logits.sigmoid() + gate.e_score_correction_bias
        margins.lowest_score = min(margins.lowest_score, scores.min().item())
        margins.highest_score = max(margins.highest_score, scores.max().item())
        grouped = family == "v3" or config.topk_method == "group_limited_greedy"
        if grouped and config.n_group > 1:
            by_group = scores.unflatten(-1, (config.n_group, -1))
            of_groups = by_group.amax(-1) if family == "v2" else by_group.topk(2, dim=-1).values.sum(-1)
            margins.group = min(margins.group, gap(of_groups, config.topk_group))
            kept = torch.zeros_like(of_groups, dtype=torch.bool)
            kept.scatter_(1, of_groups.topk(config.topk_group, dim=-1).indices, True)
            scores = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        margins.expert = min(margins.expert, gap(scores, config.num_experts_per_tok))
        margins.chosen |= {(layer, expert) for expert in chosen.unique().tolist()}

    for index, layer in enumerate(model.model.layers):
        gate = getattr(layer.mlp, "gate", None)
        if gate is not None:
            gate.register_forward_hook(lambda gate, _, out, index=index: note(index, gate, out[0], out[2]))


@torch.no_grad()
def answer(model: PreTrainedModel, prompt: torch.Tensor, drawn: int, margins: Margins) -> Answer:
    """Logits of the prompt, and `drawn` greedy tokens after it. Every step computes the whole sequence anew: no cache
    stands between the formulas and the answer."""
    tokens = prompt
    logits = first = model(tokens[None], use_cache=False).logits[0].float()
    for _ in range(drawn):
        best = logits[-1].topk(2)
        margins.token = min(margins.token, (best.values[0] - best.values[1]).item())
        tokens = torch.cat([tokens, best.indices[:1]])
        logits = model(tokens[None], use_cache=False).logits[0].float()
    return Answer(prompt, first, tokens[len(prompt) :])


@torch.no_grad()
def distance(model: PreTrainedModel, known: Answer) -> float:
    """The largest difference between `model`'s logits and the `known` ones: for an f64 model, what rounding does."""
    return (model(known.prompt[None], use_cache=False).logits[0].float() - known.logits).abs().max().item()
