"""Cuts a decode into segments, with the CPU load of others beside each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from gpt_fast.bench.sample import Case, Sample, Segment
from gpt_fast.measure.machine import CpuMeter, Reading, foreign_shares

SEGMENT_STEPS = 25
State = TypeVar("State")


class Recorder:
    """Times one run: start(), first_token(), then step() for every forward of the decode, sample() at the end.

    CPU readings are taken between segments, outside of what is timed.
    """

    def __init__(self, meter: CpuMeter, *, segment_steps: int = SEGMENT_STEPS) -> None:
        self.meter = meter
        self.segment_steps = segment_steps
        self.readings: list[Reading] = []
        self.steps: list[tuple[float, int]] = []
        self.ttft = self.started = 0.0

    def start(self) -> None:
        self.readings.append(self.meter.read())
        self.started = time.perf_counter()

    def first_token(self) -> None:
        self.ttft = time.perf_counter() - self.started
        self.readings.append(self.meter.read())

    def step(self, seconds: float, tokens: int) -> None:
        """One forward took `seconds` and made `tokens` tokens."""
        self.steps.append((seconds, tokens))
        if len(self.steps) % self.segment_steps == 0:
            self.readings.append(self.meter.read())

    def sample(self, case: Case) -> Sample:
        """What was recorded."""
        if 0 < len(self.steps) < self.segment_steps:
            self.readings.append(self.meter.read())
        return sample_of(case, self.ttft, self.steps, self.readings, segment_steps=self.segment_steps)


def sample_of(
    case: Case,
    ttft: float,
    steps: Sequence[tuple[float, int]],
    readings: Sequence[Reading],
    *,
    segment_steps: int = SEGMENT_STEPS,
) -> Sample:
    """A run cut into segments. A last piece shorter than a segment counts only when there is no other.

    Args:
        steps: (seconds, tokens) of each forward of the decode.
        readings: before the prompt, at the first token, then one after each segment.
    """
    ttft_foreign, *shares = foreign_shares(readings)
    segments = []
    for index, share in enumerate(shares):
        piece = steps[index * segment_steps : (index + 1) * segment_steps]
        gaps = tuple(seconds for seconds, _ in piece)
        segments.append(Segment(sum(tokens for _, tokens in piece), len(piece), sum(gaps), share, gaps))
    return Sample(case, ttft, tuple(segments), ttft_foreign)


def record(case: Case, prefill: Callable[[], State], step: Callable[[State], State]) -> Sample:
    """Time a decoder of the plain kind: prefill() gives what step() is fed, and each step a token a row."""
    recorder = Recorder(CpuMeter())
    recorder.start()
    state = prefill()
    recorder.first_token()
    for _ in range(case.new_tokens - 1):
        started = time.perf_counter()
        state = step(state)
        recorder.step(time.perf_counter() - started, case.rows)
    return recorder.sample(case)
