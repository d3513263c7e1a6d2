"""How a command ends on a user's mistake: one line on stderr and status 2, as argparse's own errors do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
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


def at_least(low: int) -> Callable[[str], int]:
    """A type for argparse."""

    def whole(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"must be a whole number (got {value!r}, allowed {low} or more)")
        return number

    return whole


def http_url(value: str) -> str:
    """A type for argparse."""
    if not value.startswith("http://"):
        raise argparse.ArgumentTypeError(f"must be a URL (got {value!r}, allowed http://HOST:PORT/PATH)")
    return value


def refuse_useless(
    parser: argparse.ArgumentParser, arguments: list[str] | None, names: Iterable[str], *, why: str
) -> None:
    """Refuse flags that another one leaves without effect, even where their values are the defaults."""
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(arguments))))
    given = vars(parser.parse_args(arguments, blank))  # argparse sets no default where there is a value
    for name in names:
        if given[name] is not None:
            raise ValueError(f"--{name}: has no effect: {why}")


def text(error: Exception) -> str:
    """In one line; of an OSError the file first, as everything else names it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
