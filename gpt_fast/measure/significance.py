"""The statistics of verify and report: chi-square, total variation, confidence intervals. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ChiSquare(NamedTuple):
    statistic: float
    freedom: int
    p_value: float


def chi_square(observed_N: Tensor, expected_N: Tensor, *, smallest: float = 5.0) -> ChiSquare:
    """Pearson's test of counts against their expectations; cells expecting less than `smallest` are merged.

    An observation where nothing is expected at all is impossible, not unlikely: p is then 0.
    """
    observed_N, expected_N = observed_N.double().flatten(), expected_N.double().flatten()
    if bool(((expected_N == 0) & (observed_N > 0)).any()):
        return ChiSquare(math.inf, 0, 0.0)
    rare_N = expected_N < smallest
    cells = [(observed_N[~rare_N], expected_N[~rare_N])]
    if expected_N[rare_N].sum() > 0:
        cells.append((observed_N[rare_N].sum()[None], expected_N[rare_N].sum()[None]))
    observed, expected = (torch.cat(column) for column in zip(*cells, strict=True))
    statistic, freedom = float(((observed - expected).square() / expected).sum()), len(expected) - 1
    if freedom < 1:
        return ChiSquare(0.0, 0, 1.0)
    tail = torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2).double())
    return ChiSquare(statistic, freedom, float(tail))


def total_variation(observed_N: Tensor, probability_N: Tensor) -> float:
    """Half the L1 distance between the observed shares and the probabilities."""
    observed_N = observed_N.double().flatten()
    return float((observed_N / observed_N.sum() - probability_N.double().flatten()).abs().sum() / 2)


def expected_total_variation(probability_N: Tensor, count: int) -> float:
    """What `count` honest draws show on average: each share's deviation is about normal."""
    p = probability_N.double().flatten()
    return float((p * (1 - p) / count).sqrt().sum() * math.sqrt(2 / math.pi) / 2)


def wilson(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, extra = successes / trials, z * z / trials
    centre, half = rate + extra / 2, z * math.sqrt(rate * (1 - rate) / trials + extra / (4 * trials))
    return (centre - half) / (1 + extra), (centre + half) / (1 + extra)


def uniform_p_value(values: Sequence[float], *, bins: int = 20) -> ChiSquare:
    """Whether values in [0, 1) are uniform."""
    count_N = torch.histc(torch.tensor(values, dtype=torch.float64), bins=bins, min=0.0, max=1.0)
    return chi_square(count_N, torch.full((bins,), len(values) / bins, dtype=torch.float64))
