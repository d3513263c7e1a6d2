"""How a command ends on a user's mistake: one line on stderr and status 2, as argparse's own errors do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# ConfigError, CheckpointError and QuantizationError are ValueErrors.
MISTAKES: tuple[type[Exception], ...] = (ValueError, OSError)


@contextmanager
def one_line_errors(name: str = "error", *, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around all that a command does after its arguments are parsed. also: what else is the user's to mend."""
    try:
        yield
    except MISTAKES + also as error:
        print(f"{name}: {text(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def text(error: Exception) -> str:
    """In one line; of an OSError the file first, as everything else names it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
