#!/usr/bin/env python3
"""How fast transformers decodes a checkpoint on this machine: the peer that the cluster is compared with.

    .deps/bench/bin/python bench/peers/transformers_decode.py --model DIR --prompt 1,2,3 --tokens 64 --threads 2

Greedy, one sequence, with its cache. Each implementation of the experts that the machine offers is timed and the faster
one is reported. The time to the first token (the prefill) is told apart from the decode rate, which counts the tokens
after it. Prints one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, PreTrainedModel

EXPERTS = ("grouped_mm", "batched_mm", "eager")
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Round:
    """One timed answer."""

    prefill_seconds: float
    decode_seconds: float
    tokens: list[int]

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds


def config_of(folder: Path) -> PreTrainedConfig:
    """The checkpoint's configuration. transformers does not know Kimi-K2's type; its architecture is DeepSeek-V3's."""
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if plain.get("model_type") == "kimi_k2":
        del plain["model_type"]
        return DeepseekV3Config(**plain)
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def load(folder: Path, dtype: torch.dtype, experts: str) -> PreTrainedModel:
    """The model with one implementation of its experts."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config_of(folder), dtype=dtype, experts_implementation=experts, local_files_only=True
    )
    return model.eval()


@torch.inference_mode()
def decode(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> Round:
    """Greedy tokens by a plain loop: what `generate` adds around it would only slow the peer down."""
    start = time.perf_counter()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    tokens = [out.logits[0, -1].argmax().item()]
    first = time.perf_counter()
    for _ in range(count - 1):
        step = torch.tensor([[tokens[-1]]])
        out = model(step, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        tokens.append(out.logits[0, -1].argmax().item())
    return Round(first - start, time.perf_counter() - first, tokens)


def measure(arguments: argparse.Namespace, experts: str) -> dict[str, object]:
    """Medians over several rounds, after one that warms up."""
    model = load(arguments.model, DTYPES[arguments.dtype], experts)
    prompt = torch.tensor([arguments.prompt])
    decode(model, prompt, min(arguments.tokens, 4))
    rounds = [decode(model, prompt, arguments.tokens) for _ in range(arguments.rounds)]
    rates = [one.rate for one in rounds]
    return {
        "experts_implementation": experts,
        "tokens_per_second_decode": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "prefill_seconds": statistics.median(one.prefill_seconds for one in rounds),
        "tokens": rounds[0].tokens,
    }


def ids(text: str) -> list[int]:
    """Token ids separated by commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--prompt", type=ids, default=list(range(5, 37)), help="token ids, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to draw; at least 2")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.rounds < 1:
        parser.error("--tokens must be at least 2 and --rounds at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = []
    for experts in EXPERTS:
        try:
            results.append(measure(arguments, experts))
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            print(f"{experts}: not possible here ({error})", file=sys.stderr)
    if not results:
        sys.exit("no implementation of the experts could be measured")
    best = max(results, key=lambda result: result["tokens_per_second_decode"])
    about = {
        "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "machine": platform.machine(),
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "prompt_tokens": len(arguments.prompt),
        "rounds": arguments.rounds,
    }
    rates = {result["experts_implementation"]: result["tokens_per_second_decode"] for result in results}
    print(json.dumps(about | best | {"all_tokens_per_second_decode": rates}))


if __name__ == "__main__":
    main()
