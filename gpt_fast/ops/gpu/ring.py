"""Results on their way from the device to the host, without a wait on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

UNWRITTEN = -3  # the device has not been here; no token and no mark of state.py

Wait = Callable[[], object]


def start_copy(target: Tensor, source: Tensor) -> Wait:
    """Begin to copy; the function that waits until it has ended."""
    target.copy_(source, non_blocking=True)
    if not source.is_cuda:
        return lambda: None
    event = torch.cuda.Event(blocking=True)  # the waiting thread sleeps: its core belongs to the service
    event.record()
    return event.synchronize


class Ring:
    """Results on their way from the device to the host: `depth` buffers in pinned memory, first in, first out.

    A buffer is read only after its copy has ended, and written only after it was read: RuntimeError otherwise.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        *,
        pinned: bool,
        depth: int = 3,
        copy: Callable[[Tensor, Tensor], Wait] = start_copy,
    ) -> None:
        self.free = deque(torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(depth))
        self.busy: deque[tuple[Tensor, Wait]] = deque()
        self.copy = copy

    @property
    def pending(self) -> int:
        return len(self.busy)

    def publish(self, source: Tensor) -> None:
        """Begin to bring `source` over; the device may change it in its next kernel."""
        if not self.free:
            raise RuntimeError("ring: every buffer waits to be read")
        target = self.free.popleft().fill_(UNWRITTEN)
        self.busy.append((target, self.copy(target, source)))

    def wait(self) -> None:
        """Until the oldest result is here."""
        self.busy[0][1]()

    def take(self) -> list[list[int]]:
        """The oldest result."""
        self.wait()
        target, _ = self.busy.popleft()
        values = target.tolist()
        self.free.append(target)
        if any(UNWRITTEN in row for row in values):
            raise RuntimeError("ring: read before it was written")
        return values
