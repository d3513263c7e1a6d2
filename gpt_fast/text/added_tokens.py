"""Tokens that a checkpoint adds to its vocabulary by JSON files, as transformers adds them to a `tokenizers` backend.

`added_tokens_decoder` of tokenizer_config.json gives ids and flags; before it there was added_tokens.json (spelling ->
id), whose tokens are special where another file names them so. Tokens that are named (eos_token, ...) or listed
(additional_special_tokens) and not in the vocabulary come behind those; but not a pad_token and its like, which no
prompt holds, for a model may have no row for it.
Reference: transformers 5, PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.__init__.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

NAMED = ("bos_token", "eos_token", "unk_token")
UNUSED = ("pad_token", "sep_token", "cls_token", "mask_token")
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
LISTS = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """id: None where the files leave it to the vocabulary, which goes on counting. Flags as in tokenizer.json."""

    id: int | None
    content: str
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def read_added_tokens(
    config: Mapping[str, Any], special_map: Mapping[str, Any], legacy: Mapping[str, Any]
) -> list[AddedToken]:
    """The tokens in the order in which they join the vocabulary.

    config, special_map, legacy: tokenizer_config.json, special_tokens_map.json and added_tokens.json, {} where there
    is none. ValueError for an entry that is no token.
    """
    decoder = config.get("added_tokens_decoder")
    fields = config if decoder is not None else {**config, **special_map}
    named = [token_of(fields[key], None) for key in NAMED if fields.get(key) is not None]
    listed = [token_of(value, None) for key in LISTS for value in spread(fields.get(key))]
    unused = [token_of(fields[key], None) for key in UNUSED if fields.get(key) is not None]
    specials = {token.content for token in (*named, *listed, *unused)}
    if decoder is not None:
        tokens = [token_of(value, key) for key, value in decoder.items()]
        tokens = [replace(token, special=token.special or token.content in specials) for token in tokens]
    else:
        tokens = [
            AddedToken(id_of(key), text, special=text in specials, normalized=text not in specials)
            for text, key in legacy.items()
        ]
    tokens.sort(key=lambda token: token.id or 0)
    known = {token.content for token in tokens}
    for token in (*named, *listed):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    return tokens


def spread(value: object) -> list[Any]:
    """The tokens of a list, or of an object that names each."""
    return list(value.values()) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else []


def token_of(value: object, token_id: object) -> AddedToken:
    """A token from its spelling or its object; one without an id is special whatever its object says."""
    number = None if token_id is None else id_of(token_id)
    if isinstance(value, str):
        return AddedToken(number, value, special=True, normalized=False)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise ValueError(f"{value!r} is no token")
    special = number is None or value.get("special") is True
    flags = {name: value.get(name) is True for name in ("lstrip", "rstrip", "single_word")}
    normalized = value.get("normalized", not special) is True
    return AddedToken(number, value["content"], special=special, normalized=normalized, **flags)


def id_of(value: object) -> int:
    if isinstance(value, int) or (isinstance(value, str) and value.isascii() and value.isdigit()):
        return int(value)
    raise ValueError(f"{value!r} is no token id")


def is_new(backend: Any, token: AddedToken) -> bool:
    """Whether a `tokenizers.Tokenizer` read from a file lacks the token, or has it with other flags than those that a
    file beside it gives it. What is only named there is as the backend's own file has it."""
    known = {own.content: own for own in backend.get_added_tokens_decoder().values()}.get(token.content)
    if known is None or token.id is None:
        return known is None
    return any(getattr(known, name) != getattr(token, name) for name in FLAGS)


def add_tokens(backend: Any, tokens: list[AddedToken]) -> None:
    """Add the tokens to a `tokenizers.Tokenizer`. ValueError where one would get another id than its file says."""
    import tokenizers

    for token in tokens:
        flags = {name: getattr(token, name) for name in FLAGS}
        backend.add_tokens([tokenizers.AddedToken(token.content, **flags)])
        got = backend.token_to_id(token.content)
        if token.id is not None and got != token.id:
            raise ValueError(f"added token {token.content!r} has the id {token.id}, but the vocabulary makes it {got}")


def add_text_template(backend: Any, bos: str | None, eos: str | None) -> None:
    """Let the backend put bos before and eos after a text; None: not that."""
    import tokenizers

    used = [token for token in (bos, eos) if token is not None]
    single = " ".join([*([f"{bos}:0"] if bos is not None else []), "$A:0", *([f"{eos}:0"] if eos is not None else [])])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, pair=f"{single} $B:1", special_tokens=[(token, backend.token_to_id(token)) for token in used]
    )
