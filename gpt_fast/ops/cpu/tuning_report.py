"""`python -m gpt_fast.ops.cpu --tune`: every variant of a tuning in turn, on layers of real models' shapes.

For each shape and format the table shows the time of a step under each variant and its speed over the default's. Below
it stand the best and what the short measurement of a first load (tuning.choose) takes, over the best, a few times. The
best is kept for later loads.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from gpt_fast.config import ModelConfig
from gpt_fast.files import read_json_object, write_json
from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.cpu import build, tuning
from gpt_fast.ops.cpu.decoder import CpuDecoder
from gpt_fast.ops.cpu.tuning import CLEARLY, DEFAULT, ROWS, Axis, Choice, Place, Probe, choose

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(dim=576, n_head=9, n_kv_head=3, head_dim=64, intermediate_size=1536),
    "Llama-3.2-1B": dict(dim=2048, n_head=32, n_kv_head=8, head_dim=64, intermediate_size=8192),
}
TOTAL_BYTES = 96 << 20  # of the layers of a shape, as of a whole SmolLM2-135M in 4 bits
BYTES = {"int4": 0.5, "int8": 1.0, "bfloat16": 2.0}  # a weight


FETCHES = tuple((hint, distance) for hint in ("once", "L1", "L2") for distance in (1024, 2048, 4096, 8192, 16384))
ALL_AXES = (
    Axis("one_row", tuple(dict.fromkeys((*tuning.FETCHES, *FETCHES))), 1),
    Axis("both_tiles", (False, True), 1),
    Axis("few_rows", tuple(dict.fromkeys((*tuning.FETCHES, *FETCHES))), ROWS),
    Axis("row_block", (8, 4, 3, 2), ROWS),
    Axis("chunks_each", (8, 4, 16, 32), 1),
)
FIRST_LOADS = 5  # how often the short measurement is tried


class Race(NamedTuple):
    """What was measured of one shape and format."""

    shape: str
    format: str
    rows: list[dict[str, Any]]  # of the table: field, value, step rows, ms, over_default
    best: Choice
    best_over_default: dict[int, float]  # by rows of the step
    first_loads: list[Choice]  # what a first load takes, tried a few times
    first_over_best: list[dict[int, float]]


def kept_choices() -> list[str]:
    """A line for each choice that is kept for this processor, whatever library made it."""
    lines = []
    for path in sorted(build.cache_dir().glob("tuning-*.json")):
        try:
            kept = read_json_object(path)
            lines += [f"{path.name}: {entry}: {json.dumps(choice)}" for entry, choice in kept["choices"].items()]
        except (ValueError, KeyError, AttributeError):
            lines.append(f"{path.name}: unreadable; it is written anew at the next load")
    return lines


def run(threads: int, rounds: int, out: Path | None) -> None:
    """Measure, print, keep; out: the table as JSON."""
    races = []
    for shape in SHAPES:
        for weights in BYTES:
            races.append(race(shape, weights, threads, rounds))
            print(table(races[-1]), flush=True)
    if out:
        told = {
            "processor": build.processor(),
            "flags": sorted(build.cpu_features()),
            "threads": threads,
            "rounds": rounds,
            "command": f"python -m gpt_fast.ops.cpu --tune --threads {threads} --rounds {rounds} --out {out}",
            "races": [told_of(race) for race in races],
        }
        write_json(told, out)


def told_of(race: Race) -> dict[str, Any]:
    return race._asdict() | {"best": asdict(race.best), "first_loads": [asdict(first) for first in race.first_loads]}


@torch.inference_mode()
def race(shape: str, weights: str, threads: int, rounds: int) -> Race:
    """All variants of one field after the other, the best so far in the others; then the winners side by side."""
    decoder = CpuDecoder(random_layers(SHAPES[shape], weights), weights=weights, threads=threads, choice=DEFAULT)
    place = Place.of(decoder.library, decoder.described, threads)
    with Probe(decoder.library, decoder.pool.handle, decoder.described) as probe:
        firsts = [choose(probe.seconds) for _ in range(FIRST_LOADS)]
        best, rows = DEFAULT, []
        for axis in ALL_AXES:
            variants = {replace(best, **{axis.field: value}): value for value in axis.values}
            label = f"{shape} {weights} {axis.field}"
            times = take_turns(probe, dict.fromkeys([DEFAULT, best, *variants]), axis.rows, rounds, label)
            rows += [row(axis, value, times[choice], times[DEFAULT]) for choice, value in variants.items()]
            winner = max(variants, key=lambda choice: over(times[best], times[choice]))
            best = winner if over(times[best], times[winner]) > 1 / CLEARLY else best
        entrants = dict.fromkeys([DEFAULT, best, *firsts])
        last = {n: take_turns(probe, entrants, n, 3 * rounds, f"{shape} {weights}, {n} rows") for n in (1, ROWS)}
    best = max(entrants, key=lambda choice: math.prod(over(times[DEFAULT], times[choice]) for times in last.values()))
    place.write(best)
    return Race(
        shape,
        weights,
        rows,
        best,
        {n: over(times[DEFAULT], times[best]) for n, times in last.items()},
        firsts,
        [{n: over(times[best], times[first]) for n, times in last.items()} for first in firsts],
    )


def take_turns(
    probe: Probe, choices: Iterable[Choice], rows: int, rounds: int, label: str
) -> dict[Choice, list[float]]:
    """Seconds of each choice's steps, one a round, in changing order: a step also meets what the last one left."""
    times: dict[Choice, list[float]] = {choice: [] for choice in choices}
    order, rng = list(times), random.Random(0)
    for _ in tqdm(range(rounds), desc=label, leave=False, disable=None):
        rng.shuffle(order)
        for choice in order:
            times[choice].append(probe.seconds(choice, rows))
    return times


def random_layers(shape: dict[str, Any], weights: str) -> Transformer:
    """Layers enough that they do not stay in the caches, with a head of 32 rows."""
    layer = shape["dim"] * (3 * shape["intermediate_size"] + 2 * shape["dim"])
    layers = max(5, -(-TOTAL_BYTES // int(layer * BYTES[weights])))
    config = ModelConfig(vocab_size=32, n_layer=layers, max_position=64, **shape)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    model.setup_rope(64, torch.device("cpu"))
    return model


def over(base: list[float], times: list[float]) -> float:
    """How much faster than `base`, round by round: the median."""
    return statistics.median(a / b for a, b in zip(base, times, strict=True))


def row(axis: Axis, value: Any, times: list[float], default: list[float]) -> dict[str, Any]:
    return {
        "field": axis.field,
        "value": value,
        "rows": axis.rows,
        "ms": round(statistics.median(times) * 1e3, 3),
        "over_default": round(over(default, times), 3),
    }


def table(race: Race) -> str:
    lines = [f"\n{race.shape}, {race.format}", f"{'':12}{'':>12}{'rows':>6}{'ms':>9}{'over default':>14}"]
    for told in race.rows:
        value = told["value"]
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        lines.append(f"{told['field']:12}{shown:>12}{told['rows']:>6}{told['ms']:>9.3f}{told['over_default']:>14.3f}")
    lines.append(f"best: {race.best}; over the default {by_rows(race.best_over_default)}")
    for first, ratios in zip(race.first_loads, race.first_over_best, strict=True):
        lines.append(f"a first load: {first}; over the best {by_rows(ratios)}")
    return "\n".join(lines)


def by_rows(ratios: dict[int, float]) -> str:
    return ", ".join(f"{ratio:.3f} ({rows} row{'s' * (rows > 1)})" for rows, ratio in ratios.items())
