"""What tells an answer from all others: when it was made, and ids that nothing else has. No torch here."""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stamp:
    """One answer's. created: seconds since 1970. new_hex: 32 hexadecimal digits, others each time."""

    created: int
    new_hex: Callable[[], str]

    def new_id(self, kind: str) -> str:
        """As OpenAI and Anthropic write the id of a part of an answer."""
        return f"{kind}_{self.new_hex()[:24]}"


def fresh() -> Stamp:
    return Stamp(int(time.time()), lambda: uuid.uuid4().hex)


def derived(name: str) -> Stamp:
    """The same for the same name, so that an answer made again is the same to the byte; it tells no time (0)."""
    count = itertools.count()
    return Stamp(0, lambda: hashlib.sha256(f"{name}/{next(count)}".encode()).hexdigest()[:32])
