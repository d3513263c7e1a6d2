"""Hugging Face's tokenizer.json, or vocab.json with merges.txt, through the `tokenizers` library."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt_fast.files import read_json_object
from gpt_fast.text.added_tokens import AddedToken, add_text_template, add_tokens, is_new
from gpt_fast.text.bpe_backend import bpe_backend, bpe_class, default_tokens
from gpt_fast.text.sentencepiece_backend import spaces_as_llama
from gpt_fast.text.side_facts import SideFacts, as_ids
from gpt_fast.text.token_bytes import SPACE, byte_level_bytes, sentencepiece_bytes
from gpt_fast.text.tokenizer import Tokenizer, TokenizerError

MOST_COMPOSED = 4  # characters that Unicode's NFC makes one of, at most


def load_hugging_face(path: Path, facts: SideFacts) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: not a tokenizer.json ({error})") from None
    if facts.respaced and not is_byte_level(backend):
        spaces_as_llama(backend, legacy=facts.legacy, prefix=facts.prefix_space)
    try:
        add_tokens(backend, [token for token in facts.added_tokens if is_new(backend, token)])
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from None
    if facts.is_llama and says_nothing(backend.post_processor):
        ends = [facts.special_tokens.get(name) for name in ("bos_token", "eos_token")]
        bos, eos = (token if token and backend.token_to_id(token) is not None else None for token in ends)
        add_text_template(backend, bos if facts.add_bos else None, eos if facts.add_eos else None)
    return HuggingFaceTokenizer(backend, decoder_of(backend), facts, where=str(path))


def load_bpe_files(directory: Path, facts: SideFacts) -> Tokenizer:
    """vocab.json and merges.txt, with the tokens that tokenizer_config.json adds to them."""
    path = directory / "vocab.json"
    config = read_json_object(directory / "tokenizer_config.json")
    try:
        name = bpe_class(config, read_json_object(directory / "config.json"))
        backend = bpe_backend(directory, name, prefix_space=config.get("add_prefix_space") is True)
        facts = replace(facts, special_tokens=default_tokens(name) | facts.special_tokens)
        named = [facts.special_tokens.get(key) for key in ("bos_token", "eos_token", "unk_token")]
        own = [AddedToken(None, text, special=True, normalized=False) for text in named if text is not None]
        add_tokens(backend, [*facts.added_tokens, *own])
    except TokenizerError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: {' '.join(str(error).split())}") from None
    bos, eos = (facts.special_tokens.get(key) for key in ("bos_token", "eos_token"))
    add_text_template(backend, bos if facts.add_bos else None, eos if facts.add_eos else None)
    return HuggingFaceTokenizer(backend, decoder_of(backend), facts, where=str(path))


def says_nothing(post_processor: Any) -> bool:
    """Whether a tokenizer.json leaves the tokens around a text to others. LlamaTokenizerFast put them there as
    tokenizer_config.json says (DeepSeek-R1-Distill-Qwen counts on it); where the file has a template, that holds."""
    state = {} if post_processor is None else json.loads(post_processor.__getstate__())
    steps = state.get("processors", [state])
    return all(step.get("type", "ByteLevel") == "ByteLevel" for step in steps)


def is_byte_level(backend: Any) -> bool:
    """By the pre-tokenizer or decoder, as transformers decides it."""
    parts = (part.__getstate__() for part in (backend.pre_tokenizer, backend.decoder) if part is not None)
    return any(b"ByteLevel" in part for part in parts)


def decoder_of(backend: Any) -> Any:
    """The decoder as tokenizer.json has it, from the library's pickled state: not to read megabytes a second time."""
    return None if backend.decoder is None else json.loads(backend.decoder.__getstate__())


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, through the `tokenizers` library. Special tokens are those it marks special."""

    def __init__(self, backend: Any, decoder: Any, facts: SideFacts, *, where: str) -> None:
        self._backend = backend
        self._lock = threading.Lock()  # encode_special_tokens is state of the shared backend
        self._byte_level, self.drops_leading_space = read_decoder(decoder, where=where)
        self._specials = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        added = backend.get_added_tokens_decoder().values()
        self.control_tokens = tuple(self._specials.values())
        self.added_tokens = tuple(token.content for token in added if not token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        bos, eos = (backend.token_to_id(facts.special_tokens.get(name, "")) for name in ("bos_token", "eos_token"))
        self.bos_id = bos
        self.eos_ids = facts.eos_ids | as_ids(eos)
        self.characters_per_token = characters_per_token(backend)

    def _encode(self, text: str, *, specials: bool, add_bos: bool) -> list[int]:
        """By the call for batches: unlike the one for a text it lets other threads run meanwhile."""
        with self._lock:
            self._backend.encode_special_tokens = not specials  # the library's word for "special tokens are text"
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_bos)[0].ids)

    def _encode_as_text(self, token: str) -> list[int]:
        """The library makes a token of one that is not special: then by its parts that know no added tokens."""
        if token in self.control_tokens:
            return super()._encode_as_text(token)
        return plain_ids(self._backend, "\n" + token)[len(plain_ids(self._backend, "\n")) :]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._backend.decode([i for i in ids if 0 <= i < self.vocab_size], skip_special_tokens=True))

    def token_bytes(self, token_id: int, *, keep_specials: bool = False) -> bytes:
        if token_id in self._specials:
            return self._specials[token_id].encode() if keep_specials else b""
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        return byte_level_bytes(token) if self._byte_level else sentencepiece_bytes(token)


def plain_ids(backend: Any, text: str) -> list[int]:
    """Ids of a text by a backend's rules, none of its added tokens among them."""
    import tokenizers

    plain = tokenizers.Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    return list(plain.encode(text, add_special_tokens=False).ids)


def characters_per_token(backend: Any) -> int | None:
    """The most characters of a text that one token stands for, where the text is only ever cut and spelled anew."""
    state = {} if backend.normalizer is None else json.loads(backend.normalizer.__getstate__())
    steps = state.get("normalizers", [state] if state else [])
    if any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values()):
        return None
    longest = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
    for step in steps:
        if step["type"] == "NFC":
            longest *= MOST_COMPOSED
        elif step["type"] != "Prepend" and (step["type"], step.get("pattern")) != ("Replace", {"String": " "}):
            return None
    return longest


def read_decoder(decoder: Any, *, where: str) -> tuple[bool, bool]:
    """(byte-level BPE?, drops the first space?) from a tokenizer.json's decoder; others are refused by name."""
    steps = decoder.get("decoders", [decoder]) if isinstance(decoder, Mapping) else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    drops = kinds[-1:] == ["Strip"]
    fits = kinds[: len(kinds) - drops] == ["Replace", "ByteFallback", "Fuse"]
    fits = fits and (steps[0].get("pattern"), steps[0].get("content")) == ({"String": SPACE}, " ")
    if not fits or (drops and [steps[-1].get(key) for key in ("content", "start", "stop")] != [" ", 1, 0]):
        allowed = "ByteLevel, or Replace ▁ + ByteFallback + Fuse (+ Strip of one leading space)"
        raise TokenizerError(f"{where}: decoder is not supported (got {kinds}, allowed {allowed})")
    return False, drops
