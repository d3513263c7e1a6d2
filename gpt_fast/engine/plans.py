"""What rank 0 tells the other ranks to do next, as int64 numbers: no pickle, nothing to decide.

A message is a few numbers of head and the batch's tensors behind them. It goes through gloo, on GPUs too, among the
ranks of one machine as among machines; or, where those of one machine share memory, through that.

Shapes: B rows, S tokens of a row.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch

INLINE = 128  # numbers that go in one message: all of a decode of 29 rows; what is longer takes a second one
HEAD = 10  # numbers before the tensors


class Op(IntEnum):
    END = 0  # rank 0 has done its work
    FORWARD = 1  # forward, cache, B, S, length, flags; the batch's tensors
    START = 2  # the same, begun without waiting
    CLEAR = 3  # cache, slot
    REMOVE_NAN = 4  # cache, slot, length
    COPY_PREFIX = 5  # cache, source, target, length
    ANOTHER = 6  # cache: one more like it, with the next number


class Flags(NamedTuple):
    """Of a step: which tensors there are, and how to begin it (model.forward.Startable)."""

    slots: bool
    select: bool
    after: bool
    best_only: bool


class Plan(NamedTuple):
    op: Op
    numbers: list[int]
    tensors: Tensor  # [N], the batch's, one behind the other


class Channel(Protocol):
    """One way, rank 0 to all others, in order. A rank that waits uses no processor. Messages are int64 [n]."""

    def send(self, message: Tensor) -> None:
        """Rank 0: returns when it is on its way."""

    def receive(self) -> Tensor:
        """The others: the next message, however long it takes."""


class Broadcast:
    """A Channel through a process group on the CPU: INLINE numbers at first, then what is left."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def send(self, message: Tensor) -> None:
        padded = torch.zeros(max(INLINE, 1 + len(message)), dtype=torch.int64)
        padded[0], padded[1 : 1 + len(message)] = len(message), message
        self._pass(padded[:INLINE])
        if len(padded) > INLINE:
            self._pass(padded[INLINE:])

    def receive(self) -> Tensor:
        first = self._pass(torch.empty(INLINE, dtype=torch.int64))
        count = int(first[0])
        if 1 + count > INLINE:
            first = torch.cat((first, self._pass(torch.empty(1 + count - INLINE, dtype=torch.int64))))
        return first[1 : 1 + count]

    def _pass(self, message: Tensor) -> Tensor:
        dist.broadcast(message, src=0, group=self.group)
        return message


class Plans:
    """What rank 0 tells, through one channel at a time: that of `group`, unless there is a better one."""

    def __init__(self, group: ProcessGroup) -> None:
        self.everywhere: Channel = Broadcast(group)
        self.channel: Channel = self.everywhere
        self.awaited = False  # whether the others follow, i.e. wait for the next message

    def through(self, channel: Channel | None) -> None:
        """From now on; all ranks alike, while none waits. None: as at first."""
        self.channel = channel or self.everywhere

    def tell(self, op: Op, *numbers: int, tensors: tuple[Tensor, ...] = ()) -> None:
        """Rank 0: returns when it is on its way. tensors: int64, on any one device."""
        head = torch.tensor([op, *numbers, *[0] * (HEAD - 1 - len(numbers))])
        self.channel.send(torch.cat([head, *(tensor.flatten().cpu() for tensor in tensors)]))

    def end(self) -> None:
        """Rank 0: let the others go on, if they follow."""
        if self.awaited:
            self.tell(Op.END)
        self.awaited = False

    def hear(self) -> Plan:
        """The others: the next message."""
        message = self.channel.receive()
        op, *numbers = message[:HEAD].tolist()
        return Plan(Op(op), numbers, message[HEAD:])

    def tell_step(
        self, op: Op, forward: int, cache: int, batch: Batch, *, after: bool = False, best_only: bool = False
    ) -> None:
        """Rank 0: run a batch by the forward and on the cache of these numbers."""
        slots_B, select_B = batch.slots_B, batch.select_B
        flags = Flags(slots=slots_B is not None, select=select_B is not None, after=after, best_only=best_only)
        tensors = tuple(t for t in (batch.tokens_BS, batch.positions_BS, slots_B, select_B) if t is not None)
        self.tell(op, forward, cache, *batch.tokens_BS.shape, batch.length, *flags, tensors=tensors)


def read_step(plan: Plan, caches: list[KVCache]) -> tuple[int, Batch, Flags]:
    """(which forward, its batch on this rank's cache, flags) of a FORWARD or START."""
    forward, number, B, S, length, *flags = plan.numbers
    given = Flags(*map(bool, flags))
    cache = caches[number]
    sizes = [B * S, B * S, B * given.slots, B * given.select]
    tokens, positions, slots, select = plan.tensors.to(cache.k_LNHTD.device).split(sizes)
    batch = Batch(
        tokens.view(B, S),
        positions.view(B, S),
        cache,
        length,
        slots if given.slots else None,
        select if given.select else None,
    )
    return forward, batch, given
