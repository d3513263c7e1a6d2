"""Who runs in the next step: slots, admission, chunked prefill, prefix reuse, abort. Plain Python, no torch.

One step has two parts, either of which may be empty: every running request decodes, and prompts advance by
chunks. `schedule` says what to do, the runner does it, `commit` turns the sampled tokens into events. A slot keeps
the tokens it holds after its request has ended, so the next prompt with the same beginning (a chat's next turn, a
shared system prompt) starts behind it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from gpt_fast.request import NO_TOKEN, Chunk, PrefixCopy, Request, SampledToken, StepPlan, TokenEvent, common_prefix

MIN_SHARED = 16  # a shorter common prefix is not worth a copy


@dataclass
class Slot:
    """What a slot's cache holds, whoever wrote it, and when it was last used.

    `ill`: it may hold NaN, so it must be zeroed before it is used (KVCache.clear).
    """

    tokens: list[int] = field(default_factory=list)
    owner: str = ""
    used: int = 0
    ill: bool = False


class Load(NamedTuple):
    """What a scheduler has to do: requests in slots, requests that wait for one, and the share of the cache's positions
    that the running ones occupy."""

    running: int
    waiting: int
    cache_usage: float


class Scheduler:
    """Owns every request and slot. Not thread-safe: one thread adds, aborts, schedules and commits."""

    def __init__(
        self,
        *,
        slots: int,
        max_seq_len: int,
        eos_ids: Iterable[int],
        reuse_prefix: bool = True,
        ended: Callable[[Request], None] | None = None,
    ) -> None:
        """ended: told of every request that ran, when it leaves its slot."""
        self.max_seq_len = max_seq_len
        self.eos_ids = frozenset(eos_ids)
        self.reuse_prefix, self.ended = reuse_prefix, ended
        self.waiting: deque[Request] = deque()
        self.running: dict[str, Request] = {}
        self.slots = [Slot() for _ in range(slots)]
        self.free = set(range(slots))
        self.clock = 0
        self.steps = 0

    # ------------------------------------------------------------------------------ in and out

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt must leave room for at least one token of a slot."""
        if not 0 < len(request.prompt) < self.max_seq_len:
            raise ValueError(f"prompt: {len(request.prompt)} tokens (allowed 1..{self.max_seq_len - 1})")
        if request.id in self.running or any(r.id == request.id for r in self.waiting):
            raise ValueError(f"request id: {request.id} is already running")
        self.waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Forget a request, running or waiting; its slot is free at once. False when it is unknown."""
        if request_id in self.running:
            self._release(self.running[request_id])
            return True
        before = len(self.waiting)
        self.waiting = deque(r for r in self.waiting if r.id != request_id)
        return len(self.waiting) < before

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def load(self) -> Load:
        positions = sum(r.computed for r in list(self.running.values()))
        return Load(len(self.running), len(self.waiting), positions / (len(self.slots) * self.max_seq_len))

    def forget_slots(self) -> None:
        """Let no request begin with what an earlier one left in a slot."""
        for index in self.free:
            self.slots[index] = Slot(ill=self.slots[index].ill)

    @property
    def decoding(self) -> list[Request]:
        """The requests that the next step decodes, unless one is aborted before."""
        return [r for r in self.running.values() if r.output]

    @property
    def prefilling(self) -> bool:
        """Whether a prompt is there for the next step to advance."""
        return len(self.decoding) < len(self.running) or bool(self.waiting and self.free)

    # ------------------------------------------------------------------------------- one step

    def schedule(self, *, chunk: int, chunk_beside_decode: int) -> StepPlan:
        """The next step. A prompt advances by at most `chunk` tokens, by `chunk_beside_decode` when others decode."""
        clears = self._admit()
        decodes = tuple(self.decoding)
        copies, chunks = self._prefill(chunk_beside_decode if decodes else chunk)
        more = len(decodes) + sum(chunk.last for chunk in chunks) < len(self.running)
        return StepPlan(copies, chunks, decodes, clears, more)

    def commit(self, plan: StepPlan, sampled: Mapping[str, list[SampledToken]]) -> list[TokenEvent]:
        """Record what the step computed and sampled; `sampled` covers every decode and every last chunk.

        A decode that verified proposals brings more than one token. What follows a request's end is dropped.
        """
        events = []
        for chunk in plan.chunks:
            self._fed(chunk.request, chunk.count)
            if chunk.last:
                events += self._append(chunk.request, sampled[chunk.request.id])
        for request in plan.decodes:
            for token in sampled[request.id]:
                self._fed(request, 1)
                events += self._append(request, [token])
                if request.id not in self.running:
                    break
        return events

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots and requests agree. Cheap; called whenever the engine falls idle."""
        held = [r.slot for r in self.running.values()]
        if len(set(held)) != len(held) or self.free & set(held) or len(held) + len(self.free) != len(self.slots):
            raise RuntimeError(f"slots are inconsistent: held {sorted(held)}, free {sorted(self.free)}")
        for request in self.running.values():
            if self.slots[request.slot].tokens != request.tokens(0, request.computed):
                raise RuntimeError(f"slot {request.slot} does not hold the tokens of request {request.id}")

    # ------------------------------------------------------------------------------- internals

    def _admit(self) -> tuple[int, ...]:
        """Give waiting requests free slots, first come first served; the slots among them that must be zeroed."""
        clears = []
        while self.waiting and self.free:
            request = self.waiting.popleft()
            index, length = self._place(request)
            if self.slots[index].ill:
                clears.append(index)
            self._occupy(request, index, length)
            request.started = time.monotonic()
            self.running[request.id] = request
        return tuple(clears)

    def _place(self, request: Request) -> tuple[int, int]:
        """The free slot a request gets, and how many of its tokens are there already.

        That is the slot that shares most with it, unless more cached tokens would be lost there than in the slot
        unused for longest: then the latter, and `_copy` brings the shared beginning (a chat must not take over
        another chat's slot for the system prompt they share).
        """
        shared = {index: self._shared(request, self.slots[index]) for index in self.free}
        loss = {index: len(self.slots[index].tokens) - shared[index] for index in self.free}
        best = max(self.free, key=lambda index: (shared[index], -loss[index], -index))
        oldest = min(self.free, key=lambda index: (self.slots[index].used, index))
        if shared[best] < MIN_SHARED:
            return oldest, 0
        self.slots[best].used = self.clock  # read from just now
        if loss[best] <= max(loss[oldest], MIN_SHARED):
            return best, shared[best]
        return oldest, 0

    def _prefill(self, budget: int) -> tuple[tuple[PrefixCopy, ...], tuple[Chunk, ...]]:
        """Spend at most `budget` prompt tokens, oldest prompt first and every other step the shortest first.

        Every chunk first looks for its tokens in other slots, so prompts that arrive together and share a
        beginning compute it once.
        """
        copies, chunks = [], []
        self.steps += 1
        pending = [r for r in self.running.values() if not r.output]
        if self.steps % 2:
            pending.sort(key=lambda r: len(r.prompt) - r.computed)
        for request in pending:
            if budget <= 0:
                break
            if copy := self._copy(request):
                copies.append(copy)
            left = len(request.prompt) - request.computed
            count = min(left, budget)
            chunks.append(Chunk(request, count, last=count == left))
            budget -= count
        return tuple(copies), tuple(chunks)

    def _copy(self, request: Request) -> PrefixCopy | None:
        """The copy from another slot that would spare the request at least MIN_SHARED tokens, if any."""
        start, stop = request.computed, request.computed + MIN_SHARED
        wanted = request.prompt[start:stop]
        likely = [index for index, slot in enumerate(self.slots) if slot.tokens[start:stop] == wanted]
        shared = {index: self._shared(request, self.slots[index]) for index in likely}
        source = max(shared, key=shared.__getitem__, default=request.slot)
        if shared.get(source, 0) < stop:
            return None
        self._occupy(request, request.slot, shared[source])
        return PrefixCopy(source, request.slot, shared[source])

    def _occupy(self, request: Request, index: int, length: int) -> None:
        self.free.discard(index)
        self.clock += 1
        self.slots[index] = Slot(request.prompt[:length], request.owner, self.clock)
        request.reused += length - request.computed
        request.slot, request.computed = index, length

    def _shared(self, request: Request, slot: Slot) -> int:
        if not self.reuse_prefix or slot.owner != request.owner or request.params.prompt_logprobs is not None:
            return 0  # a prompt whose tokens are scored must run
        last = len(request.prompt) - 1  # it must run, to be sampled from
        return min(common_prefix(slot.tokens, request.prompt), last)

    def _fed(self, request: Request, count: int) -> None:
        slot = self.slots[request.slot]
        slot.tokens += request.tokens(request.computed, request.computed + count)
        request.computed += count

    def _append(self, request: Request, tokens: Iterable[SampledToken]) -> list[TokenEvent]:
        events = []
        for sampled in tokens:
            if sampled.token == NO_TOKEN:
                self._release(request)
                self.slots[request.slot] = Slot(used=self.clock, ill=True)
                events.append(TokenEvent(request.id, NO_TOKEN, "error"))
                break
            request.output.append(sampled.token)
            reason = self._finish_reason(request, sampled.token)
            events.append(TokenEvent(request.id, sampled.token, reason, sampled.logprobs))
            if reason is not None:
                self._release(request)
                break
        return events

    def _finish_reason(self, request: Request, token: int) -> str | None:
        params = request.params
        if (token in self.eos_ids and not params.ignore_eos) or token in params.stop_token_ids:
            return "stop"
        full = request.length >= self.max_seq_len or len(request.output) >= params.max_new_tokens
        return "length" if full else None

    def _release(self, request: Request) -> None:
        del self.running[request.id]
        self.free.add(request.slot)
        self.clock += 1
        self.slots[request.slot].used = self.clock
        if self.ended:
            self.ended(request)
