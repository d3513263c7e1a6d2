"""Cuts a decode into segments, with the CPU load of others beside each."""

from __future__ import annotations

import time
from collections.abc import Callable
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
        self.segments: list[Segment] = []
        self.gaps: list[float] = []
        self.tokens = 0
        self.ttft = self.started = 0.0

    def start(self) -> None:
        self.readings.append(self.meter.read())
        self.started = time.perf_counter()

    def first_token(self) -> None:
        self.ttft = time.perf_counter() - self.started
        self.readings.append(self.meter.read())

    def step(self, seconds: float, tokens: int) -> None:
        """One forward took `seconds` and made `tokens` tokens."""
        self.gaps.append(seconds)
        self.tokens += tokens
        if len(self.gaps) == self.segment_steps:
            self._cut()

    def sample(self, case: Case) -> Sample:
        """What was recorded. A last piece shorter than a segment counts only when there is no other."""
        if self.gaps and not self.segments:
            self._cut()
        ttft_foreign, *shares = foreign_shares(self.readings)
        segments = [
            Segment(segment.tokens, segment.steps, segment.seconds, share, segment.gaps)
            for segment, share in zip(self.segments, shares, strict=True)
        ]
        return Sample(case, self.ttft, tuple(segments), ttft_foreign)

    def _cut(self) -> None:
        self.segments.append(Segment(self.tokens, len(self.gaps), sum(self.gaps), None, tuple(self.gaps)))
        self.readings.append(self.meter.read())
        self.gaps, self.tokens = [], 0


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
