"""Which proposals a step verifies: controller of speculative decoding. Plain Python, no torch.

Its promise: speculation costs at most a small, stated share of the time, however bad the proposals are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


def expected_tokens(rate: float, count: int) -> float:
    """tau: tokens a verification brings, (1 - a^(k+1)) / (1 - a) for k proposals accepted at rate a each."""
    return float(count + 1) if rate >= 1 else (1 - rate ** (count + 1)) / (1 - rate)


@dataclass
class Acceptance:
    """Accepted and evaluated proposals (those up to the first refusal), old ones fading."""

    accepted: float = 0.0
    evaluated: float = 0.0

    def learn(self, accepted: int, count: int, *, keep: float) -> None:
        self.accepted = keep * self.accepted + accepted
        self.evaluated = keep * self.evaluated + min(accepted + 1, count)

    def rate(self, *, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.evaluated + weight)


class Choice(NamedTuple):
    """A proposer and how many proposals a row may bring at most."""

    arm: str
    k: int


PLAIN = Choice("plain", 0)
LATE = Choice("late", 0)  # a plain step that could not begin ahead, for proposals had been hoped for


@dataclass
class Candidate:
    """A row as the controller sees it under one arm. chance: that there will be proposals, where not all is known."""

    limit: int
    rate: float
    lag: int = 0
    chance: float = 1.0


class Fixed:
    """Always chooses the same (None: plain decode): what a report or a proof of correctness measures."""

    foresees = False

    def __init__(self, choice: Choice | None, counts: list[int]) -> None:
        self.choice, self.counts, self.costs, self.probing = choice, counts, Costs(), False

    def choose(self, rows: int, offers: Mapping[str, Sequence[Candidate]]) -> Choice | None:
        return self.choice

    def learn(
        self, choice: Choice | None, rows: int, tokens: int, seconds: float, *, caught_up: int = 0, late: bool = False
    ) -> None:
        pass

    def rest(self, idle: int) -> int:
        return 0


class Costs:
    """Measured seconds of a whole step, by arm, rows and k; a key never met is inferred from the nearest rows'."""

    def __init__(self) -> None:
        self.seconds: dict[Choice, dict[int, float]] = {}

    def learn(self, choice: Choice, rows: int, seconds: float) -> None:
        known = self.seconds.setdefault(choice, {})
        before = known.get(rows, seconds)
        known[rows] = before + (self.believable(choice, rows, seconds) - before) / 4

    def believable(self, choice: Choice, rows: int, seconds: float) -> float:
        """At most twice what was measured before: one hiccup of the machine must not decide."""
        return min(seconds, 2 * self.seconds.get(choice, {}).get(rows, seconds))

    def plain(self, rows: int) -> float | None:
        known = self.seconds.get(PLAIN)
        return known[nearest(known, rows)] if known else None

    def relative(self, choice: Choice, rows: int) -> float | None:
        """k c + v + o: the choice's step in plain steps.

        At most that of a larger k, which does more: a k that is seldom used may have been measured at a bad time, and
        would never be used again.
        """
        if choice not in self.seconds:
            return None
        larger = [c for c in self.seconds if c.arm == choice.arm and c.k >= choice.k]
        return min((cost for c in larger if (cost := self._measured(c, rows)) is not None), default=None)

    def _measured(self, choice: Choice, rows: int) -> float | None:
        known = self.seconds[choice]
        base = nearest(known, rows)
        plain = self.plain(base)
        return None if plain is None else known[base] / plain


def nearest(known: Mapping[int, float], rows: int) -> int:
    return rows if rows in known else min(known, key=lambda r: abs(r - rows))


