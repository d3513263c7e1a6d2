"""Runner: executes a step's plan on the model: pads it to fixed shapes, runs, samples or verifies.

Shapes: B rows (requests), S tokens of a row, K proposals of a row, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch, Forward
from gpt_fast.request import NO_TOKEN, Chunk, Logprobs, PrefixCopy, Request, SampledToken, StepPlan
from gpt_fast.sampling import SamplingTensors, edit_logits, needs_edit, on_device, sample, sampling_tensors, uniform
from gpt_fast.speculative.verify import Accepted, Draws, Proposal, draws_of

SCORED = 128  # prompt tokens whose logits are held together: [SCORED, V]


class Budget(Protocol):
    """How many prompt tokens a step computes beside running streams (chunk_budget.py)."""

    def tokens(self, decodes: int) -> int:
        """For the next step, which decodes so many streams."""

    def learn(self, *, prompt_tokens: int, decodes: int, seconds: float) -> None:
        """How long the streams waited for a step's tokens, or without a stream how long the step took."""


class Speculation(Protocol):
    """Who proposes tokens for decode steps, and what becomes of them (speculative/speculator.py)."""

    @property
    def counts(self) -> list[int]:
        """How many proposals a row of a step may be padded to, ascending."""

    def plain_next(self, requests: Sequence[Request], *, unknown: int) -> bool:
        """Whether the next step of these requests, each after `unknown` more tokens, is plain: it may begin early."""

    def propose(self, requests: Sequence[Request]) -> Proposal | None:
        """The step's proposals; None: a plain step."""

    def accept(
        self,
        logits_BSV: Tensor,
        params: SamplingTensors | None,
        proposal: Proposal,
        draws: Draws,
        best_BS: Tensor | None,
    ) -> Accepted:
        """How many of each row's proposals are accepted, and the token after them."""

    def learn(
        self, requests: Sequence[Request], proposal: Proposal | None, accepted: Sequence[int], seconds: float
    ) -> None:
        """What a step brought, before its tokens join their requests."""

    def copied(self, copy: PrefixCopy) -> None:
        """A slot's prefix was copied."""

    def ended(self, request: Request) -> None:
        """It will be in no further step."""

    def forget_slots(self) -> None:
        """Nothing that slots hold may serve another request."""

    def measure(self, decode: Callable[[list[Request]], object], rows: int) -> None:
        """Time every kind of step of so many rows."""


def chunk_sizes(prefill_chunk: int) -> list[int]:
    """The sizes that chunks of a prompt are padded to."""
    return buckets(prefill_chunk, 16)


def buckets(limit: int, smallest: int) -> list[int]:
    """smallest, doubled until it reaches limit, which ends the list."""
    sizes = []
    while smallest < limit:
        sizes.append(smallest)
        smallest *= 2
    return [*sizes, limit]


def bucket_of(sizes: list[int], value: int) -> int:
    return next(size for size in sizes if size >= value)


