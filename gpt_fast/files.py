"""Files that are written whole or not at all, and JSON objects that are read or refused in one line."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt_fast.config import ConfigError


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time within it, whoever else names the same file; the second waits for the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, hidden, to write to; it takes the place of `path` at the end.

    Who reads `path` meanwhile finds the old file or the new one, never a part. On an error the new one is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, encoding: str = "utf-8") -> None:
    """Whole or not at all; its folder is made."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding=encoding)


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """One JSON object, whole or not at all, in lines that people can read; its folder is made."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def read_json_object(
    path: Path,
    *,
    optional: bool = False,
    missing: str = "no such file",
    error: Callable[[str, str], Exception] = ConfigError,
) -> dict[str, Any]:
    """Parse a file that must hold one JSON object; NaN and Infinity are not JSON.

    Args:
        optional: {} where there is no such file. missing: else what is said then.
        error: makes the exception that is raised, of the file's path and what is wrong with it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except FileNotFoundError:
        if optional:
            return {}
        raise error(str(path), missing) from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(str(path), f"is not readable JSON: {problem}") from None
    if not isinstance(values, dict):
        raise error(str(path), f"must hold one JSON object (got {type(values).__name__})")
    return values


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
