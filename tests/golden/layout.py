"""Writes checkpoint folders in the published files' spelling: config.json, safetensors shards, their index."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shapes import Shape

ARCHITECTURES = {"v2": "DeepseekV2ForCausalLM", "v3": "DeepseekV3ForCausalLM"}
MODEL_TYPES = {"v2": "deepseek_v2", "v3": "deepseek_v3"}
TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "fp8": "bfloat16"}


def official_config(shape: Shape) -> dict[str, Any]:
    """config.json as the family's own files spell it."""
    config = {
        "architectures": [ARCHITECTURES[shape.reference]],
        "model_type": MODEL_TYPES[shape.reference],
        "torch_dtype": TORCH_DTYPES[shape.storage],
        "use_cache": True,
        **shape.config,
        **(shape.official or {}),
    }
    if shape.storage == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    return {key: value for key, value in sorted(config.items()) if key not in shape.drop}


def write_json(path: Path, value: Any) -> None:
    """Writes `value` readably, with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def shards_of(tensors: dict[str, torch.Tensor], limit: int | None) -> list[dict[str, torch.Tensor]]:
    """Cuts the tensors, in the order of their names, into shards of about `limit` bytes each."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name in sorted(tensors):
        if limit is not None and shards[-1] and used + tensors[name].nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensors[name].contiguous()
        used += tensors[name].nbytes
    return shards


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], limit: int | None) -> None:
    """Writes model.safetensors, or numbered shards with an index where `limit` asks for them."""
    shards = shards_of(tensors, limit)
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):06}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_official(folder: Path, shape: Shape, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a whole checkpoint in the official spelling."""
    write_json(folder / "config.json", official_config(shape))
    ends = shape.config["eos_token_id"]
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": ends, "do_sample": False})
    write_tensors(folder, tensors, shape.shard_bytes)


def write_expected(path: Path, tensors: dict[str, torch.Tensor], made_by: str) -> None:
    """Writes the reference's answers; the header says what they were made by (in one key: the order of more varies)."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"made_by": made_by})
