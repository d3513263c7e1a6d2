"""A checkpoint directory's tokenizer, of whichever kind it has. A kind's module is imported where it is met."""

from __future__ import annotations

import re
from pathlib import Path

from gpt_fast.text.side_facts import read_side_facts
from gpt_fast.text.tokenizer import Tokenizer, TokenizerError


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
        from gpt_fast.text.hugging_face_tokenizer import load_hugging_face

        return load_hugging_face(path, facts)
    if path.name == "vocab.json":
        from gpt_fast.text.hugging_face_tokenizer import load_bpe_files

        return load_bpe_files(directory, facts)
    content = path.read_bytes()
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        from gpt_fast.text.llama3_tokenizer import load_llama3

        return load_llama3(path, content, facts)
    from gpt_fast.text.sentencepiece_tokenizer import load_sentencepiece

    return load_sentencepiece(path, content, facts)
