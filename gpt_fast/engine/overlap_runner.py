"""OverlapRunner: the host's work and the model's overlap (asynchronous scheduling).

It launches the next decode step before the scheduler has planned it; for greedy rows even before the last step's tokens
were read. The host's work between two steps (sampling, events, text, planning) would leave the memory idle, and what
the plan says next is nearly always known. A step that turns out not to be the planned one is thrown away: it costs its
time and changes nothing, for rows are independent and a slot holds what the scheduler says it holds, not what was
written behind that. While a prompt prefills, nothing begins early: the next step is not known.

A step's prompts and decodes are one forward, but for prompts whose tokens are scored.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_fast.engine.runner import Runner, Speculation
from gpt_fast.model.forward import PendingStep, Startable
from gpt_fast.request import Request, SampledToken, StepPlan
from gpt_fast.sampling import needs_edit
from gpt_fast.speculative.verify import Proposal


class Begun(NamedTuple):
    """A decode begun before it was planned: which requests, each at which position, and the step itself."""

    rows: list[tuple[Request, int]]
    step: PendingStep

    def covers(self, requests: list[Request]) -> bool:
        return all((r, r.computed) in self.rows for r in requests)


class OverlapRunner(Runner):
    """A Runner whose decode is Startable, and takes rows of any lengths at no cost for their padding."""

    decode: Startable

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begin_next = self._begin_next
        self.begun: Begun | None = None
        self.more = False  # a prompt has tokens left behind the step that runs

    def chunk_beside(self, decodes: list[Request]) -> int:
        """0 where their step has begun: it brings their tokens now, and the prompt joins them in the next."""
        return 0 if self.begun and self.begun.covers(decodes) else super().chunk_beside(decodes)

    def run(self, plan: StepPlan) -> dict[str, list[SampledToken]]:
        if self.begun and (plan.clears or plan.copies):
            self.begun.step.result()  # it writes to the cache
        self.more = plan.more
        if not plan.chunks or any(chunk.request.params.prompt_logprobs is not None for chunk in plan.chunks):
            return super().run(plan)
        super().run(replace(plan, chunks=(), decodes=()))
        return self._join(plan)

    @torch.inference_mode()
    def _join(self, plan: StepPlan) -> dict[str, list[SampledToken]]:
        """The plan's decodes and chunks in one forward, which reads the weights once. No proposals are verified:
        proposers catch up with tokens that came without them, as after a rest."""
        self.begun = None
        rows = [*plan.decodes, *(chunk.request for chunk in plan.chunks)]
        counts = [1] * len(plan.decodes) + [chunk.count for chunk in plan.chunks]
        tokens = [r.tokens(r.computed, r.computed + count) for r, count in zip(rows, counts, strict=True)]
        batch = self._batch(tokens, [r.computed for r in rows], [r.slot for r in rows], size=max(counts))
        step = self.decode.start(batch, best_only=all(map(wants_best, rows)))
        ready = len(plan.decodes) + sum(chunk.last for chunk in plan.chunks)  # only the final chunk may be unfinished
        logits_BV, best_B = step.result(), step.best()
        return self._sample(rows[:ready], logits_BV[:ready], best_B[:ready]) if ready else {}

    @torch.inference_mode()
    def _begin_next(self, requests: list[Request]) -> None:
        if requests and not self.begun and self._plain_next(requests, unknown=0):
            self.begun = self._start(requests)

    def speculate_with(self, speculator: Speculation | None) -> None:
        if self.begun:  # as long as another decided that the step is plain
            self.begun.step.result()
        self.begun = None
        super().speculate_with(speculator)

    def _decode(self, requests: list[Request]) -> tuple[Tensor, Tensor | None]:
        begun, self.begun = self.begun, None
        if begun is None or not begun.covers(requests):
            begun = self._start(requests)
        # A request that has ended must not go on: its slot may be another's by then.
        same = begun.step.latest and len(begun.rows) == len(requests) and not self.more
        greedy = same and all(greedy_for(r, 2, self.cache.max_seq_len) for r in requests)
        if greedy and self._plain_next(requests, unknown=1):
            self.begun = self._start([r for r, _ in begun.rows], after=begun)
        index = [begun.rows.index((r, r.computed)) for r in requests]
        logits_BV, best_B = begun.step.result(), begun.step.best()
        if index == list(range(len(index))):
            return logits_BV[: len(index)], best_B[: len(index)]
        return logits_BV[index], best_B[index]

    def _score(self, requests: list[Request], proposal: Proposal) -> tuple[Tensor, Tensor]:
        self.begun = None  # of other requests
        step = self.decode.start(self._block(requests, proposal), best_only=all(map(wants_best, requests)))
        return step.result(), step.best()

    def _plain_next(self, requests: list[Request], *, unknown: int) -> bool:
        """Whether the next step verifies no proposals."""
        return self.speculator is None or self.speculator.plain_next(requests, unknown=unknown)

    def _start(self, requests: list[Request], after: Begun | None = None) -> Begun:
        """Begin a decode: of what the requests hold, or of the token that the step `after` will give each."""
        rows = [(r, r.computed + (after is not None)) for r in requests]
        last = [[r.output[-1]] for r in requests]
        batch = self._batch(last, [at for _, at in rows], [r.slot for r in requests], size=1)
        best_only = all(map(wants_best, requests))
        return Begun(rows, self.decode.start(batch, after=after and after.step, best_only=best_only))


def greedy_for(request: Request, steps: int, max_seq_len: int) -> bool:
    """Whether its next `steps` tokens are the argmax of the model's own logits, unless one of them ends it."""
    room = len(request.output) + steps <= request.params.max_new_tokens and request.computed + steps <= max_seq_len
    return room and is_greedy(request)


def is_greedy(request: Request) -> bool:
    """Whether its next tokens are the argmax of the model's own logits: edits end with more output, or never."""
    return request.params.temperature == 0 and not needs_edit(request.params, len(request.output))


def wants_best(request: Request) -> bool:
    """Whether nobody looks at its logits but for the argmax."""
    return is_greedy(request) and request.params.logprobs is None
