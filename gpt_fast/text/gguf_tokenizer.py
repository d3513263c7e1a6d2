"""A GGUF's own vocabulary as a Hugging Face tokenizer.json, so that what is written beside converted weights is plain.

Two kinds: `tokenizer.ggml.model` "gpt2" is byte-level BPE with merges, "llama" SentencePiece's BPE with scores and
byte fallback. Errors are ConfigError, naming the metadata key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_fast.config import ConfigError
from gpt_fast.text.token_bytes import SPACE

# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`: every pattern cuts the pieces the one before it left.
# Sources: ggml-org/llama.cpp src/llama-vocab.cpp, and the published tokenizer.json of each model.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's: meta-llama/llama-models, models/llama3/tokenizer.py. Qwen takes digits one by one.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "mpt": (_GPT2,),
    "olmo": (_GPT2,),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "dbrx": (LLAMA3_SPLIT,),
    "smaug-bpe": (LLAMA3_SPLIT,),
    "falcon3": (LLAMA3_SPLIT,),
    "llama-bpe": (LLAMA3_SPLIT,),
    "llama3": (LLAMA3_SPLIT,),
    "llama-v3": (LLAMA3_SPLIT,),
    "tekken": (_TEKKEN,),
}
# Pieces that are tokens stand although no merges lead to them, and BOS begins a text where the file does not say.
WHOLE_PIECES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"})
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # `tokenizer.ggml.token_type`
REFUSED = ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces")


def tokenizer_json_from_gguf(fields: Mapping[str, Any]) -> bytes:
    """The tokenizer.json that a GGUF's metadata describes. fields: its metadata, `tokenizer.ggml.*` in plain Python.

    `tokenizer.ggml.model` "gpt2" is byte-level BPE with merges, "llama" SentencePiece's BPE with scores. Any other,
    an unknown `tokenizer.ggml.pre`, or a part a tokenizer.json cannot hold is an error naming it.
    """
    import tokenizers

    builders = {"gpt2": byte_level_json, "llama": sentencepiece_json}
    kind = fields.get("tokenizer.ggml.model")
    if kind not in builders:
        raise ConfigError("tokenizer.ggml.model", "is not supported", got=kind, allowed=", ".join(builders))
    for key in REFUSED:
        if fields.get(key):
            raise ConfigError(key, "is a normalization that this conversion cannot keep")
    tokens = listed(fields, "tokens", str)
    if len(set(tokens)) != len(tokens):
        raise ConfigError("tokenizer.ggml.tokens", "has the same token under two ids")
    content = json.dumps({"version": "1.0", "truncation": None, "padding": None} | builders[kind](fields, tokens))
    try:
        tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError("tokenizer.ggml", f"is no usable vocabulary: {error}") from None
    return content.encode()


def byte_level_json(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in SPLITS:
        raise ConfigError("tokenizer.ggml.pre", "is not supported", got=pre, allowed=", ".join(SPLITS))
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    merges = [merge.split(" ") for merge in listed(fields, "merges", str)]
    ignore_merges = pre in WHOLE_PIECES
    return {
        "added_tokens": added_tokens(fields, tokens),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": text_template(fields, tokens, add_bos=ignore_merges),
        "decoder": byte_level,
        "model": bpe_model(tokens, merges, ignore_merges=ignore_merges),
    }


def sentencepiece_json(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    spaced = fields.get("tokenizer.ggml.add_space_prefix", True)
    unknown = named_token(fields, tokens, "unknown")
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    to_space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if spaced:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    prefix = [{"type": "Prepend", "prepend": SPACE}] if spaced else []
    return {
        "added_tokens": added_tokens(fields, tokens),
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, to_space]},
        "pre_tokenizer": None,
        "post_processor": text_template(fields, tokens, add_bos=True),
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": bpe_model(
            tokens, merges_by_score(fields, tokens), unk_token=unknown, fuse_unk=True, byte_fallback=True
        ),
    }


def merges_by_score(fields: Mapping[str, Any], tokens: list[str]) -> list[list[str]]:
    """SentencePiece joins the neighbours whose joint piece scores best; as merges: every way to cut a normal piece
    into two, best score first (huggingface/transformers, generate_merges)."""
    scores, types = listed(fields, "scores", float), listed(fields, "token_type", int)
    if not len(tokens) == len(scores) == len(types):
        raise ConfigError("tokenizer.ggml", f"has {len(tokens)} tokens, {len(scores)} scores, {len(types)} types")
    scored = {tokens[i]: scores[i] for i in range(len(tokens)) if types[i] == NORMAL}
    cuts = [(token, cut) for token in scored for cut in range(1, len(token))]
    cuts = [(token, cut) for token, cut in cuts if token[:cut] in scored and token[cut:] in scored]
    cuts.sort(key=lambda at: (-scored[at[0]], -at[1]))  # one piece cut in many ways: the longest left part first
    return [[token[:cut], token[cut:]] for token, cut in cuts]


def bpe_model(tokens: list[str], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    return {"type": "BPE", "dropout": None, "vocab": vocab, "merges": merges} | options


def added_tokens(fields: Mapping[str, Any], tokens: list[str]) -> list[dict[str, Any]]:
    """Control tokens, which only templates make, and user-defined ones, which any text makes."""
    types = listed(fields, "token_type", int)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": token_id, "content": token, "special": kind != USER_DEFINED, **flags}
        for token_id, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def text_template(fields: Mapping[str, Any], tokens: list[str], *, add_bos: bool) -> dict[str, Any] | None:
    """The post-processor that puts BOS before and EOS after a text. add_bos: what holds where the file is silent."""
    silent = {"bos": add_bos, "eos": False}
    wanted = [name for name in silent if fields.get(f"tokenizer.ggml.add_{name}_token", silent[name])]
    used = {name: named_token(fields, tokens, name) for name in wanted}
    if not used:
        return None
    ids = {token: fields[f"tokenizer.ggml.{name}_token_id"] for name, token in used.items()}

    def sequence(letter: str) -> list[dict[str, Any]]:
        around = {name: {"SpecialToken": {"id": token, "type_id": 0}} for name, token in used.items()}
        parts = [around.get("bos"), {"Sequence": {"id": letter, "type_id": 0}}, around.get("eos")]
        return [part for part in parts if part]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": sequence("A") + sequence("B"),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in ids.items()},
    }


def named_token(fields: Mapping[str, Any], tokens: list[str], name: str) -> str:
    """The spelling of a named token, whose id the file must give."""
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = fields.get(key)
    if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        raise ConfigError(key, "is no token", got=token_id, allowed=f"0 to {len(tokens) - 1}")
    return tokens[token_id]


def listed(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    value = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not all(isinstance(v, kind) for v in value):
        raise ConfigError(f"tokenizer.ggml.{name}", f"is missing or not a list of {kind.__name__}")
    return list(value)
