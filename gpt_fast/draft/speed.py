"""Plain decode against speculation, by turns in one process and on one engine: what speculation brings, or costs.

Every batch of prompts is answered by every variant in turn, the order changing from round to round. Nothing that one
run computed serves the next: slots are forgotten, the draft's too. What a variant's controller learned stays, as it
does in a server.
"""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.draft.prompts import Prompt, categories
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.fixed_choice import speculator_of
from gpt_fast.measure.machine import CpuMeter, foreign_share
from gpt_fast.measure.stats import is_quiet, percentile
from gpt_fast.speculative.speculator import Speculator

Variants = Mapping[str, Speculator | None]


@dataclass(frozen=True)
class Turn:
    """One batch answered by one variant, from every row's first token to the last row's last.

    foreign: share of the machine's CPU time that other programs used meanwhile; None where it is not known.
    """

    category: str
    temperature: float
    variant: str
    tokens: int
    seconds: float
    cpu_seconds: float
    steps: int
    blocks: int
    drafted: int
    accepted: int
    foreign: float | None


@dataclass(frozen=True)
class Ratio:
    """A variant against plain decode in one kind of turns: tokens/s, and their quotient, pair by pair.

    overall: all tokens over all seconds of the quiet pairs. cpu: the same of CPU seconds, which foreign load touches
    less. low, high: the 10th and 90th percentile of the pairs' quotients.
    """

    category: str
    temperature: float | None  # None: all
    variant: str
    plain_tokens_per_s: float
    tokens_per_s: float
    overall: float
    cpu: float
    median: float
    low: float
    high: float
    pairs: int
    noisy: int
    acceptance: float
    tokens_per_step: float
    blocks_per_step: float


def variants(core: EngineCore, names: Sequence[str]) -> dict[str, Speculator | None]:
    """Plain decode and the named ways to speculate, each with a controller of its own that starts from the costs
    measured when the engine was loaded. "auto" chooses among all the proposers that there are."""
    loaded = speculator_of(core)
    if loaded is None:
        raise ConfigError("speculate", "the engine was loaded without a proposer")
    found: dict[str, Speculator | None] = {"plain": None}
    for name in names:
        chosen = loaded.proposers if name == "auto" else {k: p for k, p in loaded.proposers.items() if k == name}
        if not chosen:
            raise ConfigError("speculate", "no such proposer here", got=name, allowed=", ".join(loaded.proposers))
        controller = copy.deepcopy(loaded.controller)
        found[name] = Speculator(chosen, controller, max_seq_len=loaded.max_seq_len)
    return found


def batches(prompts: Sequence[Prompt], rows: int) -> list[tuple[str, list[list[int]]]]:
    """The prompts of each category, `rows` together; the last batch of a category starts over to be full."""
    found = []
    for category in categories(prompts):
        tokens = [p.tokens for p in prompts if p.category == category]
        for start in range(0, len(tokens), rows):
            found.append((category, list(itertools.islice(itertools.cycle(tokens), start, start + rows))))
    return found


def take_turns(
    core: EngineCore,
    ways: Variants,
    prompts: Sequence[Prompt],
    *,
    rows: int,
    temperatures: Sequence[float],
    max_new_tokens: int,
    repeat: int,
) -> list[list[Turn]]:
    """`repeat` rounds after a discarded one; each inner list holds one batch's turns, one a variant."""
    rounds: list[list[Turn]] = []
    work = [(*batch, temperature) for batch in batches(prompts, rows) for temperature in temperatures]
    for number in range(repeat + 1):
        for place, (category, tokens, temperature) in enumerate(work):
            params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, ignore_eos=True)
            first = (number + place) % len(ways)
            turns = []
            for name in [*ways, *ways][first : first + len(ways)]:
                random.seed(number)  # unseeded requests draw their seeds here
                core.forget_slots()
                with core.with_speculator(ways[name]):
                    turns.append(turn(core, tokens, params, category=category, variant=name))
            if number:
                rounds.append(turns)
    return rounds


