"""The names of what a checkpoint carries beside its weights: tokenizer, chat templates, ids that end an answer.

These and no others are fetched, read, written and listed; all of them are what transformers reads of a text model's
directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

NAMES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"
TEMPLATE = re.compile(TEMPLATES + r"/[^/\\\0]+\.jinja")


def is_side_file(name: str) -> bool:
    """name: relative to the checkpoint's directory."""
    return name in NAMES or TEMPLATE.fullmatch(name) is not None


def side_files_in(directory: Path) -> Iterator[str]:
    """Those that a directory has."""
    names = [*NAMES, *sorted(f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).glob("*.jinja"))]
    return (name for name in names if (directory / name).is_file())