@dataclass
class Controller:
    """Chooses the arm and k of each step so that speculation never costs more than it brings. Plain Python.

    S = tau / (k c + v + o): expected tokens a row over the cost of a speculative step in plain steps. Costs are whole
    measured steps (drafts, verification and overhead together). Where no S is above 1, a probe keeps the estimates
    alive, paid from an account: plain steps pay in `allowance` of their time, speculative steps pay in what they gain
    and take out what they lose, against plain steps that begin ahead. An overdrawn account means plain decode,
    whatever is predicted, so the loss stays below `allowance` of the time plus `overdraft` steps.
    """

    counts: list[int]
    allowance: float = 0.01
    margin: float = 1.02
    overdraft: float = 6.0  # plain steps
    savings: float = 3.0  # plain steps, at most: what one text gained is not lost on the next
    prefill_seconds: dict[str, float] = field(default_factory=dict)  # a caught-up token, by arm
    costs: Costs = field(default_factory=Costs)
    balance: float = 0.0  # seconds
    since_plain: int = 0
    probing: bool = False  # the last choice was a probe, or none

    foresees = True  # whether a step that it will leave plain can be known one step before
    REST_SHARE, REST = 0.25, 3  # of the idle steps in a row, and at most: plain steps between two looks
    LAG_STEPS = 16  # catching up is spread over the steps expected to follow
    UNKNOWN = 0.2  # what a proposal is taken to cost, in plain steps, until a step with as many was measured
    PLAIN_EVERY = 64  # speculative steps between two plain ones, which keep the comparison honest
    PLAIN_RUN = 3  # that many, for only the later ones can begin ahead

    def choose(self, rows: int, offers: Mapping[str, Sequence[Candidate]]) -> Choice | None:
        """The best choice, a probe that the account can pay, or None for plain decode."""
        plain = self.costs.plain(rows)
        compares = self.since_plain % (self.PLAIN_EVERY + self.PLAIN_RUN) >= self.PLAIN_EVERY
        if plain is None or self.balance < -self.overdraft * plain or compares:
            return None
        best, best_speedup = None, self.margin
        probe, probe_loss = None, self.balance / plain
        able = [arm for arm in offers if any(c.limit for c in offers[arm])]
        for choice in (Choice(arm, count) for arm in able for count in self.counts):
            candidates = offers[choice.arm]
            tau = sum(1 + c.chance * (expected_tokens(c.rate, min(choice.k, c.limit)) - 1) for c in candidates) / rows
            lag = self.prefill_seconds.get(choice.arm, 0.0) * sum(c.lag for c in candidates) / plain
            cost = self._cost(choice, rows, candidates)
            if (speedup := tau / (cost + lag / self.LAG_STEPS)) > best_speedup:
                best, best_speedup = choice, speedup
            if (loss := cost + lag - tau) < probe_loss:
                probe, probe_loss = choice, loss
        self.probing = best is None
        return best or probe

    def _cost(self, choice: Choice, rows: int, candidates: Sequence[Candidate]) -> float:
        """In plain steps; where no row may have proposals after all, the step is a late one."""
        known, late = self.costs.relative(choice, rows), self.costs.relative(LATE, rows)
        cost = 1 + self.UNKNOWN * choice.k if known is None else known
        none = math.prod(1 - c.chance for c in candidates)
        return (1 - none) * cost + none * (1.0 if late is None else max(late, 1.0))

    def rest(self, idle: int) -> int:
        """How many plain steps may pass before the next look, after `idle` steps in which nothing paid.

        Looking costs the host some time, and a step that is known to be plain can begin ahead.
        """
        return min(int(idle * self.REST_SHARE), self.REST)

    def learn(
        self, choice: Choice | None, rows: int, tokens: int, seconds: float, *, caught_up: int = 0, late: bool = False
    ) -> None:
        """What a step of `rows` rows brought and cost, `caught_up` tokens fed to a draft included. late: a plain step
        that would have begun ahead without a speculator."""
        if choice is not None and caught_up:
            seconds = self._learn_prefill(choice, rows, seconds, caught_up)
        else:
            kind = choice or (LATE if late else PLAIN)
            seconds = self.costs.believable(kind, rows, seconds)
            self.costs.learn(kind, rows, seconds)
        plain = self.costs.plain(rows) or seconds
        self.since_plain = 0 if choice is None and not late else self.since_plain + 1
        gained = plain * tokens / rows - seconds if choice or late else 0.0
        earned = gained + (self.allowance * plain if choice is None else 0.0)
        self.balance = min(self.balance + earned, self.savings * plain)

    def _learn_prefill(self, choice: Choice, rows: int, seconds: float, caught_up: int) -> float:
        """What feeding a draft costs a token; the step's believable seconds. A token costs a plain step at most."""
        plain = self.costs.plain(rows) or seconds
        ready = (self.costs.relative(choice, rows) or 0.0) * plain
        most = min(plain, 2 * self.prefill_seconds.get(choice.arm, plain))
        self.prefill_seconds[choice.arm] = min(max(seconds - ready, 0.0) / caught_up, most)
        return min(seconds, ready + most * caught_up)
