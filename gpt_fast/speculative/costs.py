"""What steps cost, as measured: the estimates by which the controller chooses. Plain Python, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Choice(NamedTuple):
    """A proposer and how many proposals a row may bring at most."""

    arm: str
    k: int


PLAIN = Choice("plain", 0)
# A plain step that did not overlap with the host's work: the runner waited, for there might have been proposals.
UNOVERLAPPED = Choice("unoverlapped", 0)


class BatchShape(NamedTuple):
    """What a step's cost depends on beside the choice.

    sampled: not all rows are greedy. Sampling takes the host's time, and neither the next step nor a draft's can begin
    before the tokens are known.
    """

    rows: int
    sampled: bool = False

    def nearest(self, known: Iterable[BatchShape]) -> BatchShape:
        return min(known, key=lambda other: (abs(other.rows - self.rows), other.sampled != self.sampled))


@dataclass
class Mean:
    """Of all values at first, then fading: of about the last `MEMORY`."""

    value: float = 0.0
    count: int = 0

    MEMORY = 12

    def learn(self, value: float) -> None:
        self.count = min(self.count + 1, self.MEMORY)
        self.value += (value - self.value) / self.count


class Costs:
    """Measured seconds of a whole step, by choice and batch; a batch never met is inferred from the nearest one."""

    def __init__(self) -> None:
        self.seconds: dict[Choice, dict[BatchShape, Mean]] = {}

    def learn(self, choice: Choice, batch: BatchShape, seconds: float) -> None:
        self.seconds.setdefault(choice, {}).setdefault(batch, Mean()).learn(seconds)

    def believable(self, choice: Choice, batch: BatchShape, seconds: float) -> float:
        """At most twice what was measured before: one hiccup of the machine must not decide."""
        known = self.seconds.get(choice, {}).get(batch)
        return min(seconds, 2 * known.value) if known else seconds

    def knows_plain(self, batch: BatchShape) -> bool:
        return batch in self.seconds.get(PLAIN, ())

    def plain(self, batch: BatchShape) -> float | None:
        known = self.seconds.get(PLAIN)
        return known[batch.nearest(known)].value if known else None

    def relative(self, arm: str, batch: BatchShape) -> dict[int, float]:
        """k c + v + o by k: the arm's steps in plain steps. None is below 1 or above that of a larger k, which do
        more: measurements that say otherwise are averaged."""
        arms = sorted(choice for choice in self.seconds if choice.arm == arm)
        found = [self._measured(choice, batch) for choice in arms]
        return {choice.k: max(1.0, cost) for choice, cost in zip(arms, rising(found), strict=True)}

    def _measured(self, choice: Choice, batch: BatchShape) -> tuple[float, int]:
        """In plain steps of the same batch, and how often it was measured."""
        known = self.seconds[choice]
        base = batch.nearest(known)
        return known[base].value / (self.plain(base) or known[base].value), known[base].count


def rising(found: Sequence[tuple[float, int]]) -> list[float]:
    """The values nearest to `found` (value, weight) that never fall: isotonic regression by pooling adjacent violators
    (Ayer et al. 1955)."""
    pools: list[tuple[float, int, int]] = []  # mean, weight, length
    for value, weight in found:
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, weight_a, length_a), (b, weight_b, length_b) = pools[-2:]
            total = weight_a + weight_b
            pools[-2:] = [((a * weight_a + b * weight_b) / total, total, length_a + length_b)]
    return [mean for mean, _, length in pools for _ in range(length)]


@dataclass
class CatchUp:
    """What it takes until a draft has seen a row's tokens: seconds a token, and the steps that such rows then stay."""

    token: float
    row_steps: float = 0.0
    rows: float = 0.0

    KEEP = 0.98
    PRIOR = 16.0  # steps that the first row is taken to stay

    @property
    def stay(self) -> float:
        """Steps to spread it over: a row that goes from one proposer to another and back must catch up every time."""
        return (self.row_steps + self.PRIOR) / (self.rows + 1)

    def used(self, rows: int, caught_up: int) -> None:
        """By `rows`, of which `caught_up` had to catch up."""
        self.row_steps = self.KEEP * self.row_steps + rows
        self.rows = self.KEEP * self.rows + caught_up

    def believable(self, seconds: float, tokens: int, plain: float) -> float:
        """A token costs a plain step at most, and at most twice what was measured before."""
        return min(seconds, tokens * min(plain, 2 * max(self.token, plain / 50)))

    def learn(self, seconds: float, tokens: int) -> None:
        self.token += (seconds / tokens - self.token) / 2
