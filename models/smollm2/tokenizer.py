"""The original's tokenizer, from the GGUF file's metadata to the files that Hugging Face folders carry."""

import json
from pathlib import Path

from source import Original
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3
"""The GGUF token type of special tokens."""


def build(original: Original) -> Tokenizer:
    """A byte-level BPE tokenizer that splits digits one by one, as SmolLM2's own tokenizer.json does."""
    tokens: list[str] = original.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in original.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = original.field("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def write(folder: Path, original: Original) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the chat template."""
    build(original).save(str(folder / "tokenizer.json"))
    tokens = original.field("tokenizer.ggml.tokens")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": tokens[original.field("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[original.field("tokenizer.ggml.eos_token_id")],
        "unk_token": tokens[original.field("tokenizer.ggml.unknown_token_id")],
        "pad_token": tokens[original.field("tokenizer.ggml.padding_token_id")],
        "model_max_length": original.sizes.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": original.field("tokenizer.chat_template"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
