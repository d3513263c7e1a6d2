"""A SentencePiece model as a backend of the `tokenizers` library, for checkpoints that add tokens to it.

SentencePiece's own library cannot take tokens that its file does not hold. transformers takes the model's pieces as a
BPE vocabulary instead and lets `tokenizers` cut the text at added tokens first; so does this file.
Reference: transformers 5, LlamaTokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpt_fast.text.added_tokens import AddedToken
from gpt_fast.text.gguf_tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from gpt_fast.text.token_bytes import SPACE

# Fields of google/sentencepiece, src/sentencepiece_model.proto
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of ModelProto
TEXT, KIND = 1, 3  # of SentencePiece; KIND is what a GGUF calls token_type
MODEL_TYPE = 3  # of TrainerSpec
CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES = 2, 3, 4  # of NormalizerSpec
UNIGRAM, BPE = 1, 2
BYTE = 6


@dataclass(frozen=True)
class PieceTable:
    """What a SentencePiece file says. kinds: each piece's, as in a GGUF's token_type."""

    pieces: tuple[str, ...]
    kinds: tuple[int, ...]
    is_bpe: bool
    has_charsmap: bool
    removes_spaces: bool
    begins_with_space: bool

    @property
    def unfit(self) -> str | None:
        """Why the `tokenizers` library would not keep the model's rules; None where it does."""
        reasons = {"is no BPE": not self.is_bpe, "normalizes characters": self.has_charsmap,
                   "removes repeated spaces": self.removes_spaces}  # fmt: skip
        return next((reason for reason, holds in reasons.items() if holds), None)

    def defines(self, token: AddedToken) -> bool:
        """Whether an added token is a user-defined piece: one that stands whole in every text."""
        found = token.content in self.pieces and self.pieces.index(token.content)
        return found is not False and token.id in (None, found) and self.kinds[found] == USER_DEFINED


def read_piece_table(content: bytes) -> PieceTable:
    """content: a file that the SentencePiece library has taken."""
    fields = list(proto_fields(content))
    pieces = [dict(proto_fields(value)) for number, value in fields if number == PIECES]
    trainer, normalizer = (dict(proto_fields(dict(fields).get(number, b""))) for number in (TRAINER, NORMALIZER))
    return PieceTable(
        pieces=tuple(piece.get(TEXT, b"").decode() for piece in pieces),
        kinds=tuple(piece.get(KIND, NORMAL) for piece in pieces),
        is_bpe=trainer.get(MODEL_TYPE, UNIGRAM) == BPE,
        has_charsmap=bool(normalizer.get(CHARSMAP)),
        removes_spaces=bool(normalizer.get(REMOVE_SPACES, 1)),
        begins_with_space=bool(normalizer.get(DUMMY_PREFIX, 1)),
    )


def sentencepiece_backend(table: PieceTable, *, legacy: bool, prefix: bool = True) -> Any:
    """A `tokenizers.Tokenizer` of the pieces; control, unknown and user-defined ones are added tokens.

    legacy, prefix: of spaces_as_llama. ValueError for a model whose rules `tokenizers` would not keep.
    """
    import tokenizers

    if table.unfit:
        raise ValueError(table.unfit)
    vocab = {piece: token_id for token_id, piece in enumerate(table.pieces)}
    bpe = tokenizers.models.BPE(vocab, merges_by_id(vocab), fuse_unk=True, byte_fallback=BYTE in table.kinds)
    backend = tokenizers.Tokenizer(bpe)
    spaces_as_llama(backend, legacy=legacy, prefix=prefix and table.begins_with_space)
    for piece, kind in zip(table.pieces, table.kinds, strict=True):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            backend.add_tokens([tokenizers.AddedToken(piece, special=kind != USER_DEFINED, normalized=False)])
    return backend


def spaces_as_llama(backend: Any, *, legacy: bool, prefix: bool) -> None:
    """Let the backend spell spaces as LlamaTokenizer does, whatever its file says.

    prefix: a space begins a text; legacy: every text between two added tokens too.
    """
    import tokenizers

    scheme = ("always" if legacy else "first") if prefix else "never"
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    steps = tokenizers.decoders
    strip = [steps.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = steps.Sequence([steps.Replace(SPACE, " "), steps.ByteFallback(), steps.Fuse(), *strip])


def merges_by_id(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to cut a piece into two, the lowest id first: BPE numbers its pieces in the order it learnt them."""
    cuts = [(token_id, piece[:at], piece[at:]) for piece, token_id in vocab.items() for at in range(1, len(piece))]
    cuts = [cut for cut in cuts if cut[1] in vocab and cut[2] in vocab]
    cuts.sort(key=lambda cut: (cut[0], len(cut[1])))
    return [(left, right) for _, left, right in cuts]


def proto_fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of every field of a protobuf message: an int for a varint, bytes for all else."""
    at = 0
    while at < len(content):
        key, at = read_varint(content, at)
        if key & 7 == 0:
            value, at = read_varint(content, at)
            yield key >> 3, value
            continue
        size, at = read_varint(content, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, content[at : at + size]
        at += size


def read_varint(content: bytes, at: int) -> tuple[int, int]:
    """A number in base 128, the smallest digit first; and where it ends."""
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 0x80:
            return value, at
