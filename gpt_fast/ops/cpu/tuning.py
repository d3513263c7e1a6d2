"""Tuning: what the fastest way through memory depends on, chosen on the processor at hand by measuring its decode.

A prefetch hint that is best on one processor makes decode several times slower on another, and no list of processors is
ever complete. So the first decoder of a format and width on a machine times a few variants over its own layers, for
about SECONDS, and keeps what it found beside the compiled library. Results are the same bits whatever is chosen.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import byref
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt_fast.files import read_json_object, write_json
from gpt_fast.ops.cpu import build, pack
from gpt_fast.ops.cpu.structs import Fetch, LayerWeights, Linear, ModelWeights, StepInput, Tuning

HINTS = {"none": 0, "L1": 1, "L2": 2, "once": 3}  # src/tuning.h's Hint
SECONDS = 0.25
PIECE_BYTES = 8 << 20  # of weights in a step that is timed: little, so that many are timed
MOST_PIECES = 32  # that take turns, so that a piece's weights have left the caches when it comes again
LEAST_BYTES = 32 << 20  # a model with less decodes from the caches, where there is nothing to choose
ROWS = 4  # of a probe's step that stands for a few rows
ROUNDS = 5  # before the slower half of the variants leaves: a median of five stands two hiccups
CLEARLY = 0.97  # what takes more than this part of the default's time does not replace it


@dataclass(frozen=True)
class Choice:
    """One setting of everything; the fields are src/tuning.h's. A fetch is (hint of HINTS, bytes ahead)."""

    one_row: tuple[str, int] = ("once", 4096)
    few_rows: tuple[str, int] = ("once", 4096)
    both_tiles: bool = False
    row_block: int = 8
    chunks_each: int = 8

    def __post_init__(self) -> None:
        """A kept file may hold anything: the kernels divide by these."""
        if min(self.row_block, self.chunks_each) < 1:
            raise ValueError("row_block, chunks_each: must be at least 1")

    def struct(self) -> Tuning:
        fetches = (Fetch(HINTS[hint], distance) for hint, distance in (self.one_row, self.few_rows))
        return Tuning(*fetches, self.both_tiles, self.row_block, self.chunks_each)

    def __str__(self) -> str:
        one, few = (" ".join(map(str, fetch)).removesuffix(" 0") for fetch in (self.one_row, self.few_rows))
        order = "pairs" if self.both_tiles else "tiles"
        return f"prefetch {one} / {few}, {order}, {self.row_block} rows a block, {self.chunks_each} chunks a thread"


DEFAULT = Choice()


class Axis(NamedTuple):
    """One field of Choice, the values that are tried, and the rows of the step that tells them apart."""

    field: str
    values: Sequence[Any]
    rows: int


# What was best, or close to it, of something on some processor. tuning_report.py tries more, and the other fields,
# whose values made no clear difference where they were measured.
FETCHES = (("once", 4096), ("once", 1024), ("L1", 4096), ("L2", 4096), ("L2", 8192), ("L2", 16384), ("none", 0))
AXES = (
    Axis("one_row", FETCHES, 1),
    Axis("both_tiles", (False, True), 1),
    Axis("few_rows", FETCHES, ROWS),
)


