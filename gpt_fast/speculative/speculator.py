"""Speculator: asks proposers for a step's proposals, and learns from what became of them. See verify.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpt_fast.config import SamplingParams
from gpt_fast.request import PrefixCopy, Request
from gpt_fast.sampling import needs_edit
from gpt_fast.speculative.controller import Acceptance, Candidate, Controller, Fixed
from gpt_fast.speculative.costs import PLAIN, BatchShape, Choice
from gpt_fast.speculative.proposer import Offer, Proposer
from gpt_fast.speculative.verify import Proposal, verify


@dataclass
class Totals:
    """What speculation did.

    blocks[n] counts the verified blocks of which n proposals stood; positions[i] counts [evaluated, accepted]
    proposals with i others before them.
    """

    steps: int = 0  # rows that had proposals
    drafted: int = 0
    accepted: int = 0
    blocks: list[int] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)

    def learn(self, count: int, accepted: int) -> None:
        self.steps += 1
        self.drafted += count
        self.accepted += accepted
        self.blocks += [0] * (count + 1 - len(self.blocks))
        self.blocks[accepted] += 1
        self.positions += [[0, 0] for _ in range(count - len(self.positions))]
        for i in range(min(accepted + 1, count)):
            self.positions[i][0] += 1
            self.positions[i][1] += i < accepted


class Decision(NamedTuple):
    """What the next step of `rows`, each of a request and the length it will have, does; choice None: plain."""

    rows: list[tuple[Request, int]]
    choice: Choice | None
    offers: Sequence[Offer]
    foreseen: bool = False  # one step before, so that it begins while its last tokens are unknown

    @property
    def lagging(self) -> int:
        """Rows of which the proposer lacks tokens."""
        return sum(offer.lag > 0 for offer in self.offers)


class Speculator:
    """Proposers, controller and acceptance estimates of one engine. `propose` before a decode step, `learn` after.

    A runner that can begin a plain step ahead asks `plain_next` first.
    """

    PRIOR = 0.6  # acceptance assumed before anything is known: worth a try
    REQUEST_WEIGHT, REQUEST_KEEP = 3.0, 0.96  # how long a request believes its prior; how fast it forgets
    POOL_WEIGHT, POOL_KEEP = 2.0, 0.99
    GAP = 0.25  # plain steps: the host's time between two steps counts up to this; more is a prompt or a pause

    def __init__(
        self,
        proposers: Mapping[str, Proposer],
        controller: Controller | Fixed,
        *,
        max_seq_len: int,
        verify: Callable[..., Any] = verify,
    ) -> None:
        self.proposers, self.controller, self.max_seq_len, self.verify = proposers, controller, max_seq_len, verify
        self.totals = Totals()
        self.pool: dict[tuple[str, int], Acceptance] = {}
        self.acceptances: dict[Request, dict[tuple[str, int], Acceptance]] = {}
        self.next: Decision | None = None  # where it is made before the step
        self.last = Decision([], None, ())
        self.chains = False  # whether the runner can begin a greedy step before the last one's tokens are known
        self.idle = 0  # plain steps and vain probes in a row
        self.resting = 0  # steps until the next look
        self.gap, self.ended = 0.0, 0.0  # seconds between the last two steps; when the last one had its tokens

    def plain_next(self, requests: Sequence[Request], *, unknown: int) -> bool:
        """Whether the next step of these requests is plain, so that it may begin now; then it will be. `unknown`: how
        many tokens each is to get before: with 1 it is foreseen from what may be proposed after the likely token."""
        if not self.controller.foresees:
            return False
        self.chains = self.chains or unknown > 0
        found = self._look(requests, unknown)
        if found.choice is None or not unknown:
            self.next = found
        return found.choice is None

    def propose(self, requests: Sequence[Request]) -> Proposal | None:
        """This step's proposals; None for a plain step."""
        self.gap = time.perf_counter() - self.ended
        made = self.next is not None and self.next.rows == [(r, r.length) for r in requests]
        self.last, self.next = self.next if self.next and made else self._look(requests, 0), None
        if self.last.choice is None:
            return None
        arm, count = self.last.choice
        counts = [min(count, offer.limit) for offer in self.last.offers]
        return self.proposers[arm].propose(requests, counts) if any(counts) else None

    def _look(self, requests: Sequence[Request], unknown: int) -> Decision:
        """What the proposers could do, and what the controller makes of it. After idle steps it looks less often."""
        rows = [(r, r.length + unknown) for r in requests]
        if self.resting and all(r in self.acceptances for r in requests):
            self.resting -= 1
            return Decision(rows, None, (), unknown > 0)
        # Every decoding request is in every step, so one that is missing has ended.
        self.acceptances = {r: self.acceptances.get(r, {}) for r in requests}
        limits = [self._limit(r) for r in requests]
        offers = {arm: proposer.offers(requests, limits) for arm, proposer in self.proposers.items()}
        candidates = {arm: self._candidates(arm, requests, offers[arm], unknown) for arm in offers}
        choice = self.controller.choose(batch_of(requests), candidates)
        if choice is None or not unknown:
            self.idle = 0 if choice and not self.controller.probing else self.idle
            self.resting = self.controller.rest(self.idle)
        return Decision(rows, choice, offers[choice.arm] if choice else (), unknown > 0)

    def learn(
        self, requests: Sequence[Request], proposal: Proposal | None, accepted: Sequence[int], seconds: float
    ) -> None:
        """What became of them; called before the accepted tokens join their requests."""
        self.ended = time.perf_counter()
        tokens = sum(accepted) + len(accepted)
        self.idle = 0 if any(accepted) else self.idle + 1
        batch, choice = batch_of(requests), self.last.choice
        seconds += min(self.gap, self.GAP * (self.controller.costs.plain(batch) or 0.0))
        if proposal is None or choice is None:
            late = self.chains and not batch.sampled and not self.last.foreseen
            self.controller.learn(None, batch, tokens, seconds, late=late)
            return
        lagging = self.last.lagging if proposal.caught_up else 0
        self.controller.learn(choice, batch, tokens, seconds, caught_up=proposal.caught_up, lagging=lagging)
        self.proposers[choice.arm].learn(requests, accepted)
        for request, offer, count, stood in zip(requests, self.last.offers, proposal.counts, accepted, strict=True):
            if count:
                self._learn_row(request, (choice.arm, offer.kind), count, stood)

    def measure(self, decode: Callable[[list[Request]], object], rows: int) -> None:
        """Time plain decode and every choice on `rows` made-up requests; the controller starts from that.

        decode runs one step of requests and reports to this speculator, as always.
        """
        requests = made_up(rows, min(32, self.max_seq_len // 2))
        controller = self.controller
        for choice in (PLAIN, *(Choice(arm, k) for arm in self.proposers for k in controller.counts)):
            self.controller = Fixed(choice if choice.k else None, controller.counts)
            times = []
            for _ in range(3):  # the first compiles, or feeds a draft its prompt
                started = time.perf_counter()
                decode(requests)
                times.append(time.perf_counter() - started)
            controller.costs.learn(choice, BatchShape(rows), min(times[1:]))
        self.controller, self.totals, self.pool = controller, Totals(), {}

    def copied(self, copy: PrefixCopy) -> None:
        for proposer in self.proposers.values():
            proposer.copied(copy)

    def _limit(self, request: Request) -> int:
        """Proposals the row can use: what is left to say, less the token that follows them. 0 where logits are edited,
        for an edit depends on the tokens before it."""
        if needs_edit(request.params, len(request.output)):
            return 0
        left = min(self.max_seq_len - request.length, request.params.max_new_tokens - len(request.output))
        return min(left - 1, self.controller.counts[-1])

    def _candidates(
        self, arm: str, requests: Sequence[Request], offers: Sequence[Offer], unknown: int
    ) -> list[Candidate]:
        return [self._candidate(arm, *row, unknown) for row in zip(requests, offers, strict=True)]

    def _candidate(self, arm: str, request: Request, offer: Offer, unknown: int) -> Candidate:
        rate = self._rate(request, (arm, offer.kind))
        if not unknown or offer.then is None:
            return Candidate(offer.limit, rate, offer.lag)
        return Candidate(offer.limit, self._rate(request, (arm, offer.then)), offer.lag, chance=rate)

    def _rate(self, request: Request, key: tuple[str, int]) -> float:
        pooled = self.pool.get(key, Acceptance()).rate(prior=self.PRIOR, weight=self.POOL_WEIGHT)
        mine = self.acceptances[request].get(key, Acceptance())
        return mine.rate(prior=pooled, weight=self.REQUEST_WEIGHT)

    def _learn_row(self, request: Request, key: tuple[str, int], count: int, accepted: int) -> None:
        self.totals.learn(count, accepted)
        request.drafted += count
        request.accepted += accepted
        self.pool.setdefault(key, Acceptance()).learn(accepted, count, keep=self.POOL_KEEP)
        self.acceptances[request].setdefault(key, Acceptance()).learn(accepted, count, keep=self.REQUEST_KEEP)


def batch_of(requests: Sequence[Request]) -> BatchShape:
    return BatchShape(len(requests), any(r.params.temperature > 0 for r in requests))


def made_up(rows: int, length: int, *, temperature: float = 0.0) -> list[Request]:
    """Requests of `length` equal tokens in the slots from 0 on, to time steps with; a lookup finds matches in them."""
    params = SamplingParams(max_new_tokens=1 << 20, temperature=temperature)
    return [
        Request(f"made-up-{slot}", [0] * (length - 1), params, 0, output=[0], slot=slot, computed=length - 1)
        for slot in range(rows)
    ]