class Runner:
    """Executes step plans: pads to the fixed bucket shapes, calls the model, samples. Owns the KV cache.

    decode and prefill are forwards of the same model; they differ only in how they are compiled. With a speculator,
    a decode verifies what it proposes; without, or for a step without proposals, it is one token a row.
    budget: how much of a prompt runs beside streams; None: as much as alone.
    begin_next: set by a runner that can begin a decode before it is planned (overlap_runner.py); told after a step
    which requests will run next, unless one is aborted or another comes.
    """

    begin_next: Callable[[list[Request]], None] | None = None

    def __init__(
        self, *, decode: Forward, prefill: Forward, cache: KVCache, eos_ids: Iterable[int], prefill_chunk: int,
        speculator: Speculation | None = None, budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self.decode, self.prefill, self.cache = decode, prefill, cache
        self.eos_ids = sorted(eos_ids)
        self.device = cache.k_LNHTD.device
        self.rows = buckets(cache.slots, 1)
        self.chunks = chunk_sizes(prefill_chunk)
        self.scored = max(size for size in self.chunks if size <= max(SCORED, self.chunks[0]))
        self.budget = budget
        self.lengths = buckets(cache.max_seq_len, 128)
        self.speculator = speculator

    def speculate_with(self, speculator: Speculation | None) -> None:
        """Let this one propose from the next step on."""
        self.speculator = speculator

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> dict[str, list[SampledToken]]:
        """Do what the plan says; the sampled tokens by request id."""
        for slot in plan.clears:
            self.cache.clear(slot)
        for copy in plan.copies:
            self.cache.copy_prefix(source=copy.source, target=copy.target, length=copy.length)
            if self.speculator:
                self.speculator.copied(copy)
        sampled: dict[str, list[SampledToken]] = {}
        for chunk in plan.chunks:
            logits_BV = self._prefill(chunk)
            if chunk.last:
                sampled |= self._sample([chunk.request], logits_BV)
        if plan.decodes:
            sampled |= self.advance(list(plan.decodes))
        return sampled

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every kind of step once, so that nothing compiles or allocates for a request.

        Two lengths and two sizes are enough for a compiler to learn that they vary. Rows that are slots 0, 1, ... take
        a path of their own (`slots_B` None), so every size runs both in and out of slot order.
        """
        last, ends = self.cache.slots - 1, (self.lengths[0], self.lengths[-1])
        blocks = [1 + k for k in self.speculator.counts] if self.speculator else []
        for rows, size in itertools.product(self.rows, [1, *blocks]):
            for slots, length in itertools.product((list(range(rows)), [last] * rows), ends):
                self.forward(self.decode, [[]] * rows, [0] * rows, slots, size=size, length=length, every=size > 1)
        for size, every in [*((size, False) for size in self.chunks), (self.scored, True)]:
            for slot, length in itertools.product((0, last), ends):
                self.forward(self.prefill, [[]], [0], [slot], size=size, length=length, every=every)
        if self.speculator:
            for rows in self.rows:
                self.speculator.measure(self.advance, rows)

    def _prefill(self, chunk: Chunk) -> Tensor:
        request, count = chunk.request, chunk.count
        if request.params.prompt_logprobs is not None:
            return self._score_prompt(request, count, request.params.prompt_logprobs)
        tokens = request.tokens(request.computed, request.computed + count)
        size = bucket_of(self.chunks, count)
        return self.forward(self.prefill, [tokens], [request.computed], [request.slot], size=size)

    def _score_prompt(self, request: Request, count: int, best: int) -> Tensor:
        """A chunk whose tokens' log-probabilities are noted, in pieces of one size."""
        end = request.computed + count
        for start in range(request.computed, end, self.scored):
            tokens = request.tokens(start, min(start + self.scored, end))
            rows, slots = [tokens], [request.slot]
            logits_SV = self.forward(self.prefill, rows, [start], slots, size=self.scored, every=True)[0, : len(tokens)]
            following = request.prompt[start + 1 : start + 1 + len(tokens)]
            request.prompt_logprobs += top_logprobs(logits_SV[: len(following)], following, best)
        return logits_SV[-1:]

    def advance(self, requests: list[Request]) -> dict[str, list[SampledToken]]:
        """One token for each request, and before it the accepted proposals."""
        started = time.perf_counter()
        proposal = self.speculator.propose(requests) if self.speculator else None
        if self.speculator is None or proposal is None:
            sampled = self._sample(requests, *self._decode(requests))
        else:
            sampled = self._verify(requests, *self._score(requests, proposal), proposal, self.speculator)
        if self.speculator:
            accepted = [len(sampled[r.id]) - 1 for r in requests]
            self.speculator.learn(requests, proposal, accepted, time.perf_counter() - started)
        return sampled

    def ended(self, request: Request) -> None:
        """It will be in no further plan."""
        if self.speculator:
            self.speculator.ended(request)

    def chunk_beside(self, decodes: list[Request]) -> int:
        """How many prompt tokens the next step, which decodes these, should compute."""
        return self.budget.tokens(len(decodes)) if self.budget else self.chunks[-1]

    def learn(self, plan: StepPlan, sampled: dict[str, list[SampledToken]], seconds: float) -> None:
        """How long the plan's streams waited for its tokens, or without a stream how long it took."""
        if self.budget is None:
            return
        burst = 1 if self.speculator else max((len(sampled[r.id]) for r in plan.decodes), default=1)
        prompt_tokens = sum(chunk.count for chunk in plan.chunks)
        self.budget.learn(prompt_tokens=prompt_tokens, decodes=len(plan.decodes), seconds=seconds / burst)

    def _decode(self, requests: list[Request]) -> tuple[Tensor, Tensor | None]:
        """The logits after each request's last token [B, V], and where known their argmax [B]."""
        last = [[r.output[-1]] for r in requests]
        starts, slots = [r.computed for r in requests], [r.slot for r in requests]
        return self.forward(self.decode, last, starts, slots, size=1), None

    def _block(self, requests: list[Request], proposal: Proposal) -> Batch:
        """Each request's last token and its proposals."""
        counts = self.speculator.counts if self.speculator else []
        size = 1 + bucket_of([0, *counts], proposal.draft_BK.shape[1])
        tokens = [[r.output[-1]] + [0] * count for r, count in zip(requests, proposal.counts, strict=True)]
        starts, slots = [r.computed for r in requests], [r.slot for r in requests]
        return self._batch(tokens, starts, slots, size=size, fed_BK=proposal.draft_BK, every=True)

    def _score(self, requests: list[Request], proposal: Proposal) -> tuple[Tensor, Tensor | None]:
        """The logits after each request's last token and its proposals [B, S, V], and where known their argmax."""
        return self.decode(self._block(requests, proposal)), None

    def forward(
        self, forward: Forward, tokens: list[list[int]], starts: list[int], slots: list[int], *, size: int,
        length: int | None = None, fed_BK: Tensor | None = None, every: bool = False,
    ) -> Tensor:  # fmt: skip
        """Run rows that start at their own positions, padded to one shape.

        Args:
            size: tokens of the padded row; length: cached positions to read, None: the bucket that holds all rows.
            fed_BK: tokens on the device that replace each row's from its second on, or all of a row of one.
        Returns:
            logits of each row's last token [B, V], or with `every` of all [B, S, V].
        """
        batch = self._batch(tokens, starts, slots, size=size, length=length, fed_BK=fed_BK, every=every)
        return forward(batch)[: len(tokens)]

    def _batch(
        self, tokens: list[list[int]], starts: list[int], slots: list[int], *, size: int,
        length: int | None = None, fed_BK: Tensor | None = None, every: bool = False,
    ) -> Batch:  # fmt: skip
        """The rows, padded to one shape; see `forward`."""
        scratch, real = self.cache.scratch, len(tokens)
        pad = bucket_of(self.rows, real) - real
        if length is None:
            ends = (start + len(row) for row, start in zip(tokens, starts, strict=True) if row)
            length = bucket_of(self.lengths, max(ends))
        tokens_BS = self._tensor([row + [0] * (size - len(row)) for row in tokens] + [[0] * size] * pad)
        if fed_BK is not None:
            first = min(1, size - fed_BK.shape[1])
            tokens_BS[:real, first : first + fed_BK.shape[1]] = fed_BK
        positions_BS = [
            [start + i if i < len(row) else scratch for i in range(size)]
            for row, start in zip(tokens, starts, strict=True)
        ] + [[scratch] * size] * pad
        slots_B = None if slots == list(range(real)) else self._tensor(slots + [slots[0]] * pad)
        select_B = None if every else self._tensor([max(len(row) - 1, 0) for row in tokens] + [0] * pad)
        return Batch(tokens_BS, self._tensor(positions_BS), self.cache, length, slots_B, select_B)

    def _tensor(self, values: list[Any]) -> Tensor:
        return on_device(values, self.device)

    def _sample(
        self, requests: list[Request], logits_BV: Tensor, best_B: Tensor | None = None
    ) -> dict[str, list[SampledToken]]:
        """One token a request, keyed to the position it will take. best_B: the logits' argmax, where known."""
        edited_BV = self._edit(requests, logits_BV)
        params = sampling_tensors([r.params for r in requests], self.device)
        if params is None and best_B is not None and edited_BV is logits_BV:
            tokens = best_B.tolist()
        else:
            uniform_B = None if params is None else uniform(*draws_of(requests, self.device))
            tokens = sample(edited_BV, params, uniform_B).tolist()
        return {
            r.id: [SampledToken(token, sampled_logprobs(logits_V, token, r.params.logprobs))]
            for r, token, logits_V in zip(requests, tokens, logits_BV, strict=True)
        }

    def _verify(
        self,
        requests: list[Request],
        logits_BSV: Tensor,
        best_BS: Tensor | None,
        proposal: Proposal,
        speculator: Speculation,
    ) -> dict[str, list[SampledToken]]:
        """Each row's accepted proposals, and the token after them. best_BS: the logits' argmax, where known."""
        rows, scored = len(requests), proposal.draft_BK.shape[1] + 1
        edited_BSV = logits_BSV = logits_BSV[:rows, :scored]
        best_BS = None if best_BS is None else best_BS[:rows, :scored]
        if any(needs_edit(r.params, len(r.output)) for r in requests):  # such rows have no proposals
            first_BV = self._edit(requests, logits_BSV[:, 0])
            edited_BSV, best_BS = torch.cat((first_BV[:, None], logits_BSV[:, 1:]), 1), None
        params = sampling_tensors([r.params for r in requests], self.device)
        draws = draws_of(requests, self.device)
        accepted_B, next_B = speculator.accept(edited_BSV, params, proposal, draws, best_BS)
        sampled = {}
        packed = torch.cat((accepted_B[:, None], next_B[:, None], proposal.draft_BK), 1).tolist()
        for r, logits_SV, (accepted, following, *draft) in zip(requests, logits_BSV, packed, strict=True):
            tokens = [*draft[:accepted], following]
            sampled[r.id] = [
                SampledToken(token, sampled_logprobs(logits_SV[i], token, r.params.logprobs))
                for i, token in enumerate(tokens)
            ]
        return sampled

    def _edit(self, requests: list[Request], logits_BV: Tensor) -> Tensor:
        """Logits with the rows' penalties, biases and bans."""
        if not any(needs_edit(r.params, len(r.output)) for r in requests):
            return logits_BV
        rows = [
            edit_logits(row_V, r.params, prompt=r.prompt, output=r.output, eos_ids=self.eos_ids)
            if needs_edit(r.params, len(r.output))
            else row_V
            for r, row_V in zip(requests, logits_BV, strict=True)
        ]
        return torch.stack(rows)


def sampled_logprobs(logits_V: Tensor, token: int, best: int | None) -> Logprobs:
    """The chosen token's log-probability and the `best` highest, of the model's own distribution; () for None."""
    return () if best is None or token == NO_TOKEN else top_logprobs(logits_V[None], [token], best)[0]


def top_logprobs(logits_NV: Tensor, tokens: list[int], best: int) -> list[Logprobs]:
    """Of each row, the log-probability of its token and the `best` highest."""
    logprobs_NV = logits_NV.log_softmax(-1)
    values_NK, ids_NK = logprobs_NV.topk(best)
    own_N1 = logprobs_NV.gather(-1, on_device(tokens, logits_NV.device)[:, None])
    rows = zip(tokens, own_N1[:, 0].tolist(), ids_NK.tolist(), values_NK.tolist(), strict=True)
    return [((token, own), *zip(ids, values, strict=True)) for token, own, ids, values in rows]
