"""The prompts that drafts are assessed on: JSON lines of {"category": ..., "prompt": ...}."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt_fast.config import ConfigError
from gpt_fast.llm import Engine
from gpt_fast.measure.texts import file_text

SHIPPED = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    category: str
    tokens: list[int]


def read_prompts(path: Path, engine: Engine, *, longest: int, each: int = 0) -> list[Prompt]:
    """A file's prompts as tokens, by the chat template where there is one; the first `each` of a category (0: all).

    A prompt of more than `longest` tokens keeps its end. ConfigError names the line that is not a prompt.
    """
    prompts: list[Prompt] = []
    for number, line in enumerate(file_text(path).content.splitlines(), start=1):
        if not line.strip():
            continue
        category, text = read_line(line, where=f"{path}:{number}")
        if not each or sum(p.category == category for p in prompts) < each:
            prompts.append(Prompt(category, encode(engine, text)[-longest:]))
    if not prompts:
        raise ConfigError("prompts", "the file holds none", got=str(path))
    return prompts


def read_line(line: str, *, where: str) -> tuple[str, str]:
    try:
        fields = json.loads(line)
        category, prompt = fields["category"], fields["prompt"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(where, 'is not {"category": ..., "prompt": ...}') from None
    if not isinstance(category, str) or not isinstance(prompt, str) or not prompt:
        raise ConfigError(where, "category and prompt must be strings")
    return category, prompt


def encode(engine: Engine, text: str) -> list[int]:
    if engine.chat_template is None:
        return engine.encode(text)
    return engine.encode_chat([{"role": "user", "content": text}])


def categories(prompts: Sequence[Prompt]) -> list[str]:
    return list(dict.fromkeys(p.category for p in prompts))