def turn(
    core: EngineCore, prompts: Sequence[list[int]], params: SamplingParams, *, category: str, variant: str
) -> Turn:
    requests = [core.add(f"turn-{i}", prompt, params) for i, prompt in enumerate(prompts)]
    while not all(r.output for r in requests):
        core.step()
    speculator = speculator_of(core)
    blocks = speculator.totals.steps if speculator else 0
    before = [(len(r.output), r.drafted, r.accepted) for r in requests]
    meter, steps = CpuMeter(), 0
    reading, cpu, started = meter.read(), time.process_time(), time.perf_counter()
    while not core.idle:
        core.step()
        steps += 1
    seconds, used = time.perf_counter() - started, time.process_time() - cpu
    foreign = foreign_share(reading, meter.read())
    after = [(len(r.output), r.drafted, r.accepted) for r in requests]
    tokens, drafted, accepted = (
        sum(new - old for old, new in zip(olds, news, strict=True))
        for olds, news in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
    )
    blocks = (speculator.totals.steps if speculator else 0) - blocks
    return Turn(category, params.temperature, variant, tokens, seconds, used, steps, blocks, drafted, accepted, foreign)


# ------------------------------------------------------------------------------------------- figures


def compare(rounds: Sequence[Sequence[Turn]], *, limit: float) -> list[Ratio]:
    """By category and temperature and over everything, for each variant; pairs in which other programs used more than
    `limit` of the CPUs do not count."""
    kinds = sorted({(t.category, t.temperature) for turns in rounds for t in turns})
    names = [name for name in dict.fromkeys(t.variant for turns in rounds for t in turns) if name != "plain"]
    found = []
    for name in sorted(names):
        groups: list[tuple[str, float | None]] = [*kinds, ("all", None)]
        for category, temperature in groups:
            pairs = [pair(turns, name) for turns in rounds if belongs(turns[0], category, temperature)]
            found += summarize(pairs, category, temperature, name, limit)
    return found


def belongs(one: Turn, category: str, temperature: float | None) -> bool:
    return temperature is None or (one.category, one.temperature) == (category, temperature)


def pair(turns: Sequence[Turn], name: str) -> tuple[Turn, Turn]:
    by_name = {t.variant: t for t in turns}
    return by_name["plain"], by_name[name]


def summarize(
    pairs: Sequence[tuple[Turn, Turn]], category: str, temperature: float | None, name: str, limit: float
) -> list[Ratio]:
    """Empty where nothing was quiet."""
    quiet = [(a, b) for a, b in pairs if is_quiet(a.foreign, limit) and is_quiet(b.foreign, limit)]
    if not quiet:
        return []
    plain, spoken = total([a for a, _ in quiet]), total([b for _, b in quiet])
    quotients = [(b.tokens / b.seconds) / (a.tokens / a.seconds) for a, b in quiet]
    low, median, high = (percentile(quotients, p) or 0.0 for p in (10, 50, 90))
    speeds = plain.tokens / plain.seconds, spoken.tokens / spoken.seconds
    cpu = (spoken.tokens / spoken.cpu_seconds) / (plain.tokens / plain.cpu_seconds)
    return [
        Ratio(
            category,
            temperature,
            name,
            *speeds,
            speeds[1] / speeds[0],
            cpu,
            median,
            low,
            high,
            len(quiet),
            len(pairs) - len(quiet),
            spoken.accepted / max(spoken.drafted, 1),
            spoken.tokens / spoken.steps,
            spoken.blocks / spoken.steps,
        )
    ]


def total(turns: Sequence[Turn]) -> Turn:
    """Their sum; the names are the first one's."""
    summed = ("tokens", "seconds", "cpu_seconds", "steps", "blocks", "drafted", "accepted")
    return Turn(**{**asdict(turns[0]), **{name: sum(getattr(t, name) for t in turns) for name in summed}})


def print_ratios(ratios: Sequence[Ratio]) -> None:
    print(
        f"{'variant':8} {'category':10} {'T':>4} {'plain tok/s':>12} {'tok/s':>8} {'ratio':>6} {'p10':>6} {'p50':>6}"
        f" {'p90':>6} {'by CPU':>7} {'accepted':>9} {'tok/step':>9} {'blocks/step':>12} {'pairs':>6} {'noisy':>6}"
    )
    for r in ratios:
        temperature = "" if r.temperature is None else f"{r.temperature:g}"
        print(
            f"{r.variant:8} {r.category:10} {temperature:>4} {r.plain_tokens_per_s:12.1f} {r.tokens_per_s:8.1f}"
            f" {r.overall:6.3f} {r.low:6.3f} {r.median:6.3f} {r.high:6.3f} {r.cpu:7.3f} {r.acceptance:9.2f}"
            f" {r.tokens_per_step:9.2f} {r.blocks_per_step:12.2f} {r.pairs:6} {r.noisy:6}"
        )


def json_of(ratios: Sequence[Ratio]) -> list[dict[str, Any]]:
    return [asdict(ratio) for ratio in ratios]
