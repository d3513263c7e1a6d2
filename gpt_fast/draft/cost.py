"""What every kind of step costs on this machine: plain, a draft's, a verification's, a draft's reading of prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpt_fast.draft.formulas import Cost
from gpt_fast.draft.runs import draft_runner, rows_catching_up, target_runner
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.fixed_choice import speculating, speculator_of
from gpt_fast.engine.runner import Runner, bucket_of
from gpt_fast.model.forward import Startable
from gpt_fast.request import Request
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.greedy_chain import GreedyChain
from gpt_fast.speculative.speculator import timing_requests

REPEATS = 11


@torch.inference_mode()
def measure_cost(
    core: EngineCore,
    arm: str,
    batch_size: int,
    counts: Sequence[int],
    *,
    context: int = 64,
    unread: int = 0,
    temperature: float = 0.0,
) -> Cost:
    """Time every kind of step in turn, REPEATS times, after `context` tokens a row; medians.

    Plain steps and a draft's come several in a row, for a step may begin before the last one's tokens are read.
    unread: tokens of a prompt that a draft must read.
    """
    rows = timing_requests(batch_size, context, temperature=temperature)
    times: dict[str, list[float]] = {}

    def timed(key: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        times.setdefault(key, []).append(time.perf_counter() - started)

    target, runner, speculator = target_runner(core), draft_runner(core), speculator_of(core)
    proposer = speculator.proposers[arm] if speculator else None
    model = proposer.startable if isinstance(proposer, DraftProposer) and temperature == 0 else None
    for _ in range(REPEATS + 1):
        with speculating(core, None):
            times.setdefault("plain", []).append(plain_step(target, rows))
        if runner:
            timed("prompt", lambda: read_prompt(runner, unread))
            times.setdefault("draft", []).append(draft_step(runner, rows, model))
        for k in counts:
            timed(f"verify {k}", lambda k=k: forward(target, rows, k + 1))  # type: ignore[misc]
            with speculating(core, Choice(arm, k)):
                catch_up(core, target, rows)
                timed(f"step {k}", lambda: target.advance(rows))
    core.forget_slots()  # the rows wrote there
    for row in rows:
        target.ended(row)
    seconds = {key: statistics.median(values[1:]) for key, values in times.items()}
    plain, draft = seconds["plain"], seconds.get("draft", 0.0)
    v = {k: seconds[f"verify {k}"] / plain for k in counts}
    o = {k: (seconds[f"step {k}"] - k * draft) / plain - v[k] for k in counts}
    rate = batch_size / draft if draft else 0.0
    return Cost(batch_size, plain * 1e3, draft * 1e3, draft / plain, v, o, rate, seconds.get("prompt", 0.0) * 1e3)


def plain_step(runner: Runner, rows: Sequence[Request], steps: int = 4) -> float:
    """Seconds of a plain step among others, of rows that are left as they were."""
    before = [(row, list(row.output), row.computed) for row in rows]
    started = 0.0
    for step in range(1 + steps):
        if step == 1:
            started = time.perf_counter()
        sampled = runner.advance(list(rows))
        for row in rows:
            row.output.append(sampled[row.id][0].token)
            row.computed += 1
        if runner.begin_next:
            runner.begin_next(list(rows))
    seconds = (time.perf_counter() - started) / steps
    for row, output, computed in before:
        row.output[:], row.computed = output, computed
    return seconds


def draft_step(runner: Runner, rows: Sequence[Request], model: Startable | None, steps: int = 4) -> float:
    """Seconds of one of several proposals: steps of a chain where they can be begun (`model`), else one by one."""
    started = time.perf_counter()
    if model:
        GreedyChain(
            model,
            runner.cache,
            tokens=[[0] for _ in rows],
            starts=[r.computed for r in rows],
            slots=[r.slot for r in rows],
            counts=[steps] * len(rows),
        ).tokens()
    else:
        for _ in range(steps):
            forward(runner, rows, 1)
    return (time.perf_counter() - started) / steps


def read_prompt(runner: Runner, count: int) -> None:
    """Feed a draft's first slot `count` tokens, as it catches up with a prompt."""
    for start in range(0, count, runner.chunks[-1]):
        part = [0] * min(runner.chunks[-1], count - start)
        size = bucket_of(runner.chunks, len(part))
        runner.forward(runner.prefill, [part], [start], [0], size=size)[..., 0].tolist()


def catch_up(core: EngineCore, target: Runner, rows: Sequence[Request]) -> None:
    """Steps until a draft has seen all of the rows, and one more."""
    target.advance(list(rows))
    while rows_catching_up(core):
        target.advance(list(rows))


def forward(runner: Runner, rows: Sequence[Request], size: int) -> list[Any]:
    """One forward of `size` tokens a row, until the host has something of every token."""
    tokens = [[0] * size for _ in rows]
    starts, slots = [r.computed for r in rows], [r.slot for r in rows]
    return runner.forward(runner.decode, tokens, starts, slots, size=size, every=True)[..., 0].tolist()
