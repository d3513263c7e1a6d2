"""A draft model as a proposer: it decodes the next tokens first, in a cache that mirrors the target's slots.

Shapes: B rows, K proposals of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt_fast.model.forward import Startable
from gpt_fast.request import PrefixCopy, Request, common_prefix
from gpt_fast.sampling import normalized, on_device, sample, sampling_tensors, weights
from gpt_fast.speculative.greedy_chain import GreedyChain
from gpt_fast.speculative.proposer import Offer, Proposer
from gpt_fast.speculative.verify import PROPOSE, SAMPLE, Proposal, draws_of, is_matched


@dataclass
class Held:
    """What a draft slot holds: the first `count` tokens of `request`, whether or not it still runs.

    Positions below `written` were written since the slot was last finite throughout.
    """

    request: Request
    count: int
    written: int = 0


class DraftRunner(Protocol):
    """What DraftProposer needs of runner.Runner, here over the draft model and its own cache."""

    cache: Any
    decode: Callable[..., Any]
    prefill: Callable[..., Any]
    chunks: list[int]

    def forward(
        self,
        forward: Callable[..., Any],
        tokens: list[list[int]],
        starts: list[int],
        slots: list[int],
        *,
        size: int,
        fed_BK: Tensor | None = None,
    ) -> Tensor: ...


class DraftProposer(Proposer):
    """A smaller model proposes by decoding; its cache mirrors the target's slots and catches up when asked to.

    startable: the draft itself, where its steps can be begun; greedy proposals are then a GreedyChain, and a
    step takes rows of any lengths at no cost for their padding, so that the first one also catches up with a few
    tokens.
    """

    FEW = 16

    def __init__(self, runner: DraftRunner, *, startable: Startable | None = None) -> None:
        self.runner, self.startable = runner, startable
        self.first = self.FEW if startable else 2  # tokens of a row that the first step of its proposals may feed
        self.device = runner.cache.k_LNHTD.device
        self.held: dict[int, Held] = {}
        self.counts: list[int] = []

    def offers(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Offer]:
        # The k-th proposal is never fed, so k proposals need k - 1 positions past the last token's.
        room = self.runner.cache.max_seq_len + 1
        limits = [max(0, min(limit, room - r.length)) for r, limit in zip(requests, limits, strict=True)]
        return [
            Offer(limit, behind=self._behind(r)) if limit else Offer(0)
            for r, limit in zip(requests, limits, strict=True)
        ]

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> Proposal:
        self.counts, caught_up = self._catch_up(requests, counts)
        if self.startable and any(self.counts) and all(r.params.temperature == 0 for r in requests):
            return Proposal(
                self._chain(self.startable, requests).tokens().clamp(min=0), self.counts, caught_up=caught_up
            )
        return self._decode(requests, self.counts, caught_up)

    def _chain(self, model: Startable, requests: Sequence[Request]) -> GreedyChain:
        """The rows' proposals under way, after the few tokens that the draft has not seen."""
        known = [self._fed_from(r) for r in requests]
        tokens = [r.tokens(at, r.length) for r, at in zip(requests, known, strict=True)]
        return GreedyChain(
            model,
            self.runner.cache,
            tokens=tokens,
            starts=known,
            slots=[r.slot for r in requests],
            counts=self.counts,
        )

    def learn(self, requests: Sequence[Request], accepted: Sequence[int]) -> None:
        for request, count, length in zip(requests, self.counts, accepted, strict=True):
            if count:  # called before the accepted tokens join the request
                self._hold(request, request.length + min(length, count - 1), request.length + count - 1)

    def copied(self, copy: PrefixCopy) -> None:
        held = self.held.get(copy.source)
        if held is not None:
            self.runner.cache.copy_prefix(source=copy.source, target=copy.target, length=copy.length)
            before = self.held.get(copy.target)
            written = max(copy.length, before.written if before else 0)
            self.held[copy.target] = Held(held.request, min(held.count, copy.length), written)

    def forget_slots(self) -> None:
        for held in self.held.values():
            held.count = 0

    def _known(self, request: Request) -> int:
        """How many of the request's first tokens the draft's slot already holds."""
        held = self.held.get(request.slot)
        if held is None:
            return 0
        if held.request is not request:
            self.runner.cache.remove_nan(request.slot, held.written)  # target or draft may have overflowed here
            self.held[request.slot] = held = Held(request, shared(request, held))
        return held.count

    def _behind(self, request: Request) -> int:
        """Tokens that it must be fed before it can propose; the last two are never among them."""
        lacking = request.length - self._known(request)
        return lacking - 2 if lacking > self.first else 0

    def _fed_from(self, request: Request) -> int:
        """Where the first step of a row's proposals begins: padded to two tokens where padding costs."""
        return min(self._known(request), request.length - 1) if self.startable else request.length - 2

    def _hold(self, request: Request, count: int, written: int) -> None:
        before = self.held.get(request.slot)
        self.held[request.slot] = Held(request, count, max(written, before.written if before else 0))

    def _catch_up(self, requests: Sequence[Request], counts: Sequence[int]) -> tuple[list[int], int]:
        """Feed rows what they lack, at most a chunk in all so that no step stalls. The rest propose nothing."""
        budget, ready = self.runner.chunks[-1], []
        for request, count in zip(requests, counts, strict=True):
            known, behind = self._known(request), self._behind(request)
            fed = min(behind, budget) if count else 0
            if fed > 0:
                budget -= fed
                size = next(size for size in self.runner.chunks if size >= fed)
                tokens = request.tokens(known, known + fed)
                self.runner.forward(self.runner.prefill, [tokens], [known], [request.slot], size=size)
                known += fed
                self._hold(request, known, known)
            ready.append(count if fed == behind else 0)
        return ready, self.runner.chunks[-1] - budget

    def _decode(self, requests: Sequence[Request], counts: list[int], caught_up: int) -> Proposal:
        """max(counts) steps on the device; the first feeds what the draft lacks."""
        slots = [r.slot for r in requests]
        params = sampling_tensors([r.params for r in requests], self.device)
        matched = [is_matched(r) for r in requests]
        matched_B = on_device(matched, self.device).bool()
        draws = draws_of(requests, self.device)
        K, known = max(counts), [self._fed_from(r) for r in requests]
        first = [r.tokens(at, r.length) if count else [] for r, at, count in zip(requests, known, counts, strict=True)]
        size = max(map(len, first), default=2) if self.startable else 2
        uniform_BK = torch.where(matched_B[:, None], draws.uniform(SAMPLE, K), draws.uniform(PROPOSE, K))
        drafts: list[Tensor] = []
        dists: list[Tensor] = []
        for step in range(K):
            rows = [[0] if count > step else [] for count in counts] if step else first
            starts = [r.length + step - 1 for r in requests] if step else known
            logits_BV = self.runner.forward(
                self.runner.decode,
                rows,
                starts,
                slots,
                size=1 if step else size,
                fed_BK=drafts[-1][:, None] if step else None,
            )
            weight_BV = None if params is None else weights(logits_BV, params)
            # NO_TOKEN becomes a token that will be rejected, for its q is not a number either.
            drafts.append(sample(logits_BV, params, uniform_BK[:, step], weight_BV).clamp(min=0))
            if weight_BV is not None and not all(matched):
                dists.append(normalized(weight_BV))
        draft_BK = torch.stack(drafts, 1) if drafts else uniform_BK.long()
        return Proposal(draft_BK, counts, torch.stack(dists, 1) if dists else None, matched_B, caught_up)


def shared(request: Request, held: Held) -> int:
    """How many of what the slot holds are the first tokens of a request that may read them."""
    if held.request.owner != request.owner:
        return 0
    return common_prefix(request.tokens(0, held.count), held.request.tokens(0, held.count))
