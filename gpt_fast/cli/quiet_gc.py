"""The garbage collector at rest while what stays is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """No collection meanwhile, and no later one looks through what there is at the end (gc.freeze).

    For the imports of a program of ours: torch's make hundreds of thousands of objects and no garbage, and the
    collector would go through the growing heap again and again, for a sixth of the time that the import takes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
