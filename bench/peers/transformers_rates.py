#!/usr/bin/env python3
"""How fast transformers computes a checkpoint on this machine: a peer that the cluster is compared with.

    .deps/bench/bin/python bench/peers/transformers_rates.py --model DIR --threads 2
    .deps/bench/bin/python bench/peers/transformers_rates.py --model DIR --device cuda:0

Decode by numbers of streams in one batch, greedy, with its cache, the prefill apart; and the prefill of one long prompt.
Each implementation of the experts that the machine offers is timed. Prints one JSON object, rates in tokens per second.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

EXPERTS = ("grouped_mm", "eager")
# Steps that are not timed, and seconds after which enough are.
WARM_UP = 3
DECODE_WITHIN = 15.0
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def config_of(folder: Path) -> PreTrainedConfig:
    """The checkpoint's configuration. transformers does not know Kimi-K2's type; its architecture is DeepSeek-V3's."""
    plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if plain.get("model_type") == "kimi_k2":
        del plain["model_type"]
        return DeepseekV3Config(**plain)
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def load(folder: Path, dtype: torch.dtype, device: torch.device, experts: str) -> PreTrainedModel:
    """The model with one implementation of its experts."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config_of(folder), dtype=dtype, experts_implementation=experts, local_files_only=True
    )
    return model.eval().to(device)


def prompts(vocab: int, streams: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Token ids without a meaning, other ones for each stream."""
    return torch.randint(0, vocab, (streams, tokens), generator=torch.Generator().manual_seed(streams)).to(device)


def now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def decode(model: PreTrainedModel, prompt: torch.Tensor, count: int) -> float:
    """Tokens per second of all streams, of what follows a few that warm up, by a plain loop: what `generate` adds would slow
    it down. Of so many tokens, or of those that are drawn in time."""

    def step(out: ModelOutput) -> ModelOutput:
        last = out.logits[:, -1].argmax(-1, keepdim=True)
        return model(last, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)

    out = model(prompt, use_cache=True, logits_to_keep=1)
    for _ in range(WARM_UP):
        out = step(out)
    start = now(prompt.device)
    for drawn in range(1, count):
        out = step(out)
        # The clock alone: to wait for a GPU in every step would slow it down.
        if time.perf_counter() - start > DECODE_WITHIN:
            break
    return len(prompt) * drawn / (now(prompt.device) - start)


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """Tokens per second until the first token of an answer is known."""
    start = now(prompt.device)
    model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    return prompt.numel() / (now(prompt.device) - start)


def measure(arguments: argparse.Namespace, experts: str) -> dict[str, object]:
    """Medians over several rounds."""
    model = load(arguments.model, DTYPES[arguments.dtype], arguments.device, experts)
    vocab = model.config.vocab_size
    rates = {}
    for streams in arguments.streams:
        prompt = prompts(vocab, streams, arguments.prompt_tokens, arguments.device)
        rates[str(streams)] = statistics.median(decode(model, prompt, arguments.tokens) for _ in range(arguments.rounds))
    prompt = prompts(vocab, 1, arguments.prefill, arguments.device)
    prefill(model, prompt)
    return {"decode": rates, "prefill": statistics.median(prefill(model, prompt) for _ in range(arguments.rounds))}


def numbers(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--streams", type=numbers, default=[1, 4, 16], help="streams at once, separated by commas")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each stream")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to draw; at least 2")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the long prompt")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.tokens < 2 or arguments.rounds < 1:
        parser.error("--tokens must be at least 2 and --rounds at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = {}
    for experts in EXPERTS:
        try:
            results[experts] = measure(arguments, experts)
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            print(f"{experts}: not possible here ({error})", file=sys.stderr)
    if not results:
        sys.exit("no implementation of the experts could be measured")
    about = {
        "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(about | {"experts": results}))


if __name__ == "__main__":
    main()
