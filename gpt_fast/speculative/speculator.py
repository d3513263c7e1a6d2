"""Speculator: asks proposers for a step's proposals, and learns from what became of them. See verify.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from gpt_fast.config import SamplingParams
from gpt_fast.request import PrefixCopy, Request
from gpt_fast.sampling import SamplingTensors, needs_edit
from gpt_fast.speculative import accept
from gpt_fast.speculative.controller import Acceptance, Candidate, Controller
from gpt_fast.speculative.costs import PLAIN, BatchShape, Choice
from gpt_fast.speculative.proposer import Offer, Proposer
from gpt_fast.speculative.verify import Accepted, Draws, Proposal


@dataclass
class Totals:
    """What speculation did.

    blocks[n] counts the verified blocks of which n proposals were accepted; positions[i] counts [evaluated, accepted]
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
    """What a step does. rows: its requests, and how long each is when the step runs; choice None: plain decode.

    early: decided one step before, when the last token of each row was not known yet.
    """

    rows: list[tuple[Request, int]]
    choice: Choice | None
    offers: Sequence[Offer]
    early: bool = False

    @property
    def behind(self) -> int:
        """Rows that the proposer must first be fed tokens of."""
        return sum(offer.behind > 0 for offer in self.offers)


class Speculator:
    """Proposers, controller and acceptance estimates of one engine. `propose` before a decode step, `learn` after.

    A runner that can begin a plain step before it is planned asks `plain_next` first. always: a choice that every step
    takes (PLAIN: plain decode) and of which the controller hears nothing, to measure or to prove; None: as it chooses.
    """

    PRIOR = 0.6  # acceptance assumed before anything is known: worth a try
    REQUEST_WEIGHT, REQUEST_KEEP = 3.0, 0.96  # how long a request believes its prior; how fast it forgets
    POOL_WEIGHT, POOL_KEEP = 2.0, 0.99
    GAP = 0.25  # plain steps: the host's time between two steps counts up to this; more is a prompt or a pause

    def __init__(
        self,
        proposers: Mapping[str, Proposer],
        controller: Controller,
        *,
        max_seq_len: int,
        always: Choice | None = None,
    ) -> None:
        self.proposers, self.controller, self.max_seq_len, self.always = proposers, controller, max_seq_len, always
        self.totals = Totals()
        self.pool: dict[tuple[str, int], Acceptance] = {}
        self.acceptances: dict[Request, dict[tuple[str, int], Acceptance]] = {}
        self.next: Decision | None = None  # where it is made before the step
        self.last = Decision([], None, ())
        self.chains = False  # whether the runner can begin a greedy step before the last one's tokens are known
        self.idle = 0  # steps in a row that brought no accepted proposal
        self.resting = 0  # steps until the next look
        self.gap, self.tokens_at = 0.0, 0.0  # seconds between the last two steps; when the last one had its tokens

    @property
    def counts(self) -> list[int]:
        """How many proposals a row of a step may be padded to, ascending."""
        return self.controller.counts

    def accept(
        self,
        logits_BSV: Tensor,
        params: SamplingTensors | None,
        proposal: Proposal,
        draws: Draws,
        best_BS: Tensor | None,
    ) -> Accepted:
        """How many of each row's proposals are accepted, and the token after them."""
        return accept.accept(logits_BSV, params, proposal, draws, best_BS)

    def plain_next(self, requests: Sequence[Request], *, unknown: int) -> bool:
        """Whether the next step of these requests is plain, so that it may begin now; if so, it will be.

        unknown: how many tokens each row gets before that step, 0 or 1. With 1 it is decided early, from what could be
        proposed if each row's next token is the expected one.
        """
        if self.always:
            return False
        self.chains = self.chains or unknown > 0
        found = self._look(requests, unknown)
        if found.choice is None or not unknown:
            self.next = found
        return found.choice is None

    def propose(self, requests: Sequence[Request]) -> Proposal | None:
        """This step's proposals; None for a plain step."""
        self.gap = time.perf_counter() - self.tokens_at
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
        if self.resting and not self.always and all(r in self.acceptances for r in requests):
            self.resting -= 1
            return Decision(rows, None, (), unknown > 0)
        for request in requests:
            self.acceptances.setdefault(request, {})
        limits = [self._limit(r) for r in requests]
        offers = {arm: proposer.offers(requests, limits) for arm, proposer in self.proposers.items()}
        if self.always:
            self.idle = self.resting = 0
            choice = None if self.always == PLAIN else self.always
            return Decision(rows, choice, offers[choice.arm] if choice else ())
        candidates = {arm: self._candidates(arm, requests, offers[arm], unknown) for arm in offers}
        choice = self.controller.choose(batch_of(requests), candidates)
        if choice is None or not unknown:
            self.idle = 0 if choice and not self.controller.probing else self.idle
            self.resting = self.controller.rest(self.idle)
        return Decision(rows, choice, offers[choice.arm] if choice else (), unknown > 0)

    def learn(
        self, requests: Sequence[Request], proposal: Proposal | None, accepted: Sequence[int], seconds: float
    ) -> None:
        """What became of the last proposals; called before the accepted tokens join their requests."""
        self.tokens_at = time.perf_counter()
        tokens = sum(accepted) + len(accepted)
        self.idle = 0 if any(accepted) else self.idle + 1
        batch, choice = batch_of(requests), self.last.choice
        seconds += min(self.gap, self.GAP * (self.controller.costs.plain(batch) or 0.0))
        if proposal is None or choice is None:
            overlapped = not self.chains or batch.sampled or self.last.early
            if not self.always:
                self.controller.learn(None, batch, tokens, seconds, overlapped=overlapped)
            return
        rows_behind = self.last.behind if proposal.caught_up else 0
        if not self.always:
            self.controller.learn(choice, batch, tokens, seconds, caught_up=proposal.caught_up, rows_behind=rows_behind)
        self.proposers[choice.arm].learn(requests, accepted)
        for request, offer, count, length in zip(requests, self.last.offers, proposal.counts, accepted, strict=True):
            if count:
                self._learn_row(request, (choice.arm, offer.kind), count, length)

    def measure(self, decode: Callable[[list[Request]], object], rows: int) -> None:
        """Time plain decode and every choice on as many requests as `rows`; the controller starts from that.

        decode runs one step of requests and reports to this speculator, as always.
        """
        requests = timing_requests(rows, min(32, self.max_seq_len // 2))
        always = self.always
        for choice in (PLAIN, *(Choice(arm, k) for arm in self.proposers for k in self.counts)):
            self.always = choice
            times = []
            for _ in range(3):  # the first compiles, or feeds a draft its prompt
                started = time.perf_counter()
                decode(requests)
                times.append(time.perf_counter() - started)
            self.controller.costs.learn(choice, BatchShape(rows), min(times[1:]))
        for request in requests:
            self.ended(request)
        self.always, self.totals, self.pool = always, Totals(), {}

    def copied(self, copy: PrefixCopy) -> None:
        for proposer in self.proposers.values():
            proposer.copied(copy)

    def ended(self, request: Request) -> None:
        """It will be in no further step."""
        self.acceptances.pop(request, None)
        for proposer in self.proposers.values():
            proposer.ended(request)

    def forget_slots(self) -> None:
        for proposer in self.proposers.values():
            proposer.forget_slots()

    def _limit(self, request: Request) -> int:
        """Proposals the row can use: what is left to say, less the token that follows them. 0 where logits are edited,
        for an edit depends on the tokens before it."""
        if needs_edit(request.params, len(request.output)):
            return 0
        left = min(self.max_seq_len - request.length, request.params.max_new_tokens - len(request.output))
        return min(left - 1, self.counts[-1])

    def _candidates(
        self, arm: str, requests: Sequence[Request], offers: Sequence[Offer], unknown: int
    ) -> list[Candidate]:
        return [self._candidate(arm, *row, unknown) for row in zip(requests, offers, strict=True)]

    def _candidate(self, arm: str, request: Request, offer: Offer, unknown: int) -> Candidate:
        rate = self._rate(request, (arm, offer.kind))
        if not unknown or offer.kind_if_expected is None:
            return Candidate(offer.limit, rate, offer.behind)
        return Candidate(
            offer.limit, self._rate(request, (arm, offer.kind_if_expected)), offer.behind, probability=rate
        )

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


def timing_requests(rows: int, length: int, *, temperature: float = 0.0) -> list[Request]:
    """Requests of `length` equal tokens in the slots from 0 on, to time steps with; a lookup finds matches in them."""
    params = SamplingParams(max_new_tokens=1 << 20, temperature=temperature)
    return [
        Request(f"timing-{slot}", [0] * (length - 1), params, 0, output=[0], slot=slot, computed=length - 1)
        for slot in range(rows)
    ]
