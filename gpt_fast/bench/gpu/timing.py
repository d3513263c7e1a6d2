"""Seconds of something that runs on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from gpt_fast.ops.gpu.capture import Captured


class Timing(NamedTuple):
    """Median, least and most seconds of one run."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def by(self, count: int) -> Timing:
        """Of one of `count` equal parts."""
        return Timing(*(seconds / count for seconds in self))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], device: torch.device, *, repeat: int, inner: int = 1) -> Timing:
    """Of one of `inner` runs in a row, idle device to idle device, over `repeat` tries after a discarded one."""
    seconds = []
    for _ in range(repeat + 1):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(inner):
            run()
        synchronize(device)
        seconds.append((time.perf_counter() - started) / inner)
    return Timing.of(seconds[1:])


def timed_graph(run: Callable[[], object], device: torch.device, *, repeat: int, inner: int) -> Timing:
    """Of one of `inner` runs in one CUDA graph: what the device takes, without the host."""
    graph = Captured(lambda: [run() for _ in range(inner)] and None, device)
    return timed(graph.replay, device, repeat=repeat).by(inner)
