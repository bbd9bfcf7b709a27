"""What `transformers` computes for a checkpoint, in f32 with eager attention and eager experts; and how sure it is.

A golden is only worth something where two correct implementations cannot disagree. So the distance to the nearest
other decision is recorded, of every drawn token and of every choice of experts, and close calls are thrown away.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
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
    drafts: torch.Tensor | None = None
    """[tokens + drawn - 1, vocab]: the draft module's logits of every position that has a next token."""


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


class DraftModule:
    """DeepSeek-V3's multi-token prediction, of which transformers has the block only: arXiv 2412.19437, section 2.2.

    The block is the reference's own. It was loaded as one layer more behind the last, and is taken off the model here.
    """

    def __init__(self, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
        """Of a model that was loaded with one layer too many, and the file's tensors in f32."""
        model.config.num_hidden_layers -= 1
        index = model.config.num_hidden_layers
        self.model, self.block = model, model.model.layers[index]
        part = lambda name: tensors[f"model.layers.{index}.{name}.weight"].to(model.dtype)  # noqa: E731
        self.enorm, self.hnorm, self.eh_proj = part("enorm"), part("hnorm"), part("eh_proj")
        self.head_norm, self.head = part("shared_head.norm"), part("shared_head.head")
        self.embedding = part("embed_tokens")

    def norm(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Root-mean-square normalisation."""
        return functional.rms_norm(rows, weight.shape, weight, self.model.config.rms_norm_eps)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Row i is about token i + 2: it sees the main model's last hidden state of token i, final norm and all, and the
        embedding of token i + 1, which is zero in row 0."""
        hidden = self.model.model(tokens[None], use_cache=False).last_hidden_state[0, :-1]
        embedded = functional.embedding(tokens[1:], self.embedding)
        embedded[0] = 0.0
        joined = torch.cat([self.norm(embedded, self.enorm), self.norm(hidden, self.hnorm)], dim=-1) @ self.eh_proj.T
        count = len(joined)
        angles = self.model.model.rotary_emb(joined[None], torch.arange(count)[None])
        mask = torch.full((count, count), float("-inf"), dtype=joined.dtype).triu(1)[None, None]
        out = self.block(joined[None], attention_mask=mask, position_embeddings=angles)[0]
        return self.norm(out, self.head_norm) @ self.head.T

    def add_to(self, answer: Answer) -> None:
        """Notes the drafts along a prompt and what was drawn after it."""
        answer.drafts = self.logits(torch.cat([answer.prompt, answer.greedy])).float()

    def distance(self, known: Answer) -> float:
        """The largest difference from `known` drafts."""
        return (self.logits(torch.cat([known.prompt, known.greedy])).float() - known.drafts).abs().max().item()


def drafted(known: Answer) -> tuple[list[bool], float]:
    """Which of the drafts along the drawn tokens are right, and by how much the closest of them leads."""
    first = len(known.prompt) - 1
    rows = known.drafts[first : first + len(known.greedy) - 1]
    best = rows.topk(2, dim=-1)
    right = (best.indices[:, 0] == known.greedy[1:]).tolist()
    return right, (best.values[:, 0] - best.values[:, 1]).min().item()
