"""How much work a call makes, counted and not timed: a clock would measure whatever else the machine does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HANG_SECONDS = 60  # of this process's own CPU time


class TooMuchWork(AssertionError):
    pass


@contextmanager
def bounded_lines(limit: int) -> Iterator[None]:
    """Fails once the functions called within have run more than `limit` lines of Python.

    What one line makes C do is not counted: `ends` is for that.
    """
    count, before = 0, sys.gettrace()

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        if count > limit:
            raise TooMuchWork(f"more than {limit} lines of Python ran")
        return trace

    with ends():
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


@contextmanager
def ends() -> Iterator[None]:
    """Fails what has used a minute of CPU time: for what would run for ever, or as good as."""

    def fail(*_: object) -> None:
        raise TooMuchWork(f"not at its end after {HANG_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
