"""Text to token ids and back: Hugging Face tokenizer.json, SentencePiece, Llama 3's tiktoken file, a GGUF's own.

Three libraries do the work; this file gives them one face and three rules of its own:
- Text is text. `encode` makes no control token, whatever the text spells, unless it is asked to;
  `encode_with_specials` does, and is for rendered chat templates only.
- Text leaves as bytes. A token's bytes may end inside a character, so decoding UTF-8 is for whoever sees the stream.
- The first token's space. SentencePiece vocabularies write "Hello" as "▁Hello"; the space is dropped where a text
  begins and kept everywhere else. A `Detokenizer` carries that state, so its pushes concatenate to the decoded text.
Errors are TokenizerError: one line naming the file or field.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt_fast.files import read_json_object
from gpt_fast.text.added_tokens import AddedToken, add_text_template, add_tokens, is_new, read_added_tokens
from gpt_fast.text.bpe_backend import bpe_backend, bpe_class, default_tokens
from gpt_fast.text.gguf_tokenizer import LLAMA3_SPLIT, SPACE, tokenizer_json_from_gguf
from gpt_fast.text.sentencepiece_backend import (
    PieceTable,
    read_piece_table,
    sentencepiece_backend,
    spaces_as_llama,
)

__all__ = [
    "Detokenizer",
    "PromptTooLong",
    "Tokenizer",
    "TokenizerError",
    "load_tokenizer",
    "tokenizer_file",
    "tokenizer_json_from_gguf",
]

Span = tuple[int, int]
MOST_COMPOSED = 4  # characters that Unicode's NFC makes one of, at most


class PromptTooLong(ValueError):
    """A prompt of more characters than its model's tokens can hold: it has no need to be encoded to be refused."""

    def __init__(self, characters: int, allowed: int) -> None:
        self.characters, self.allowed = characters, allowed
        super().__init__(f"{characters} characters (allowed {allowed})")


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or a text that cannot be encoded, in one line."""


# ------------------------------------------------------------------------------------ the one face


class Tokenizer(ABC):
    """What the engine and the server use.

    vocab_size: one past the largest id. bos_id: None where the model has none. eos_ids: what ends an answer, as far
    as the tokenizer's own files say (a config.json may know more). control_tokens: the spellings that only a chat
    template may turn into ids; added_tokens: those that any text may. drops_leading_space: the rule of the first
    token's space holds here. characters_per_token: how many of a text one token can stand for at most; None: not
    known, as where a text is shortened before it is cut into tokens.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: frozenset[int]
    control_tokens: tuple[str, ...]
    added_tokens: tuple[str, ...] = ()
    drops_leading_space: bool
    characters_per_token: int | None = None

    def encode(self, text: str, *, add_bos: bool = True, specials: bool = False) -> list[int]:
        """Ids of a text. add_bos: begin as the model's own tokenizer does. specials: control tokens spelled in it are
        ids, as in transformers; else they are text."""
        return self._encode(check_text(text), specials=specials, add_bos=add_bos)

    def encode_with_specials(self, text: str, *, literal: Sequence[Span] = (), named: Sequence[str] = ()) -> list[int]:
        """Ids of a rendered chat template: control tokens become ids, nothing is added in front.

        literal: sorted, disjoint spans of the text that came from the user; a control token that touches one stays
        text. Such a token is encoded on its own, as transformers does with `sanitize_control_tokens`. named: of
        added_tokens, those that are handled alike.
        """
        ids: list[int] = []
        done = 0
        forged = list(forged_tokens(check_text(text), (*self.control_tokens, *named), literal))
        as_text = {part: self._encode_as_text(part) for part in {text[start:end] for start, end in forged}}
        for start, end in forged:
            ids += self._encode_from(done, text[done:start])
            ids += (
                as_text[text[start:end]]
                if start or text[:end] in named
                else self._encode(text[:end], specials=False, add_bos=False)
            )
            done = end
        return ids + self._encode_from(done, text[done:])

    def _encode_from(self, offset: int, part: str) -> list[int]:
        """Encode a part of a longer text, control tokens included."""
        return self._encode_inside(part, specials=True) if offset else self._encode(part, specials=True, add_bos=False)

    def _encode_as_text(self, token: str) -> list[int]:
        """An added token as text inside a longer one."""
        return self._encode_inside(token, specials=False)

    def _encode_inside(self, part: str, *, specials: bool) -> list[int]:
        """Encode a part past the beginning of a text: no space is put in front."""
        if part and self.drops_leading_space:
            newline = self._encode("\n", specials=specials, add_bos=False)
            ids = self._encode("\n" + part, specials=specials, add_bos=False)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return self._encode(part, specials=specials, add_bos=False) if part else []

    def detokenizer(self, *, at_start: bool = False, keep_specials: bool = False) -> Detokenizer:
        """A fresh stream of bytes. at_start: it begins a text; else it goes on after a prompt."""
        return Detokenizer(self, at_start=at_start, keep_specials=keep_specials)

    def decode_bytes(self, ids: Iterable[int], *, keep_specials: bool = False) -> bytes:
        """The bytes of a whole text: what a detokenizer at its start would have pushed."""
        stream = self.detokenizer(at_start=True, keep_specials=keep_specials)
        return b"".join(stream.push(token_id) for token_id in ids)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The reference library's own text for the ids, without control tokens; ids outside the vocabulary: nothing."""

    @abstractmethod
    def token_bytes(self, token_id: int, *, keep_specials: bool = False) -> bytes:
        """One token's bytes inside a text. Nothing for an id without a token, and for a control token unless kept."""

    def first_bytes(self, token_id: int) -> bytes:
        """One token's bytes where a text begins."""
        piece = self.token_bytes(token_id)
        return piece.removeprefix(b" ") if self.drops_leading_space else piece

    def keeps_dropping(self, piece: bytes) -> bool:
        """Whether the text still begins after its first piece left `piece` of itself."""
        return False

    @abstractmethod
    def _encode(self, text: str, *, specials: bool, add_bos: bool) -> list[int]: ...


