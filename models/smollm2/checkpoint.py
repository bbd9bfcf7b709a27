"""Writes safetensors, one tensor at a time: sizes are known before the first value, so nothing has to be held back."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTHS = {"BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `make` computes its values in f32 when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    dtype: str = "BF16"

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounds f32 to the nearest bf16, ties to even, as u16. (No value here is infinite or not a number.)"""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The f32 values of bf16 given as u16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write(path: Path, tensors: list[Tensor]) -> None:
    """Writes all tensors, in the given order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        offsets = [end, end + tensor.size]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for tensor in tensors:
            values = tensor.make()
            if values.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: computed with shape {values.shape}, announced as {tensor.shape}")
            stored = to_bf16(values) if tensor.dtype == "BF16" else np.ascontiguousarray(values, np.float32)
            file.write(stored.data)


class Reader:
    """Reads back what `write` wrote, mapped into memory."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            self._header = json.loads(file.read(length))
        self._data = np.memmap(path, np.uint8, "r", offset=8 + length)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor in f32."""
        entry = self._header[name]
        start, end = entry["data_offsets"]
        raw = self._data[start:end]
        values = from_bf16(raw.view(np.uint16)) if entry["dtype"] == "BF16" else raw.view(np.float32)
        return values.reshape(entry["shape"])
