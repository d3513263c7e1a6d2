"""Waiting in tests. How long is no promise of the product: it is there for what hangs, on a machine however busy."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_SECONDS = 120


def wait_until(condition: Callable[[], object], *, meanwhile: Callable[[], object] = lambda: time.sleep(0.005)) -> None:
    """Return when the condition holds; `meanwhile` is called as often as it does not."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        meanwhile()
