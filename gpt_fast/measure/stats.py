"""Percentiles, and what counts as measured on a quiet machine."""

from __future__ import annotations

from collections.abc import Iterable

FOREIGN_LIMIT = 0.10  # of the machine


def is_quiet(foreign: float | None, limit: float) -> bool:
    """Unknown load passes: the report says that it was not known."""
    return foreign is None or foreign <= limit


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Linear between the two nearest ranks; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
