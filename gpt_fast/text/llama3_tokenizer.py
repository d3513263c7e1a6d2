"""Llama 3's tokenizer.model: lines of `base64 rank`, through the `tiktoken` library."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt_fast.text.gguf_tokenizer import LLAMA3_SPLIT
from gpt_fast.text.side_facts import SideFacts
from gpt_fast.text.tokenizer import Tokenizer, TokenizerError

# Table: meta-llama/llama-models, models/llama3/tokenizer.py.
LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{n}|>" for n in range(2, 246)),
)
LLAMA3_EOS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
LLAMA4_TOKENS = 200_000  # Llama 4's file looks the same but has another pattern and table


def load_llama3(path: Path, content: bytes, facts: SideFacts) -> Tokenizer:
    try:
        import tiktoken
    except ImportError:
        raise TokenizerError(f"{path}: a tiktoken file needs `pip install 'tiktoken>=0.12'`") from None
    ranks = read_ranks(path, content)
    specials = {token: len(ranks) + n for n, token in enumerate(LLAMA3_SPECIALS)}
    for token in facts.added_tokens:
        if token.content not in specials or token.id not in (None, specials[token.content]):
            problem = f"Llama 3's own tokens do not have {token.content!r}, which the JSON files beside it add"
            raise TokenizerError(f"{path}: {problem}; a tokenizer.json, as transformers' save_pretrained writes, can")
    encoding = tiktoken.Encoding(path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials)
    return Llama3Tokenizer(encoding, specials, facts)


def read_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    """Token bytes -> rank, from lines of `base64 rank`; ranks must run from 0 and cover every byte."""
    try:
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise TokenizerError(f"{path}: not a tiktoken file ({error})") from None
    if sorted(ranks.values()) != list(range(len(pairs))) or any(bytes([b]) not in ranks for b in range(256)):
        raise TokenizerError(f"{path}: damaged tiktoken file (ranks with holes or bytes missing)")
    if len(ranks) == LLAMA4_TOKENS:
        raise TokenizerError(f"{path}: {LLAMA4_TOKENS} tokens is Llama 4's vocabulary, allowed Llama 3's")
    return ranks


class Llama3Tokenizer(Tokenizer):
    """Llama 3's rank file, through the `tiktoken` library, with Meta's special tokens behind the ranks."""

    drops_leading_space = False

    def __init__(self, encoding: Any, specials: Mapping[str, int], facts: SideFacts) -> None:
        self._encoding = encoding
        self._specials = {token_id: token for token, token_id in specials.items()}
        self.control_tokens = tuple(specials)
        self.vocab_size = encoding.n_vocab
        self._begin = specials["<|begin_of_text|>"]
        self.bos_id = self._begin
        self.eos_ids = facts.eos_ids | {specials[token] for token in LLAMA3_EOS}
        self.characters_per_token = max(map(len, (*encoding.token_byte_values(), *specials)))

    def _encode(self, text: str, *, specials: bool, add_bos: bool) -> list[int]:
        allowed = set(self.control_tokens) if specials else set()
        ids = [self._begin] if add_bos else []
        for part in cut_long_runs(text):
            ids += self._encoding.encode(part, allowed_special=allowed, disallowed_special=())
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self, token_id: int, *, keep_specials: bool = False) -> bytes:
        if token_id in self._specials:
            return self._specials[token_id].encode() if keep_specials else b""
        return self._encoding.decode_single_token_bytes(token_id) if 0 <= token_id < self.vocab_size else b""


def cut_long_runs(text: str, *, chunk: int = 400_000, run: int = 25_000) -> Iterator[str]:
    """The text in parts that tiktoken can take, cut where Meta's tokenizer cuts: every `chunk` characters, and within
    one after every `run` characters of nothing but space or nothing but other characters (openai/tiktoken#195)."""
    for offset in range(0, len(text), chunk):
        part = text[offset : offset + chunk]
        cuts = [0]
        for long in re.finditer(rf"\s{{{run + 1},}}|\S{{{run + 1},}}", part):
            cuts += range(long.start() + run, long.end(), run)
        yield from (part[a:b] for a, b in zip(cuts, [*cuts[1:], len(part)], strict=True))
