"""Running an engine core with and without its speculator, and what the models say about a given text.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_fast.config import SamplingParams
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.fixed_choice import speculating, speculator_of
from gpt_fast.engine.runner import Runner, bucket_of
from gpt_fast.model.cache import KVCache
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.speculator import Totals


@dataclass(frozen=True)
class Run:
    """Answers of requests decoded together, in their order.

    seconds, steps and tokens: of the steps that decoded a full batch and nothing else. ready_seconds, ready_steps: of
    those in which no draft had to catch up. caught_up: rows that had to, in the others.
    """

    answers: list[list[int]]
    seconds: float
    steps: int
    tokens: int
    totals: Totals
    ready_seconds: float = 0.0
    ready_steps: int = 0
    caught_up: int = 0


def run(
    core: EngineCore, choice: Choice | None, prompts: Sequence[list[int]], params: SamplingParams, *, together: int = 0
) -> Run:
    """Answer all prompts by this choice, `together` at a time (0: as many as there are slots)."""
    together = together or core.slots
    answers: dict[str, list[int]] = {f"draft-{i}": [] for i in range(len(prompts))}
    waiting = deque(zip(answers, prompts, strict=True))
    seconds, steps, tokens, ready_seconds, ready_steps, caught_up = 0.0, 0, 0, 0.0, 0, 0
    with speculating(core, choice):
        while waiting or not core.idle:
            load = core.load()
            for _ in range(min(together - load.running - load.waiting, len(waiting))):
                core.add(*waiting.popleft(), params)
            full = core.decoding == together
            started = time.perf_counter()
            events = core.step()
            if full:
                took = time.perf_counter() - started
                seconds, steps, tokens = seconds + took, steps + 1, tokens + len(events)
                behind = rows_catching_up(core)
                caught_up += behind
                if not behind:
                    ready_seconds, ready_steps = ready_seconds + took, ready_steps + 1
            for event in events:
                answers[event.request_id].append(event.token)
        speculator = speculator_of(core)
        totals = speculator.totals if speculator and choice else Totals()
    return Run(list(answers.values()), seconds, steps, tokens, totals, ready_seconds, ready_steps, caught_up)


class Reader:
    """A model's logits along texts, in a cache of its own: what plain decode would see at every position."""

    def __init__(self, runner: Runner) -> None:
        cache, self.dtype = runner.cache, runner.cache.k_LNHTD.dtype
        own = KVCache(cache.config, slots=1, max_seq_len=cache.max_seq_len, dtype=self.dtype, device=runner.device)
        self.runner = Runner(
            decode=runner.decode, prefill=runner.prefill, cache=own, eos_ids=(), prefill_chunk=runner.chunks[-1]
        )

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """float32 [len(answer), V]: what the model says where each token of the answer was chosen."""
        tokens, rows = [*prompt, *answer][:-1], []
        for start in range(0, len(tokens), self.runner.chunks[-1]):
            part = tokens[start : start + self.runner.chunks[-1]]
            size = bucket_of(self.runner.chunks, len(part))
            logits_1SV = self.runner.forward(self.runner.prefill, [part], [start], [0], size=size, every=True)
            rows.append(logits_1SV[0, max(len(prompt) - 1 - start, 0) : len(part)])
        return torch.cat(rows)


def rows_catching_up(core: EngineCore) -> int:
    """Rows of the last step whose draft had tokens to catch up with."""
    speculator = speculator_of(core)
    return speculator.last.behind if speculator else 0


def target_runner(core: EngineCore) -> Runner:
    """The target model's runner: what the tools here time and read beside the core's own steps."""
    return core.runner


def draft_runner(core: EngineCore) -> Runner | None:
    """The draft model's runner, where the core has one."""
    speculator = speculator_of(core)
    proposer = speculator.proposers.get("draft") if speculator else None
    return getattr(proposer, "runner", None)
