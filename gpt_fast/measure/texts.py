"""Text to calibrate and to judge a quantization on, available offline.

The built-in text is the language help in Python's own `pydoc_data.topics`. Its paragraphs are made unique first (the
topics quote each other), then split: calibration reads the first 70 %, evaluation the rest, so that neither sees the
other's. The text differs between Python releases, so its hash goes into what is made from it.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

DEFAULT_SHA256 = "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee"  # Python 3.11.7
CALIBRATION_SHARE = 0.7


class Text(NamedTuple):
    """A text, where it came from, and the hash of the whole it was taken from."""

    content: str
    source: str
    sha256: str


def default_text() -> Text:
    """All topics in alphabetical order. Warns when this Python's differ from those that the docs' figures used."""
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics))
    text = Text(content, "pydoc_data.topics", sha256(content))
    if text.sha256 != DEFAULT_SHA256:
        warnings.warn(
            f"pydoc_data.topics of this Python has sha256 {text.sha256[:12]}, not {DEFAULT_SHA256[:12]}: "
            "compare figures only with those of the same hash",
            stacklevel=2,
        )
    return text


def file_text(path: Path) -> Text:
    """A UTF-8 file, whole."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return Text(content, path.name, sha256(content))


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def calibration_part(text: Text) -> Text:
    return text._replace(content=split(text.content)[0])


def held_out_part(text: Text) -> Text:
    return text._replace(content=split(text.content)[1])


def split(content: str) -> tuple[str, str]:
    """Two parts without a paragraph in common, about CALIBRATION_SHARE of the characters in the first."""
    paragraphs = list(dict.fromkeys(p for p in content.split("\n\n") if p.strip()))
    first, size = 0, CALIBRATION_SHARE * sum(map(len, paragraphs))
    while size > 0 and first < len(paragraphs):
        size -= len(paragraphs[first])
        first += 1
    return "\n\n".join(paragraphs[:first]), "\n\n".join(paragraphs[first:])


def windows(tokens: list[int], *, length: int, limit: int, prefix: list[int]) -> list[list[int]]:
    """At most `limit` windows of `length` tokens, evenly spread over the text, each beginning with `prefix` (BOS).

    ValueError when the text is shorter than one window.
    """
    fresh = length - len(prefix)
    count = len(tokens) // fresh if fresh > 0 else 0
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, fewer than one window of {length}")
    chosen = min(limit, count)
    starts = [i * count // chosen * fresh for i in range(chosen)]
    return [prefix + tokens[start : start + fresh] for start in starts]