class Detokenizer:
    """Bytes of a growing token sequence; concatenated pushes are the text."""

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool, keep_specials: bool) -> None:
        self.tokenizer = tokenizer
        self.at_start = at_start
        self.keep_specials = keep_specials

    def push(self, token_id: int) -> bytes:
        """The bytes this token adds; they may end inside a character."""
        inside = self.tokenizer.token_bytes(token_id)
        if not inside:
            return self.tokenizer.token_bytes(token_id, keep_specials=True) if self.keep_specials else b""
        if not self.at_start:
            return inside
        piece = self.tokenizer.first_bytes(token_id)
        self.at_start = self.tokenizer.keeps_dropping(piece)
        return piece


def check_text(text: str) -> str:
    """The text, if it is Unicode text: a lone surrogate has no UTF-8 and so no tokens."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text: lone surrogate at character {error.start}, allowed Unicode text") from None
    return text


def forged_tokens(text: str, control_tokens: Sequence[str], literal: Sequence[Span]) -> Iterator[Span]:
    """Control tokens (leftmost, longest first) that touch a literal span."""
    starts = [start for start, _ in literal]
    for match in control_pattern(control_tokens).finditer(text) if literal else ():
        before = bisect_left(starts, match.end()) - 1  # the last span that begins before the match ends
        if before >= 0 and literal[before][1] > match.start():
            yield match.span()


def control_pattern(control_tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the tokens, a longer one before a shorter one."""
    longest_first = sorted(filter(None, control_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


# --------------------------------------------------------------------------- finding the right one


@dataclass(frozen=True)
class SideFacts:
    """What the JSON files beside a tokenizer say."""

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


def tokenizer_file(directory: Path) -> Path | None:
    """The file that a directory's tokenizer is read from; None: it has none. vocab.json needs merges.txt beside it."""
    for names in (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt")):
        if all((directory / name).is_file() for name in names):
            return directory / names[0]
    return None


def load_tokenizer(checkpoint_dir: Path) -> Tokenizer:
    """The checkpoint's tokenizer: tokenizer.json, else tokenizer.model, told apart by its content, else vocab.json with
    merges.txt."""
    directory = Path(checkpoint_dir)
    path = tokenizer_file(directory)
    if path is None:
        looked = "tokenizer.json, tokenizer.model, vocab.json with merges.txt"
        raise TokenizerError(f"{directory}: no tokenizer (looked for {looked})")
    facts = read_side_facts(directory)
    if path.name == "tokenizer.json":
        return load_hugging_face(path, facts)
    if path.name == "vocab.json":
        return load_bpe_files(directory, facts)
    content = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return load_llama3(path, content, facts)
    return load_sentencepiece(path, content, facts)


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


# ----------------------------------------------------------------- Hugging Face's tokenizer.json


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


def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (openai/gpt-2, encoder.py): character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


BYTE_OF = byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """A byte-level BPE token's bytes. One with a foreign character is an added token, spelled as it is."""
    return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    """A SentencePiece-type token's bytes: <0xAB> is one byte, ▁ a space."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()


# --------------------------------------------------------------------------------- SentencePiece


def load_sentencepiece(path: Path, content: bytes, facts: SideFacts) -> Tokenizer:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor()
    try:
        if not content:
            raise RuntimeError("empty file")
        model.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise TokenizerError(f"{path}: neither a SentencePiece model nor a tiktoken file ({error})") from None
    table = read_piece_table(content)
    held = all(is_control(model, token) or table.defines(token) for token in facts.added_tokens)
    if held and not (facts.is_llama and table.unfit is None):
        return SentencePieceTokenizer(model, facts)
    return load_extended_sentencepiece(path, table, facts)


def is_control(model: Any, token: AddedToken) -> bool:
    """Whether an added token is a control piece (or the unknown one) of a SentencePiece model, under the same id."""
    token_id = model.piece_to_id(token.content)
    known = model.id_to_piece(token_id) == token.content and token.id in (None, token_id)
    return known and (model.is_control(token_id) or model.is_unknown(token_id))


def load_extended_sentencepiece(path: Path, table: PieceTable, facts: SideFacts) -> Tokenizer:
    """A SentencePiece model and the tokens that JSON files add to it."""
    try:
        backend = sentencepiece_backend(table, legacy=facts.legacy, prefix=facts.prefix_space)
        add_tokens(backend, list(facts.added_tokens))
    except ValueError as error:
        raise TokenizerError(
            f"{path}: cannot take the tokens that the JSON files beside it add ({error}); a tokenizer.json, as "
            "transformers' save_pretrained writes, can"
        ) from None
    names = {"bos_token": "<s>", "eos_token": "</s>"} | facts.special_tokens
    facts = replace(facts, special_tokens={name: text for name, text in names.items() if backend.token_to_id(text)})
    bos, eos = (facts.special_tokens.get(name) for name in ("bos_token", "eos_token"))
    add_text_template(backend, bos if facts.add_bos is not False else None, eos if facts.add_eos else None)
    return HuggingFaceTokenizer(backend, decoder_of(backend), facts, where=str(path))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Control tokens are its control pieces; each text between two of them is a text of its
    own, with its own leading space, as Meta's and Mistral's own code encode conversations."""

    def __init__(self, model: Any, facts: SideFacts) -> None:
        self._model = model
        self.vocab_size = model.get_piece_size()
        self._controls = {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}
        self.control_tokens = tuple(self._controls)
        self._split = re.compile(f"({control_pattern(self.control_tokens).pattern})")
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self._prefix = [model.bos_id()] if facts.add_bos is not False and model.bos_id() >= 0 else []
        self._suffix = [model.eos_id()] if facts.add_eos and model.eos_id() >= 0 else []
        self.eos_ids = facts.eos_ids | ({model.eos_id()} if model.eos_id() >= 0 else set())
        # The normalizer's flags are not in the library's interface: ask what one and two spaced pieces decode to.
        spaced = next((i for i in range(self.vocab_size) if model.id_to_piece(i) == SPACE), None)
        self.drops_leading_space = spaced is not None and model.decode([spaced]) == ""
        self._drops_all = spaced is not None and model.decode([spaced, spaced]) == ""

    def _encode(self, text: str, *, specials: bool, add_bos: bool) -> list[int]:
        ids = list(self._prefix) if add_bos else []
        for part in self._split.split(text) if specials else [text]:
            ids += [self._controls[part]] if specials and part in self._controls else self._model.encode(part)
        return ids + self._suffix if add_bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._model.decode([i for i in ids if 0 <= i < self.vocab_size]))

    def token_bytes(self, token_id: int, *, keep_specials: bool = False) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            return b""
        if self._model.is_unknown(token_id):
            return bytes(self._model.decode([token_id]).encode())
        piece = self._model.id_to_piece(token_id)
        if self._model.is_control(token_id):
            return piece.encode() if keep_specials else b""
        return sentencepiece_bytes(piece) if self._model.is_byte(token_id) else piece.replace(SPACE, " ").encode()

    def first_bytes(self, token_id: int) -> bytes:
        """Only a space that the piece spells is dropped, not one from a byte piece or the unknown mark."""
        if self._model.is_byte(token_id) or self._model.is_unknown(token_id):
            return self.token_bytes(token_id)
        return super().first_bytes(token_id)

    def keeps_dropping(self, piece: bytes) -> bool:
        return self._drops_all and not piece


# --------------------------------------------------------------------------- Llama 3's tiktoken

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
