"""A stream beside which a long prompt prefills: how late its tokens come, and how long the prompt takes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gpt_fast.config import SamplingParams
from gpt_fast.llm import Engine
from gpt_fast.measure.machine import CpuMeter, foreign_shares
from gpt_fast.measure.stats import percentile

WARM_TOKENS, USUAL_TOKENS = 30, 100  # of the stream: before the prompt comes, and as many usual ones behind it


@dataclass(frozen=True)
class Round:
    """Seconds.

    during, usual: from each of the stream's tokens to its next, while the prompt prefilled, and both before and after,
    for the stream's own context grows meanwhile. alone, beside: until the prompt's first token. foreign: share of the
    CPUs that others used meanwhile.
    """

    usual: list[float]
    during: list[float]
    alone: float
    beside: float
    foreign: float | None = None


def measure(engine: Engine, prompt_len: int, *, rounds: int, vocabulary: int) -> dict[str, Any]:
    """The figures of so many rounds. The engine must have two slots of prompt_len + 256 positions or more."""
    rng, meter, taken = random.Random(0), CpuMeter(), []
    low = min(100, vocabulary // 2)  # the first ids are often special
    for index in range(rounds + 1):  # the first is discarded
        prompts = [[rng.randrange(low, vocabulary) for _ in range(size)] for size in (prompt_len, prompt_len, 32)]
        before = meter.read()
        alone = prefill_alone(engine, prompts[0])
        usual, during, beside = prefill_beside(engine, prompts[1], prompts[2])
        (foreign,) = foreign_shares([before, meter.read()])
        if index:
            taken.append(Round(usual, during, alone, beside, foreign))
    return figures(taken, prompt_len)


def prefill_alone(engine: Engine, prompt: list[int]) -> float:
    """Seconds to its first token, on an engine that has nothing else to do."""
    started = time.perf_counter()
    engine.add("long", prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
    while not engine.idle:
        engine.step()
    return time.perf_counter() - started


def prefill_beside(engine: Engine, prompt: list[int], stream: list[int]) -> tuple[list[float], list[float], float]:
    """The stream's usual gaps, those while the prompt prefills, and how long that takes."""
    room = engine.core.max_seq_len - len(stream)
    engine.add("stream", stream, SamplingParams(max_new_tokens=room, ignore_eos=True))
    times: list[float] = []
    while len(times) <= WARM_TOKENS + USUAL_TOKENS:
        times += step(engine)["stream"]
    started = time.perf_counter()
    engine.add("long", prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
    ended: list[float] = []
    while not ended:
        taken = step(engine)
        times, ended = times + taken["stream"], taken["long"]
    last = len(times)
    while len(times) < last + USUAL_TOKENS:
        times += step(engine)["stream"]
    engine.abort("stream")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    before, behind = WARM_TOKENS + USUAL_TOKENS, len(gaps) - USUAL_TOKENS
    return gaps[WARM_TOKENS:before] + gaps[behind:], gaps[before:behind], ended[0] - started


def step(engine: Engine) -> dict[str, list[float]]:
    """Take one; when the tokens that it brought to each were here."""
    events, now = engine.step(), time.perf_counter()
    return {name: [now for event in events if event.request_id == name] for name in ("stream", "long")}


def figures(rounds: Sequence[Round], prompt_len: int) -> dict[str, Any]:
    """Over all rounds: percentiles of the gaps in ms, medians of the rest; `over_usual` compares the median gaps."""
    usual = [gap * 1000 for taken in rounds for gap in taken.usual]
    during = [gap * 1000 for taken in rounds for gap in taken.during]
    loads = [taken.foreign for taken in rounds if taken.foreign is not None]
    gaps = {
        f"{name}_ms_p{percent}": percentile(values, percent)
        for name, values in (("usual", usual), ("during", during))
        for percent in (50, 90, 99)
    }
    return {
        "prompt_len": prompt_len,
        "rounds": len(rounds),
        **gaps,
        "over_usual": statistics.median(during) / statistics.median(usual),
        "alone_s": statistics.median(taken.alone for taken in rounds),
        "beside_s": statistics.median(taken.beside for taken in rounds),
        "foreign_load": statistics.fmean(loads) if loads else None,
    }
