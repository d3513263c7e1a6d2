"""A draft model's conversion for one target: the same vocabulary, and the target's tokenizer."""

from __future__ import annotations

import base64
import binascii
import dataclasses
from pathlib import Path

from gpt_fast.checkpoint.hf_config import load_model_config, model_config_from_hf
from gpt_fast.checkpoint.manifest import verify_manifest
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import Job, read_side_files
from gpt_fast.files import read_json_object


def draft_job(draft: Path, target: Path) -> Job:
    """The conversion of `draft`, with every side file (tokenizer, stop tokens, chat template) the target's.

    A draft without tokenizer files is taken at its vocabulary size.
    Raises:
        CheckpointError: a vocabulary size, or an id's token, that differs; the message names both.
    """
    verify_manifest(target, [name for name in read_side_files(target)])
    job = open_job(draft)
    have, want = model_config_from_hf(job.config).vocab_size, load_model_config(target).vocab_size
    if have != want:
        raise CheckpointError(draft / "config.json", f"vocab_size is {have}, but {target / 'config.json'} has {want}")
    theirs = read_vocabulary(draft)
    if theirs is not None:
        ours = read_vocabulary(target)
        if ours is None:
            raise CheckpointError(target, "has no tokenizer to compare the draft's with")
        check_same(draft, theirs, target, ours)
    return dataclasses.replace(job, side_files=read_side_files(target))


def check_same(draft: Path, theirs: dict[int, str], target: Path, ours: dict[int, str]) -> None:
    for token_id in sorted(theirs.keys() | ours.keys()):
        have, want = theirs.get(token_id), ours.get(token_id)
        if have != want:
            raise CheckpointError(
                draft,
                f"its tokenizer's token {token_id} is {have!r}, but in {target} it is {want!r}: not one vocabulary",
            )


def read_vocabulary(directory: Path) -> dict[int, str] | None:
    """Token id -> token, from tokenizer.json or else tokenizer.model (SentencePiece or tiktoken); None: neither."""
    if (directory / "tokenizer.json").is_file():
        return json_vocabulary(directory / "tokenizer.json")
    path = directory / "tokenizer.model"
    if not path.is_file():
        return None
    return tiktoken_vocabulary(path) if is_tiktoken(path) else sentencepiece_vocabulary(path)


def json_vocabulary(path: Path) -> dict[int, str]:
    values = read_json_object(path)
    try:
        vocab = values["model"]["vocab"]
        pairs = (
            enumerate(piece for piece, _ in vocab) if isinstance(vocab, list) else ((i, t) for t, i in vocab.items())
        )
        added = {entry["id"]: entry["content"] for entry in values.get("added_tokens") or []}
        return {int(token_id): str(token) for token_id, token in pairs} | added
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"has no readable vocabulary ({error})") from None


def sentencepiece_vocabulary(path: Path) -> dict[int, str]:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(path, f"is not a SentencePiece model ({error})") from None
    return {token_id: model.id_to_piece(token_id) for token_id in range(model.get_piece_size())}


def is_tiktoken(path: Path) -> bool:
    """tiktoken files are lines of base64 and a rank; SentencePiece's are binary."""
    with open(path, "rb") as file:
        first = file.readline(256).split()
    try:
        return len(first) == 2 and first[1].isdigit() and bool(base64.b64decode(first[0], validate=True))
    except binascii.Error:
        return False


def tiktoken_vocabulary(path: Path) -> dict[int, str]:
    pairs = (line.split() for line in path.read_bytes().splitlines() if line)
    try:
        return {int(rank): base64.b64decode(token).decode("latin-1") for token, rank in pairs}
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(path, f"is not a tiktoken file ({error})") from None
