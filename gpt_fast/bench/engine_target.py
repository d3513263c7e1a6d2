"""The engine called directly, as a target."""

from __future__ import annotations

import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt_fast.bench import long_prompt
from gpt_fast.bench.quality import quality_of
from gpt_fast.bench.recorder import Recorder
from gpt_fast.bench.sample import Case, Description, Sample
from gpt_fast.config import SamplingParams
from gpt_fast.engine.overlap_runner import OverlapRunner
from gpt_fast.engine.runner import Runner
from gpt_fast.llm import Engine
from gpt_fast.measure.machine import CpuMeter
from gpt_fast.model.forward import Batch
from gpt_fast.ops.cpu.screen import MAX_ROWS


class EngineTarget:
    """An Engine, or one loaded with EngineConfig's options. ConfigError and CheckpointError come through."""

    def __init__(self, engine: Engine | None = None, **options: Any) -> None:
        self.engine = engine or Engine.load(**options)
        self.helpers: list[int] = []  # process ids of what computes with this one
        self.ids = itertools.count()
        for _ in self.engine.events([0], SamplingParams(max_new_tokens=1, ignore_eos=True)):
            pass  # generate one token, so that the time that a start takes includes the first token's latency

    def describe(self) -> Description:
        told = self.engine.description
        weights = Path(told.checkpoint)
        dtype = told.dtype if told.quantization == "none" else None
        quality = quality_of(weights, kv_cache=told.kv_cache, dtype=dtype)
        return Description(
            weight_bytes=told.weight_bytes_per_step,
            greedy_bytes=told.greedy_bytes_per_step,
            greedy_rows=MAX_ROWS,
            kv_bytes=self.engine.core.cache_bytes_per_token,
            load_seconds=told.load_seconds,
            facts={**told.as_dict(), "checkpoint": weights.name, "torch": torch.__version__, "quality": quality},
        )

    def run(self, case: Case, busy: int = 0) -> Sample:
        """Decode all rows together. Segments begin when every row has its first token and end with the first row.

        busy: processes that spin meanwhile; their CPU time is not foreign, for it is part of what is measured.
        """
        with neighbours(busy) as pids:
            return self._run(case, Recorder(CpuMeter([*self.helpers, *pids])))

    def _run(self, case: Case, recorder: Recorder) -> Sample:
        params = SamplingParams(max_new_tokens=case.new_tokens, ignore_eos=True, temperature=case.temperature)
        names = [f"bench-{next(self.ids)}" for _ in range(case.rows)]
        self.engine.core.forget_slots()  # a case is run twice: alone and beside busy programs
        recorder.start()
        for name, prompt in zip(names, case.prompts(), strict=True):
            self.engine.add(name, prompt, params)
        waiting, running = set(names), True
        while waiting:
            for event in self.engine.step():
                waiting.discard(event.request_id)
                running = running and event.finish_reason is None
        recorder.first_token()
        while running:
            started = time.perf_counter()
            events = self.engine.step()
            recorder.step(time.perf_counter() - started, len(events))
            running = all(event.finish_reason is None for event in events)
        for name in names:
            self.engine.abort(name)
        return recorder.sample(case)

    def recompiles(self) -> int:
        return self.engine.core.recompiles()

    def long_prompt(self, prompt_len: int, rounds: int) -> dict[str, Any]:
        return long_prompt.measure(
            self.engine, prompt_len, rounds=rounds, vocabulary=min(1000, self.engine.model_config.vocab_size)
        )

    def verify(self, context: int, sizes: Sequence[int], *, repeat: int = 30) -> dict[int, float]:
        """Median seconds of one greedy forward of M tokens of one row after `context` cached ones, for M of `sizes`."""
        return forward_seconds(self.engine.core.runner, context, sizes, repeat=repeat)


@torch.inference_mode()
def forward_seconds(runner: Runner, context: int, sizes: Sequence[int], *, repeat: int) -> dict[int, float]:
    """See EngineTarget.verify. The sizes take turns, so that drift touches all alike."""
    rng = random.Random(0)
    forward = partial(best_of, runner) if isinstance(runner, OverlapRunner) else runner.decode
    vocabulary = runner.cache.config.vocab_size
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(repeat + 2):
        for size in sizes:
            tokens = [rng.randrange(vocabulary) for _ in range(size)]
            started = time.perf_counter()
            runner.forward(forward, [tokens], [context], [0], size=size, every=size > 1)
            if turn >= 2:  # the first turns warm up, and may compile
                seconds[size].append(time.perf_counter() - started)
    return {size: statistics.median(values) for size, values in seconds.items()}


def best_of(runner: OverlapRunner, batch: Batch) -> torch.Tensor:
    """A greedy step's tokens, as such a runner gets them: without logits."""
    return runner.decode.start(batch, best_only=True).best()


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """The process ids of `count` programs that each keep a core busy, ended on the way out."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield [process.pid for process in spinning]
    finally:
        for process in spinning:
            process.kill()
            process.wait()
