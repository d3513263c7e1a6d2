"""A draft model's conversion for one target: the same vocabulary, and the target's tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.checkpoint.manifest import verify_manifest
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import Job
from gpt_fast.convert.side_files import read_side_files
from gpt_fast.text.load_tokenizer import load_tokenizer, tokenizer_file
from gpt_fast.text.tokenizer import Tokenizer

UNKNOWN = " ⁇ ".encode()  # how SentencePiece writes the token of what it does not know, however it is spelled


def draft_job(draft: Path, target: Path) -> Job:
    """The conversion of `draft`, with every side file (tokenizer, stop tokens, chat template) the target's.

    A draft without tokenizer files is taken at its vocabulary size.
    Raises:
        CheckpointError: a vocabulary size, or an id's token, that differs; the message names both.
        TokenizerError: a tokenizer that cannot be read.
    """
    verify_manifest(target, [*read_side_files(target)])
    job = open_job(draft)
    have, want = job.model_config.vocab_size, load_model_config(target).vocab_size
    if have != want:
        raise CheckpointError(draft / "config.json", f"vocab_size is {have}, but {target / 'config.json'} has {want}")
    if tokenizer_file(draft) is not None:
        if tokenizer_file(target) is None:
            raise CheckpointError(target, "has no tokenizer to compare the draft's with")
        check_same(draft, load_tokenizer(draft), target, load_tokenizer(target))
    return dataclasses.replace(job, side_files=read_side_files(target))


def check_same(draft: Path, theirs: Tokenizer, target: Path, ours: Tokenizer) -> None:
    """Every id is the same text in both, whatever kinds of files the two tokenizers are."""
    for token_id in range(max(theirs.vocab_size, ours.vocab_size)):
        have, want = (one.token_bytes(token_id, keep_specials=True) for one in (theirs, ours))
        if have != want and UNKNOWN not in (have, want):
            raise CheckpointError(
                draft,
                f"its tokenizer's token {token_id} is {spelled(have)}, but in {target} it is {spelled(want)}: "
                "not one vocabulary",
            )


def spelled(token: bytes) -> str:
    return repr(token.decode(errors="backslashreplace")) if token else "none"
