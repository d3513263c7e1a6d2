"""How many examples a property or a family of cases is tried with: a test says how many it wants, `make check` takes
fewer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

QUICK = 10
NIGHTLY = 50
DEFAULT_COUNT = 100  # of a property that does not say


def register_profiles() -> None:
    """quick: at most 10 examples (make check). ci: as many as a test says (make test). nightly: 50 times as many."""
    common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
    settings.register_profile("ci", max_examples=DEFAULT_COUNT, derandomize=True, **common)
    settings.register_profile("quick", max_examples=QUICK, derandomize=True, **common)
    settings.register_profile("nightly", max_examples=DEFAULT_COUNT * NIGHTLY, **common)


def examples(count: int, base: settings | None = None, **more: Any) -> settings:
    """settings(base, max_examples=count, ...) as the profile in force scales it; a decorator, as settings is."""
    profile = settings.get_current_profile_name()
    scaled = {"quick": min(count, QUICK), "nightly": count * NIGHTLY}.get(profile, count)
    return settings(base, max_examples=scaled, **more)


def rest_slow(values: Iterable[Any], quick: int = 1) -> list[Any]:
    """For parametrize: the first `quick` values are of `make check`, the others, that differ little, of `make test`."""
    values = list(values)
    return [*values[:quick], *(pytest.param(value, marks=pytest.mark.slow) for value in values[quick:])]
