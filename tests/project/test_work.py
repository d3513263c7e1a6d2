"""The counters of work that tests use instead of clocks."""

import pytest

from support import work
from support.work import TooMuchWork, bounded_lines, ends


def loop(times: int) -> int:
    total = 0
    for i in range(times):
        total += i
    return total


def test_lines_are_counted():
    with bounded_lines(210):
        loop(100)
    with pytest.raises(TooMuchWork, match="more than 210 lines"), bounded_lines(210):
        loop(110)


def test_what_does_not_end_fails(monkeypatch):
    monkeypatch.setattr(work, "HANG_SECONDS", 0.01)
    with pytest.raises(TooMuchWork, match=r"not at its end after 0\.01 s"), ends():
        while True:
            pass
    with ends():
        loop(1)
