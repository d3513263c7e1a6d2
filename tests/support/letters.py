"""A tokenizer for tiny models in which letters are tokens, so that text can be asked of them."""

from __future__ import annotations

import json
import string

from support.tiny_models import tokenizer_json


def letters_tokenizer() -> bytes:
    """160 tokens, of which text gets the letters."""
    values = json.loads(tokenizer_json())
    tokens = ["<a>", "<s>", "</s>", *string.ascii_letters]
    tokens += [f"unused {i}" for i in range(160 - len(tokens))]
    values["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    return json.dumps(values).encode()
