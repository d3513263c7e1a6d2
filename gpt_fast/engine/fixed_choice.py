"""Every step takes one choice, whether or not it pays: to measure, to prove, or because a draft was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpt_fast.engine.core import EngineCore
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.speculator import Speculator, Totals


def speculator_of(core: EngineCore) -> Speculator | None:
    """The core's speculator with all that it knows, beyond what a runner asks of one."""
    return core.speculator if isinstance(core.speculator, Speculator) else None


@contextmanager
def speculating(core: EngineCore, choice: Choice | None) -> Iterator[None]:
    """Let every step take this choice, with totals from zero; None: plain decode, without the speculator."""
    loaded = speculator_of(core)
    if loaded is None:
        yield
        return
    always = loaded.always
    try:
        with core.with_speculator(loaded if choice else None):
            loaded.always, loaded.totals = choice, Totals()
            yield
    finally:
        loaded.always = always
