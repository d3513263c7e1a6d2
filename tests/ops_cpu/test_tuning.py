"""The tuning to a processor: no choice changes a bit, the fastest is found, and what was found is kept."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.ops.cpu import CpuDecoder, build, tuning
from gpt_fast.ops.cpu.structs import load_library
from gpt_fast.ops.cpu.tuning import AXES, CLEARLY, DEFAULT, HINTS, Choice, Place, choose
from support.cpu_models import new_cache, random_tokens, run_chunks, small_model
from support.examples import examples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels"),
]

CHOICES = st.builds(
    Choice,
    one_row=st.tuples(st.sampled_from(list(HINTS)), st.sampled_from([0, 64, 4096, 1 << 20])),
    few_rows=st.tuples(st.sampled_from(list(HINTS)), st.sampled_from([0, 64, 4096, 1 << 20])),
    both_tiles=st.booleans(),
    row_block=st.integers(1, 9),
    chunks_each=st.integers(1, 40),
)


@pytest.fixture(autouse=True, scope="module")
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4", "int8_groups"])
def test_no_choice_changes_a_bit(weights: str) -> None:
    model = small_model()
    tokens = random_tokens(model, 60)
    usual = CpuDecoder(model, weights=weights, threads=2, choice=DEFAULT)
    sizes = [1, 4, 7, 13, 35]
    expected = run_chunks(usual.forward, tokens, new_cache(model), sizes)

    @examples(15)
    @given(choice=CHOICES)
    def check(choice: Choice) -> None:
        other = CpuDecoder(model, weights=weights, threads=2, choice=choice)
        assert torch.equal(run_chunks(other.forward, tokens, new_cache(model), sizes), expected)

    check()


class Clock:
    """A processor whose steps take what `cost` says, on a clock of its own."""

    def __init__(self, cost: Any) -> None:
        self.cost, self.time, self.steps = cost, 0.0, 0

    def seconds(self, choice: Choice, rows: int) -> float:
        taken = self.cost(choice, rows, self.steps)
        self.steps += 1
        self.time += taken
        return taken

    def now(self) -> float:
        return self.time


@pytest.mark.parametrize("place", range(20))
def test_the_fastest_of_every_axis_is_found(place: int) -> None:
    wanted = replace(DEFAULT, **{axis.field: axis.values[place % len(axis.values)] for axis in AXES})

    def cost(choice: Choice, rows: int, step: int) -> float:
        wrong = sum(getattr(choice, axis.field) != getattr(wanted, axis.field) for axis in AXES if axis.rows == rows)
        return 1e-3 * (1 + 0.2 * wrong)

    clock = Clock(cost)
    assert choose(clock.seconds, 0.3, clock.now) == wanted


def test_what_is_not_clearly_faster_changes_nothing() -> None:
    """Steps that differ by less than 1 - CLEARLY, in an order that repeats nowhere."""
    noise = itertools.cycle([0.0, 0.9, 0.3, 0.7, 0.1, 0.5, 0.8])
    clock = Clock(lambda choice, rows, step: 1e-3 * (1 - (1 - CLEARLY) * next(noise)))
    assert choose(clock.seconds, 0.3, clock.now) == DEFAULT


@pytest.mark.parametrize("step", [1e-4, 3e-3, 0.1])
def test_measuring_ends_in_time(step: float) -> None:
    """A slow machine gets the rounds that every axis needs and no more."""
    clock = Clock(lambda choice, rows, number: step)
    choose(clock.seconds, 0.3, clock.now)
    stages = [tuning.ROUNDS * len(axis.values) * step for axis in AXES]
    assert clock.time <= max(sum(stages), 0.3) + max(stages) + step


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache directory with the library and nothing else."""
    shutil.copy(load_library()._name, tmp_path)
    monkeypatch.setenv("GPT_FAST_CACHE", str(tmp_path))
    return tmp_path


def large_model() -> torch.nn.Module:
    """Just enough weights to be measured: 8 layers of 4.4 MB."""
    return small_model(n_layer=8, dim=512, n_head=8, n_kv_head=8, intermediate_size=2200)


def test_a_choice_is_measured_once_and_kept(cache: Path) -> None:
    model = large_model()
    first = CpuDecoder(model, weights="int8", threads=2)
    again = CpuDecoder(model, weights="int8", threads=2)
    assert (first.tuned.how, again.tuned.how) == ("measured", "kept")
    assert first.tuned.choice == again.tuned.choice
    (kept,) = cache.glob("tuning-*.json")
    assert list(json.loads(kept.read_text())["choices"]) == ["2 threads, format 0, width 512"]
    other = CpuDecoder(model, weights="bfloat16", threads=2)
    assert other.tuned.how == "measured" and len(json.loads(kept.read_text())["choices"]) == 2


DAMAGES = (
    "",
    "{",
    "[]",
    '{"library": "another", "choices": {"ENTRY": {}}}',
    '{"library": "LIBRARY", "choices": {"ENTRY": {"one_row": 3}}}',
    '{"library": "LIBRARY", "choices": {"ENTRY": {"one_row": ["L1", 1], "few_rows": ["L1", 1], "chunks_each": 0}}}',
    '{"library": "LIBRARY", "choices": {"ENTRY": {"one_row": ["L9", 1], "few_rows": ["L1", 1]}}}',
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_written_anew(cache: Path, damage: str) -> None:
    place = Place(cache / "tuning-x.json", "LIBRARY", "ENTRY")
    place.path.write_text(damage)
    assert place.read() is None
    choice = replace(DEFAULT, one_row=("L1", 1024))
    place.write(choice)
    assert place.read() == choice


def test_without_a_place_to_keep_it_a_choice_is_still_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(values: object, path: Path) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(tuning, "write_json", refuse)
    assert CpuDecoder(large_model(), weights="int8", threads=2).tuned.how == "measured"
    assert not list(cache.glob("tuning-*"))


def test_a_small_model_is_not_measured(cache: Path) -> None:
    assert CpuDecoder(small_model(), weights="int8", threads=2).tuned == (DEFAULT, "default")
    assert not list(cache.glob("tuning-*"))


def test_the_command_names_the_processor_and_what_is_kept(cache: Path) -> None:
    Place(cache / "tuning-x.json", "LIBRARY", "2 threads, format 2, width 576").write(DEFAULT)
    (cache / "tuning-y.json").write_text("{")
    done = subprocess.run([sys.executable, "-m", "gpt_fast.ops.cpu"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert build.processor() in done.stdout and "2 threads, format 2, width 576: " in done.stdout
    assert "tuning-y.json: unreadable" in done.stdout
