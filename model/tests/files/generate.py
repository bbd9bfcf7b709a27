"""Makes tokenizer.json, encodings.json and renderings.json anew: what the reference does with these files.

Run in an environment with the versions that deploy/setup/bench.txt pins:

    python model/tests/files/generate.py
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

here = pathlib.Path(__file__).parent
CORPUS = ["the cat sat on the mat and the rain in Spain falls mainly on the plain", "größer, höher, weiter", "你好世界"] * 3
TEXTS = [
    "The cat, the mat.",
    "  leading and  double spaces \n\n and\ttabs ",
    "größer naïve façade Ελληνικά русский עברית العربية हिन्दी ไทย 한국어 日本語 中文 🙂👩‍👩‍👧‍👦",
    "1234567 + 89 = 1234656",
    "<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>",
    "e\u0301 \ufffd \u0000 \u200b",
    "",
]


def train():
    tokenizer = Tokenizer(models.BPE())
    split = [
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥]+"), "isolated"),
        pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in ["<｜User｜>", "<｜Assistant｜>"]])
    tokenizer.save(str(here / "tokenizer.json"), pretty=False)


def encode():
    tokenizer = AutoTokenizer.from_pretrained(here)
    cases = [{"text": text, "ids": tokenizer(text).input_ids} for text in TEXTS]
    for case in cases:
        case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
    (here / "encodings.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


def render():
    def message(role, content):
        return {"role": role, "content": content}

    conversations = [
        [message("user", " What is <b>this</b> & 'that'? ")],
        [message("system", "Be brief."), message("user", "hi"), message("system", " Really. "), message("assistant", "yes")],
        [message("user", "2+2"), message("assistant", "<think>hm\n</think>\n\n4"), message("user", "größer 你好 🙂")],
        [message("user", "look it up"), message("tool", 'say "hi"\n\t\\ <br> é \u2028'), message("user", "and?")],
        [message("user", "a"), message("user", "b")],
        [message("judge", "guilty")],
        [],
    ]
    template = _compile_jinja_template((here / "chat_template.jinja").read_text())
    tokens = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
    cases = []
    for messages in conversations:
        for add_generation_prompt in [True, False]:
            case = {"messages": messages, "add_generation_prompt": add_generation_prompt}
            try:
                case["text"] = template.render(
                    messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **tokens
                )
            except Exception as error:
                case["error"] = str(error)
            cases.append(case)
    (here / "renderings.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


train()
encode()
render()
