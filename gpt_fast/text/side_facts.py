"""What the JSON files beside a tokenizer say: special tokens, ends, added tokens, and how spaces are meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpt_fast.files import read_json_object
from gpt_fast.text.added_tokens import AddedToken, read_added_tokens
from gpt_fast.text.tokenizer import TokenizerError


@dataclass(frozen=True)
class SideFacts:
    special_tokens: dict[str, str]  # "bos_token" -> "<s>", ...
    eos_ids: frozenset[int]  # generation_config.json
    add_bos: bool | None  # None: not said; SentencePiece then adds it
    add_eos: bool = False
    is_llama: bool = False  # tokenizer_class LlamaTokenizer or LlamaTokenizerFast
    model_type: str = ""  # config.json's
    added_tokens: tuple[AddedToken, ...] = ()
    legacy: bool = False  # transformers' word: with SentencePiece, a space begins the text after every added token
    prefix_space: bool = True  # with SentencePiece: whether a space begins a text at all

    @property
    def respaced(self) -> bool:
        """Whether transformers' LlamaTokenizer reads a tokenizer.json, and puts its own rules of where spaces stand in
        place of the file's. Of other model types it takes the file as it is."""
        return self.is_llama and self.model_type == "llama"


def read_side_facts(directory: Path) -> SideFacts:
    config = read_json_object(directory / "tokenizer_config.json", optional=True)
    names = ("special_tokens_map.json", "added_tokens.json")
    side_files = [read_json_object(directory / name, optional=True) for name in names]
    try:
        added = read_added_tokens(config, *side_files)
    except ValueError as error:
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: {error}") from None
    return SideFacts(
        read_special_tokens(directory),
        as_ids(read_json_object(directory / "generation_config.json", optional=True).get("eos_token_id")),
        add_bos=None if config.get("add_bos_token") is None else config["add_bos_token"] is True,
        add_eos=config.get("add_eos_token") is True,
        is_llama=str(config.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer",
        model_type=str(read_json_object(directory / "config.json", optional=True).get("model_type")),
        added_tokens=tuple(added),
        legacy=config.get("legacy") is True,
        prefix_space=config.get("add_prefix_space") is not False,
    )


def read_special_tokens(directory: Path) -> dict[str, str]:
    """The named special tokens ("bos_token": "<s>", ...) of tokenizer_config.json and special_tokens_map.json."""
    named = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_json_object(directory / file, optional=True).items():
            value = value.get("content") if isinstance(value, Mapping) else value  # {"content": "<s>", "lstrip": ...}
            if re.fullmatch(r"(bos|eos|unk|sep|pad|cls|mask)_token", key) and isinstance(value, str):
                named[key] = value
    return named


def as_ids(value: object) -> frozenset[int]:
    ids = value if isinstance(value, list) else [value]
    return frozenset(i for i in ids if isinstance(i, int))
