"""Hands a batch's rows to whoever answers them, and takes each answer once. No torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gpt_fast.batch.batch_file import Row
from gpt_fast.batch.journal import Journal


@dataclass(frozen=True)
class Done:
    """A row's answer. tokens: that it took to decode."""

    number: int
    line: str
    tokens: int


@dataclass(frozen=True)
class Deal:
    """rows: to answer. over: there will be none again; where it is False, some may come back from others."""

    rows: list[Row]
    over: bool


Trade = Callable[[list[Done], int], Deal]


@dataclass
class Dealer:
    """Thread-safe. told: called with each new answer."""

    rows: Iterator[Row]  # that the journal has no answer of
    journal: Journal
    told: Callable[[Done], None]
    _held: dict[str, dict[int, Row]] = field(default_factory=dict)  # by worker, what it has not answered yet
    _back: deque[Row] = field(default_factory=deque)  # of workers that are gone
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def trade(self, worker: str, done: list[Done], want: int) -> Deal:
        """Take what a worker has answered, and give it as many rows as it wants where there are as many."""
        with self._lock:
            mine = self._held.setdefault(worker, {})
            for each in done:
                mine.pop(each.number, None)
                if self.journal.add(each.number, each.line):
                    self.told(each)
            given = [row for _ in range(want) if (row := self._next()) is not None]
            mine.update((row[0], row) for row in given)
            return Deal(given, over=want > 0 and not given and not any(self._held.values()))

    def lost(self, worker: str) -> None:
        """A worker is gone: what it had not answered goes to the others."""
        with self._lock:
            self._back.extend(self._held.pop(worker, {}).values())

    def _next(self) -> Row | None:
        return self._back.popleft() if self._back else next(self.rows, None)
