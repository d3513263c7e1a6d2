"""A SentencePiece tokenizer.model: by its own library, or by `tokenizers` where JSON files beside it add tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt_fast.text.added_tokens import AddedToken, add_text_template, add_tokens
from gpt_fast.text.hugging_face_tokenizer import HuggingFaceTokenizer, decoder_of
from gpt_fast.text.sentencepiece_backend import PieceTable, read_piece_table, sentencepiece_backend
from gpt_fast.text.side_facts import SideFacts
from gpt_fast.text.token_bytes import SPACE, sentencepiece_bytes
from gpt_fast.text.tokenizer import Tokenizer, TokenizerError, control_pattern


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
