"""Makes tokenizer.json, encodings.json and renderings.json anew: what the reference does with these files; and
deepseek.json: what it does with DeepSeek's own tokenizers, which `deploy/setup.sh python` brings.

Run in the environment that `deploy/setup.sh bench` brings:

    .deps/bench/bin/python model/tests/files/generate.py
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

here = pathlib.Path(__file__).parent
deepseek = here.parents[2] / ".deps/tokenizers"
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
DEEPSEEK_TEXTS = TEXTS + [
    "It's the 3rd time: \"don't\" (won't, I'll, we've) cost $1,234.50 — 100% sure… e.g. e-mail@example.org/a_b?c=d&e#f",
    "为什么天空是蓝色的？因为瑞利散射：波长越短，散射越强。繁體中文，全形「標點」１２３。",
    "日本語のカタカナとひらがな、漢字。한국어 문장은 띄어쓰기가 있습니다.",
    "السماءُ زرقاءُ بسببِ تشتّتِ ريلي، أليس كذلك؟ ١٢٣٤٥ لـِماذا؟",
    "Почему небо голубое? Съешь же ещё этих мягких французских булок. Їжак і ґанок, щось інше.",
    "आकाश नीला क्यों होता है? क्षत्रिय ज्ञान १२३४",
    "ทำไมท้องฟ้าถึงเป็นสีฟ้า น้ำแข็ง ๑๒๓๔",
    "שָׁלוֹם עֲלֵיכֶם · Ελληνικά: άλφα, βήτα · Tiếng Việt: nghiêng ngả · ქართული · አማርኛ · தமிழ் · བོད་ཡིག",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇯🇵 1️⃣ ❤️‍🔥 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱 ∑∫√≠ ☃︎",
    "def f(x):\n\tif x > 0:\n\t\treturn {'a': [1, 2, 3]}  # ok\n\n    \n\treturn None\n",
    "#include <vector>\r\nint main() {\r\n  for (auto&& x : v) { sum += x->y * 0xFFu; }\r\n}\r\n",
    "one\rtwo\r\nthree\n\nfour\n\r\n\x0bfive\x0csix\x85seven\u2028eight\u2029nine  \n  ten\u00a0\u3000\t \n",
    "1 12 123 1234 12345 123456 1234567890 3.14159 1e-10 2024-12-31T23:59:59Z ½ ² Ⅷ ٣",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" + " " * 37 + "=" * 50 + "\n" * 9 + "哈" * 20 + "!" * 11,
    "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Why?<｜Assistant｜><think>\nHm.\n</think>\n\nSo.<｜end▁of▁sentence｜>",
    "<｜fim▁begin｜>a<｜fim▁hole｜>c<｜fim▁end｜> <|EOT|> <｜tool▁sep｜>x<｜tool▁call▁end｜> <| User |> <｜User |>",
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
    cases = encodings(here, TEXTS)
    (here / "encodings.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


def encodings(folder, texts):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = [{"text": text, "ids": tokenizer(text).input_ids} for text in texts]
    for case in cases:
        case["decoded"] = tokenizer.decode(case["ids"], skip_special_tokens=True)
    return cases


def render():
    cases = renderings((here / "chat_template.jinja").read_text())
    (here / "renderings.json").write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n")


def renderings(source):
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
    template = _compile_jinja_template(source)
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
    return cases


def read_deepseek():
    def lines(cases):
        return "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases) + "\n]"

    parts = []
    for name in ["deepseek_v3", "deepseek_v4"]:
        tokenizer = AutoTokenizer.from_pretrained(deepseek / name)
        # V4's folder has no template.
        rendered = renderings(tokenizer.chat_template) if tokenizer.chat_template else []
        encoded = lines(encodings(deepseek / name, DEEPSEEK_TEXTS))
        parts.append(f'"{name}":{{"vocab_size":{len(tokenizer)},"encodings":{encoded},"renderings":{lines(rendered)}}}')
    (here / "deepseek.json").write_text("{" + ",\n".join(parts) + "}\n")


train()
encode()
render()
read_deepseek()
