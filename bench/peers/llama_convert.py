#!/usr/bin/env python3
"""Turns a checkpoint into the file that llama.cpp reads, with llama.cpp's own converter.

    .deps/bench/bin/python bench/peers/llama_convert.py MODEL_DIR OUT.gguf bf16|q8_0

Two things are done for it. A `q_lora_rank` of null is written as 0, which is what llama.cpp's loader asks for. And a
checkpoint without a tokenizer, whose tokens are numbers alone, gets a vocabulary that says so. Neither changes a weight.
"""

import json
import sys
import tempfile
from pathlib import Path

LLAMA = Path(__file__).resolve().parents[2] / ".deps/bench/llama.cpp"


def stand_in(model: Path, folder: Path) -> None:
    """The checkpoint's files by links, and its config with a `q_lora_rank` that is a number."""
    for file in model.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config.get("q_lora_rank") is None:
        config["q_lora_rank"] = 0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def convert(model: Path, out: Path, kind: str) -> None:
    """Runs the converter in this process, on the stand-in."""
    sys.path[:0] = [str(LLAMA), str(LLAMA / "gguf-py")]
    import convert_hf_to_gguf  # noqa: PLC0415 -- found only where llama.cpp was fetched
    from conversion.deepseek import DeepseekV2Model  # noqa: PLC0415

    if not (model / "tokenizer.json").exists():
        DeepseekV2Model.set_vocab = DeepseekV2Model._set_vocab_none
    unfinished = out.with_suffix(".unfinished")
    with tempfile.TemporaryDirectory() as folder:
        stand_in(model, Path(folder))
        sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", str(unfinished), "--outtype", kind]
        convert_hf_to_gguf.main()
    unfinished.rename(out)


def main() -> None:
    """Parses the arguments and converts."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    model, out, kind = sys.argv[1:]
    convert(Path(model), Path(out), kind)


if __name__ == "__main__":
    main()