class Probe:
    """Times steps of a few of a model's layers under any Choice; pieces of the model take turns, as in a decode.

    No logits but those of the head's first 32 rows.
    """

    def __init__(self, library: ctypes.CDLL, pool: int, weights: ModelWeights) -> None:
        self.library = library
        each = max(1, PIECE_BYTES // layer_bytes(weights))
        self.pieces = [piece(weights, at, each) for at in range(0, weights.n_layer - each + 1, each)][:MOST_PIECES]
        self.decoders = [library.gf_decoder_create(byref(part), pool, None) for part in self.pieces]
        self.steps = [0] * len(self.pieces)
        shape = (each, ROWS, weights.n_kv_head, 64, weights.head_dim)
        self.inputs = {rows: step_input(rows, shape) for rows in (1, ROWS)}
        for rows in self.inputs:
            for _ in self.pieces:
                self.seconds(DEFAULT, rows)

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        for decoder in self.decoders:
            self.library.gf_decoder_destroy(decoder)

    def seconds(self, choice: Choice, rows: int) -> float:
        """The time of a step of `rows` rows through the piece whose turn it is."""
        # One further after each time around, so that variants that take turns too do not always meet the same piece.
        turn, count = sum(self.steps), len(self.pieces)
        at = (turn + turn // count) % count
        self.steps[at] += 1
        self.library.gf_decoder_set_tuning(self.decoders[at], byref(choice.struct()))
        began = time.perf_counter()
        self.library.gf_decoder_start(self.decoders[at], byref(self.inputs[rows]))
        self.library.gf_decoder_finish(self.decoders[at], self.steps[at])
        return time.perf_counter() - began


def piece(weights: ModelWeights, first: int, count: int) -> ModelWeights:
    """A description of `count` layers from `first` on, and of 32 rows of the head.

    Of a layer that is much larger than PIECE_BYTES, less of its hidden values: their matrices then mean nothing, but
    take their time.
    """
    part = ModelWeights.from_buffer_copy(weights)
    part.n_layer, part.vocab = count, min(32, weights.vocab)
    part.head.rows = part.vocab
    part.layers = (LayerWeights * count)(*weights.layers[first : first + count])
    size = layer_bytes(weights)
    if size > 2 * PIECE_BYTES:
        part.ffn_dim = max(1, weights.ffn_dim * PIECE_BYTES // size // 32) * 32
        part.layers[0].gate_up.rows, part.layers[0].down.cols = 2 * part.ffn_dim, part.ffn_dim
    return part


def step_input(rows: int, shape: tuple[int, ...]) -> StepInput:
    """A step of `rows` rows at position 30, over a cache of its own."""
    cache = torch.zeros(2, *shape, dtype=torch.bfloat16)
    tokens, positions, best = torch.zeros(rows, 1).long(), torch.full((rows, 1), 30), torch.zeros(rows).long()
    held = (cache, tokens, positions, best)
    address = [t.data_ptr() for t in (tokens, positions)]
    k, v = (half.data_ptr() for half in cache)
    step = StepInput(rows, 1, 31, shape[3], ROWS, 1, *address, None, None, k, v, None, None, None, best.data_ptr())
    step.held = held
    return step


Timer = Callable[[Choice, int], float]  # seconds of one step of so many rows


def choose(timer: Timer, seconds: float = SECONDS, now: Callable[[], float] = time.perf_counter) -> Choice:
    """The fastest choice, one axis after the other, in about `seconds`.

    All values of an axis take turns; after every few rounds the slower half leaves. What is not clearly faster than the
    default does not replace it, so that noise alone changes nothing.
    """
    began, choice = now(), DEFAULT
    weights = [len(axis.values) for axis in AXES]
    for i, axis in enumerate(AXES):
        until = began + seconds * sum(weights[: i + 1]) / sum(weights)
        variants = [replace(choice, **{axis.field: value}) for value in axis.values]
        choice = fastest(timer, variants, axis.rows, choice, until, now)
    return choice


def fastest(
    timer: Timer, variants: Sequence[Choice], rows: int, usual: Choice, until: float, now: Callable[[], float]
) -> Choice:
    """The variant that usually takes the least; `usual`, which is always in the race, where none is clearly faster.

    Medians, not best times: with some hints a step is fast now and then and slow mostly.
    """
    times: dict[Choice, list[float]] = {variant: [] for variant in (*variants, usual)}

    def usually(variant: Choice) -> float:
        return statistics.median(times[variant])

    left, order = list(times), random.Random(0)  # a step also meets what the last one left: not always the same
    while True:
        for _ in range(ROUNDS):
            for variant in order.sample(left, len(left)):
                times[variant].append(timer(variant, rows))
        if now() >= until:
            break
        left = sorted(left, key=usually)[: max(2, (len(left) + 1) // 2)]
        left += [usual] if usual not in left else []
    best = min(left, key=usually)
    return best if usually(best) < CLEARLY * usually(usual) else usual


# ---- what was found is kept


class Place(NamedTuple):
    """Where a choice is kept: a file a processor, an entry a library, format, width and number of threads."""

    path: Path
    library: str
    entry: str

    @classmethod
    def of(cls, library: ctypes.CDLL, weights: ModelWeights, threads: int) -> Place:
        name = "".join(c if c.isalnum() else "-" for c in build.processor()).strip("-")
        path = build.cache_dir() / f"tuning-{name}.json"
        return cls(
            path,
            Path(library._name).stem,
            f"{threads} threads, format {weights.layers[0].qkv.format}, width {weights.dim}",
        )

    def entries(self) -> dict[str, Any]:
        """The entries of this library; none where there is no readable file, or one of another library."""
        try:
            kept = read_json_object(self.path)
            return dict(kept["choices"]) if kept["library"] == self.library else {}
        except (ValueError, KeyError, TypeError):
            return {}

    def read(self) -> Choice | None:
        try:
            told = self.entries()[self.entry]
            choice = Choice(**told | {name: tuple(told[name]) for name in ("one_row", "few_rows")})
            choice.struct()
            return choice
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, choice: Choice) -> None:
        """Keep it; a cache that cannot be written only means that the next start measures again."""
        choices = self.entries() | {self.entry: asdict(choice)}
        with suppress(OSError):
            write_json({"library": self.library, "choices": choices}, self.path)


class Tuned(NamedTuple):
    choice: Choice
    how: str  # "default", "kept" or "measured"

    def __str__(self) -> str:
        return f"{self.choice} ({self.how})"


def tune(library: ctypes.CDLL, pool: int, threads: int, weights: ModelWeights) -> Tuned:
    """The choice kept for this machine and a model of this kind; measured now if there is none."""
    if weights.n_layer * layer_bytes(weights) < LEAST_BYTES:
        return Tuned(DEFAULT, "default")
    place = Place.of(library, weights, threads)
    if kept := place.read():
        return Tuned(kept, "kept")
    with Probe(library, pool, weights) as probe:
        choice = choose(probe.seconds)
    place.write(choice)
    return Tuned(choice, "measured")


def layer_bytes(weights: ModelWeights) -> int:
    """Bytes of the first layer's codes."""
    layer = weights.layers[0]
    return sum(linear_bytes(linear) for linear in (layer.qkv, layer.out, layer.gate_up, layer.down))


def linear_bytes(linear: Linear) -> int:
    bits = {pack.BF16: 16, pack.INT4: 4}.get(linear.format, 8)
    return int(linear.rows * linear.cols * bits // 8)
