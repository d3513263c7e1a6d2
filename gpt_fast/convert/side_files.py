"""What a checkpoint carries beside its weights: tokenizer, chat templates, ids that end an answer.

Their names are in checkpoint/side_names.py. Files of tokenizers in other forms are known too, so that a checkpoint is
not converted without the only tokenizer that it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.checkpoint.side_names import side_files_in
from gpt_fast.files import read_json_object
from gpt_fast.text.load_tokenizer import load_tokenizer, tokenizer_file

# Tokenizers that other programs read: Mistral's, Qwen's and Kimi's first ones, BERT's, SentencePiece's by other names.
FOREIGN = re.compile(
    r"tekken\.json|tokenizer\.model\..+|.*tiktoken.*|sp(iece|m)\.model|sentencepiece.*\.model|vocab\.txt"
)


def read_side_files(directory: Path) -> dict[str, bytes]:
    """Name -> content of each side file that is there, JSON checked.

    Raises:
        CheckpointError: the directory has a tokenizer, but none in a form that is read here.
    """
    present = {name: directory / name for name in side_files_in(directory)}
    for path in present.values():
        if path.suffix == ".json":
            read_json_object(path)
    check_readable(directory)
    return {name: path.read_bytes() for name, path in present.items()}


def check_readable(directory: Path) -> None:
    if tokenizer_file(directory) is not None or not directory.is_dir():
        return
    others = [path.name for path in sorted(directory.iterdir()) if FOREIGN.fullmatch(path.name)]
    others += [name for name in ("vocab.json", "merges.txt") if (directory / name).is_file()]
    if others:
        way_out = (
            "looked for tokenizer.json, tokenizer.model, vocab.json with merges.txt; transformers' save_pretrained"
        )
        raise CheckpointError(directory / others[0], f"is no tokenizer that is read here ({way_out} writes the first)")


def check_tokenizer(directory: Path, names: Iterable[str], *, vocab_size: int, origin: Path) -> None:
    """Refuse a tokenizer that cannot be read or has ids past the embedding. A checkpoint may come without one.

    directory: where the side files `names` lie, with config.json. origin: where they come from, for the message.
    """
    file = tokenizer_file(directory)
    if file is None or file.name not in names:
        return
    tokens = load_tokenizer(directory).vocab_size
    if tokens > vocab_size:
        raise CheckpointError(origin / file.name, f"has {tokens} tokens, vocab_size is {vocab_size}")
