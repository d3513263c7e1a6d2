"""EngineCore: add and abort requests, step. Token ids in, token events out; text belongs to llm.py.

Shapes: B rows (requests), S tokens of a row, V vocabulary.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gpt_fast.config import SamplingParams
from gpt_fast.engine.runner import Runner, Speculation
from gpt_fast.engine.scheduler import Load, Scheduler
from gpt_fast.request import Request, TokenEvent


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process; 0 where nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


class EngineCore:
    """Continuous batching over one model. One thread owns it: add, abort and step are never called together."""

    def __init__(self, runner: Runner, *, reuse_prefix: bool = True) -> None:
        self.runner = runner
        self.scheduler = Scheduler(
            slots=runner.cache.slots,
            max_seq_len=runner.cache.max_seq_len,
            eos_ids=runner.eos_ids,
            reuse_prefix=reuse_prefix,
            ended=runner.ended,
        )
        self.graphs_at_start = compiled_graphs()
        self.tokens_at = 0.0  # when the last step had its tokens

    @property
    def max_seq_len(self) -> int:
        return self.scheduler.max_seq_len

    @property
    def cache_bytes_per_token(self) -> int:
        cache = self.runner.cache
        return cache.nbytes // (cache.slots * (cache.max_seq_len + 1))

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def slots(self) -> int:
        """How many requests run together."""
        return len(self.scheduler.slots)

    @property
    def eos_ids(self) -> list[int]:
        return self.runner.eos_ids

    @property
    def speculator(self) -> Speculation | None:
        return self.runner.speculator

    @property
    def decoding(self) -> int:
        """How many requests the next step decodes, if all that run are past their prompts; else 0."""
        decoding = len(self.scheduler.decoding)
        return decoding if decoding == len(self.scheduler.running) else 0

    def speculate_with(self, speculator: Speculation | None) -> None:
        """Let this one propose from the next step on; None: plain decode."""
        self.runner.speculate_with(speculator)

    @contextmanager
    def with_speculator(self, speculator: Speculation | None) -> Iterator[None]:
        """Let the steps meanwhile be those of an engine that was built with this speculator, or with none."""
        loaded = self.speculator
        self.speculate_with(speculator)
        try:
            yield
        finally:
            self.speculate_with(loaded)

    def forget_slots(self) -> None:
        """Let no request reuse what another computed before, in the model's slots or a proposer's."""
        self.scheduler.forget_slots()
        if self.runner.speculator:
            self.runner.speculator.forget_slots()

    def load(self) -> Load:
        """What runs and waits now."""
        return self.scheduler.load()

    def check_integrity(self) -> None:
        """Raise RuntimeError unless slots and requests agree."""
        self.scheduler.check_integrity()

    def recompiles(self) -> int:
        """Graphs compiled since the warm-up; anything but 0 is a request that had to wait for a compiler."""
        return compiled_graphs() - self.graphs_at_start

    def add(self, request_id: str, prompt: list[int], params: SamplingParams, *, owner: str = "") -> Request:
        """Queue a request.

        ValueError when the prompt does not fit a slot, a token is not in the vocabulary or the id is in use.
        """
        vocabulary = range(self.runner.cache.config.vocab_size)
        named = {"prompt": prompt, "logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
        for key, tokens in named.items():
            if (outside := next((t for t in tokens if t not in vocabulary), None)) is not None:
                raise ValueError(f"{key}: no such token (got {outside}, allowed 0..{vocabulary[-1]})")
        seed = random.getrandbits(63) if params.seed is None else params.seed
        request = Request(request_id, prompt, params, seed, owner)
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> bool:
        """Drop a request at once, wherever it is; False when it is unknown (it may just have ended)."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[TokenEvent]:
        """Advance everything by one step; the tokens it produced."""
        beside = self.runner.chunk_beside(self.scheduler.decoding)
        plan = self.scheduler.schedule(chunk=self.runner.chunks[-1], chunk_beside_decode=beside)
        if not plan:
            return []
        since = self.tokens_at if plan.decodes else time.perf_counter()
        sampled = self.runner.run(plan)
        self.tokens_at = time.perf_counter()
        self.runner.learn(plan, sampled, self.tokens_at - since)
        events = self.scheduler.commit(plan, sampled)
        if self.runner.begin_next and not self.scheduler.prefilling:
            self.runner.begin_next(self.scheduler.decoding)
        return events
