"""Which proposals a step verifies: controller of speculative decoding. Plain Python, no torch.

Its promise: speculation costs at most a small, stated share of the time, however bad the proposals are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpt_fast.speculative.costs import PLAIN, UNOVERLAPPED, BatchShape, CatchUp, Choice, Costs


def expected_tokens(rate: float, count: int) -> float:
    """tau: tokens a verification brings, (1 - a^(k+1)) / (1 - a) for k proposals accepted at rate a each."""
    return float(count + 1) if rate >= 1 else (1 - rate ** (count + 1)) / (1 - rate)


@dataclass
class Acceptance:
    """Accepted and evaluated proposals (those up to the first rejected one), old ones fading."""

    accepted: float = 0.0
    evaluated: float = 0.0

    def learn(self, accepted: int, count: int, *, keep: float) -> None:
        self.accepted = keep * self.accepted + accepted
        self.evaluated = keep * self.evaluated + min(accepted + 1, count)

    def rate(self, *, prior: float, weight: float) -> float:
        return (self.accepted + weight * prior) / (self.evaluated + weight)


@dataclass
class Candidate:
    """A row as the controller sees it under one arm (proposer).

    limit: proposals it can use. rate: how likely each is accepted. behind: tokens that the proposer must be fed first.
    probability: that there will be proposals at all; below 1 where the step is decided before its last token is known.
    """

    limit: int
    rate: float
    behind: int = 0
    probability: float = 1.0


@dataclass
class Controller:
    """Chooses the arm and k of each step so that speculation never costs more than it brings. Plain Python.

    S = tau / (k c + v + o): expected tokens a row over the cost of a speculative step in plain steps. Costs are whole
    measured steps (drafts, verification and overhead together). Where no S is above 1, a probe keeps the estimates
    alive, paid from an account: plain steps pay in `allowance` of their time, speculative steps pay in what they gain
    and take out what they lose, against plain steps that overlap with the host's work. An overdrawn account means
    plain decode, whatever is predicted, so the loss stays below `allowance` of the time plus `overdraft` steps, plus
    one catch-up: the cost of feeding a draft is charged only after it had `stay` steps to pay off.

    That holds if plain steps are known well, and the choice itself works against it: speculation that only seems to
    pay, because plain steps happened to look slow, goes on and measures no plain step. So plain steps are compared the
    more often the less is gained: a comparison takes `allowance` of what the steps since the last one brought.
    """

    counts: list[int]
    allowance: float = 0.01
    margin: float = 1.02
    overdraft: float = 6.0  # plain steps
    savings: float = 3.0  # plain steps at most, and a probe's loss: what one text gained is not lost on the next
    largest_probe: float = 16.0  # plain steps that may be saved for a probe
    costs: Costs = field(default_factory=Costs)
    catching_up: dict[str, CatchUp] = field(default_factory=dict)  # by arm
    balance: float = 0.0  # seconds
    since_plain: int = 0  # steps since a plain one that overlapped
    comparing: int = 0  # plain steps to come, which keep the comparison honest
    invested: float = 0.0  # seconds of catching up that the steps after it have not had the time to earn back
    wanted: float = 0.0  # seconds that the cheapest probe is expected to lose, as of the last choice
    probing: bool = False  # the last choice was a probe, or none

    REST_SHARE, REST = 0.25, 8  # of the idle steps in a row, and at most: plain steps between two looks
    UNKNOWN = 0.2  # what a proposal is taken to cost, in plain steps, until a step with as many was measured
    UNKNOWN_TOKEN = 0.1  # the same of a token that a draft must be fed first
    COMPARED = 3  # plain steps a comparison, after one that did not overlap
    COMPARE_EVERY = 64  # steps at most between two

    def choose(self, batch: BatchShape, offers: Mapping[str, Sequence[Candidate]]) -> Choice | None:
        """The best choice, a probe that the account can pay, or None for plain decode."""
        plain = self.costs.plain(batch)
        if plain is None or not self.costs.knows_plain(batch) or self.comparing:
            return None
        credit = self.balance + self.overdraft * plain
        if credit + self.invested < 0:
            return None
        best, best_speedup = None, self.margin
        probe, least = None, math.inf
        for arm in (arm for arm in offers if any(c.limit for c in offers[arm])):
            for choice, tau, cost, feeding in self._outlooks(arm, batch, offers[arm], plain):
                speedup = tau / (cost + feeding / self._catch_up(arm, plain).stay)
                if speedup > best_speedup and (credit >= 0 or not feeding):
                    best, best_speedup = choice, speedup
                if (loss := cost + feeding - tau) < least:
                    probe, least = choice, loss
        self.wanted, self.probing = least * plain if probe else self.wanted, best is None
        if best and self.since_plain >= self._compare_every(best_speedup):
            self.comparing = self.COMPARED
            return None
        return best or (probe if self.wanted < self.balance else None)

    def _outlooks(
        self, arm: str, batch: BatchShape, candidates: Sequence[Candidate], plain: float
    ) -> Iterator[tuple[Choice, float, float, float]]:
        """For every k: tokens a row, the cost of the step, and the cost of catching up first, both in plain steps. If
        no row has proposals after all, the step is a plain one that did not overlap."""
        known = self.costs.relative(arm, batch)
        unoverlapped = self.costs.relative(UNOVERLAPPED.arm, batch).get(0, 1.0)
        none = math.prod(1 - c.probability for c in candidates)
        feeding = self._catch_up(arm, plain).token * sum(c.behind for c in candidates) / plain
        for k in self.counts:
            tau = (
                sum(1 + c.probability * (expected_tokens(c.rate, min(k, c.limit)) - 1) for c in candidates) / batch.rows
            )
            cost = (1 - none) * known.get(k, 1 + self.UNKNOWN * k) + none * unoverlapped
            yield Choice(arm, k), tau, cost, feeding

    def _compare_every(self, speedup: float) -> float:
        """Steps until COMPARED plain ones lose `allowance` of the time, each what speculation would have gained."""
        return min(self.COMPARED * (1 - 1 / speedup) / self.allowance, self.COMPARE_EVERY)

    def _catch_up(self, arm: str, plain: float) -> CatchUp:
        return self.catching_up.setdefault(arm, CatchUp(self.UNKNOWN_TOKEN * plain))

    def rest(self, idle: int) -> int:
        """How many plain steps may pass before the next look, after `idle` steps in which nothing paid.

        Looking costs the host some time, and a step that is known to be plain can begin before it is planned.
        """
        return min(int(idle * self.REST_SHARE), self.REST)

    def learn(
        self,
        choice: Choice | None,
        batch: BatchShape,
        tokens: int,
        seconds: float,
        *,
        caught_up: int = 0,
        rows_behind: int = 0,
        overlapped: bool = True,
    ) -> None:
        """What a step brought and cost, `caught_up` tokens of `rows_behind` rows fed to a draft included.
        overlapped False: a plain step that waited for the host's work, and would not have without a speculator."""
        kind = choice or (PLAIN if overlapped else UNOVERLAPPED)
        if caught_up:
            seconds = self._learn_catching_up(kind, batch, seconds, caught_up)
        else:
            seconds = self.costs.believable(kind, batch, seconds)
            self.costs.learn(kind, batch, seconds)
        plain = self.costs.plain(batch) or seconds
        self._count(kind)
        if choice:
            self._catch_up(choice.arm, plain).used(batch.rows, rows_behind)
            self.invested *= 1 - 1 / self._catch_up(choice.arm, plain).stay
        gained = plain * tokens / batch.rows - seconds if kind != PLAIN else 0.0
        earned = gained + (self.allowance * plain if choice is None else 0.0)
        most = self.savings * plain + max(0.0, min(self.wanted, self.largest_probe * plain))
        self.balance = min(self.balance + earned, most)

    def _count(self, kind: Choice) -> None:
        self.since_plain = 0 if kind == PLAIN else self.since_plain + 1
        self.comparing = max(0, self.comparing - (kind == PLAIN))

    def _learn_catching_up(self, choice: Choice, batch: BatchShape, seconds: float, caught_up: int) -> float:
        """What feeding a draft costs a token; the step's believable seconds."""
        plain = self.costs.plain(batch) or seconds
        ready = min(self.costs.relative(choice.arm, batch).get(choice.k, 1.0) * plain, seconds)
        known = self._catch_up(choice.arm, plain)
        fed = known.believable(seconds - ready, caught_up, plain)
        known.learn(fed, caught_up)
        self.invested += fed
        return ready + fed
