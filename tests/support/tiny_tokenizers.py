"""Tiny tokenizers with the pipelines of published ones: normalizer, cutting, post-processor, decoder, added tokens.

The vocabularies are trained on a few lines (support/tokenizer_files.py), and the special tokens stand behind them, or
before them where the published ones do.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.tokenizer_files import save_bpe, sentencepiece_file, token

Json = dict[str, Any]
SPACE = "▁"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(*, prefix: bool = False, trim: bool = True, regex: bool = False) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": trim, "use_regex": regex}


def sequence(kind: str, *steps: Json) -> Json:
    return {"type": "Sequence", kind: list(steps)}


DIGITS = {"type": "Digits", "individual_digits": True}
# How texts are cut, by whose tokenizer.json it is.
CUTS: dict[str, Json] = {
    "gpt2": byte_level(regex=True),
    "llama3": sequence("pretokenizers", split(LLAMA3_SPLIT), byte_level()),
    "qwen2": sequence("pretokenizers", split(LLAMA3_SPLIT.replace("{1,3}", "")), byte_level(trim=False)),
    "smollm": sequence("pretokenizers", DIGITS, byte_level(regex=True)),
    "tekken": sequence("pretokenizers", split(TEKKEN_SPLIT), byte_level()),
    "deepseek": sequence(
        "pretokenizers", split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
        DIGITS, byte_level(),
    ),
    "falcon": sequence(
        "pretokenizers", {"type": "Punctuation", "behavior": "Contiguous"}, byte_level(regex=True),
        {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Special:
    content: str
    flags: dict[str, bool] = field(default_factory=lambda: {"special": True})


def special(*contents: str, **flags: bool) -> list[Special]:
    return [Special(content, flags or {"special": True}) for content in contents]


@functools.cache
def byte_vocabulary() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tokens in the order of their ids, merges)"""
    with tempfile.TemporaryDirectory() as name:
        save_bpe(Path(name))
        vocab = json.loads((Path(name) / "vocab.json").read_text(encoding="utf-8"))
        lines = (Path(name) / "merges.txt").read_text(encoding="utf-8").splitlines()
    return tuple(sorted(vocab, key=vocab.__getitem__)), tuple(lines[1:])


def bytes_json(
    cut: str, specials: Sequence[Special], *, first: bool = False, bos: str | None = None, nfc: bool = False,
    ignore_merges: bool = False,
) -> Json:  # fmt: skip
    """A byte-level tokenizer.json. first: special tokens have the first ids. bos: the post-processor puts it first."""
    tokens, merges = byte_vocabulary()
    names = [each.content for each in specials]
    ordered = [*names, *tokens] if first else [*tokens, *names]
    ids = {name: number for number, name in enumerate(ordered)}
    vocab = {name: number for name, number in ids.items() if first or name not in names}
    after = byte_level(trim=False) if bos is None else sequence("processors", byte_level(), template(bos, ids))
    return whole(
        specials, ids,
        normalizer={"type": "NFC"} if nfc else None,
        pre_tokenizer=CUTS[cut],
        post_processor=after,
        decoder=byte_level(regex=True),
        model={"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
               "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
               "vocab": vocab, "merges": [merge.split(" ") for merge in merges]},
    )  # fmt: skip


def template(bos: str, ids: dict[str, int]) -> Json:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], second, text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }


def whole(specials: Sequence[Special], ids: dict[str, int], **parts: Any) -> Json:
    added = [{"id": ids[each.content], **token(each.content, **each.flags)} for each in specials]
    added.sort(key=lambda entry: entry["id"])
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


# ------------------------------------------------------------------------------------------- SentencePiece


@functools.cache
def spiece(**options: Any) -> bytes:
    return sentencepiece_file(**options)


@functools.cache
def spiece_vocabulary(content: bytes) -> tuple[dict[str, int], list[list[str]]]:
    """Pieces and merges, by transformers' own rule."""
    from transformers.convert_slow_tokenizer import SentencePieceExtractor
    from transformers.models.llama.tokenization_llama import LlamaTokenizer

    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        Path(file.name).write_bytes(content)
        found = SentencePieceExtractor(file.name).extract(LlamaTokenizer.model)
    return found["vocab"], [list(pair) for pair in found["merges"]]


def spiece_json(
    specials: Sequence[Special], *, form: str = "prepend", bos: str | None = "<s>", content: bytes | None = None
) -> Json:
    """tokenizer.json of a SentencePiece model. form: "prepend", as transformers 4 converts Llama's; "metaspace", as it
    does with legacy=False; "bare", where nothing is put before a text (Yi's)."""
    vocab, merges = spiece_vocabulary(content or spiece())
    own = special("<unk>", "<s>", "</s>")
    names = [each.content for each in specials if each.content not in vocab]
    ids = vocab | {name: len(vocab) + number for number, name in enumerate(names)}
    spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend: Json = {"type": "Prepend", "prepend": SPACE}
    normalizer = {"prepend": sequence("normalizers", prepend, spaces), "bare": sequence("normalizers", spaces)}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    steps: list[Json] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if form != "bare":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return whole(
        [*own, *specials], ids,
        normalizer=normalizer.get(form),
        pre_tokenizer=metaspace if form == "metaspace" else None,
        post_processor=template(bos, ids) if bos is not None else None,
        decoder=sequence("decoders", *steps),
        model={"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
               "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
               "vocab": vocab, "merges": [" ".join(pair) for pair in merges]},
    )  # fmt: skip
