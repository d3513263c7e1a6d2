"""Pause Python's garbage collector while a program imports what it needs: nothing of that is ever garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_rest() -> Iterator[None]:
    """Collect nothing within it, and leave what was made there out of every later collection (gc.freeze).

    Importing torch creates hundreds of thousands of objects that live as long as the process. Scanning them again and
    again as they grow costs a sixth of the import.
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
