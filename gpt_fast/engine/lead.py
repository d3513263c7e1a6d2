"""One brain: rank 0 schedules, samples and speaks; each forward that it begins, the other ranks compute with it.

Rank 0's runner has forwards and a cache that tell the other ranks first (`Leader`). Those hold their own shares of
both, under the same numbers, and do as they are told (`follow`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gpt_fast.engine.plans import Op, Plans, read_step
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch, Forward, PendingStep, Startable


class Leader:
    """Rank 0's side, until plans.end(). Forwards and caches get their numbers in the order in which they come."""

    def __init__(self, plans: Plans) -> None:
        self.plans = plans
        plans.awaited = True
        self.forwards = self.caches = 0

    def forward(self, own: Forward) -> LeadingForward:
        self.forwards += 1
        return LeadingForward(own, self.plans, self.forwards - 1)

    def cache(self, own: KVCache) -> LeadingCache:
        self.caches += 1
        return LeadingCache(own, self, self.caches - 1)


class LeadingForward:
    """A forward of all ranks; `own` is rank 0's share. Startable where that is."""

    def __init__(self, own: Forward, plans: Plans, number: int) -> None:
        self.own, self.plans, self.number = own, plans, number

    def __call__(self, batch: Batch) -> Tensor:
        self._tell(Op.FORWARD, batch)
        return self.own(batch)

    def start(self, batch: Batch, *, after: PendingStep | None = None, best_only: bool = False) -> PendingStep:
        self._tell(Op.START, batch, after=after is not None, best_only=best_only)
        return cast(Startable, self.own).start(batch, after=after, best_only=best_only)

    def _tell(self, op: Op, batch: Batch, **options: Any) -> None:
        assert isinstance(batch.cache, LeadingCache)  # any other is rank 0's alone
        self.plans.tell_step(op, self.number, batch.cache.number, batch, **options)


class LeadingCache(KVCache):
    """Rank 0's share of a cache; what is done to it, is done to the other ranks' shares too."""

    def __init__(self, own: KVCache, leader: Leader, number: int) -> None:
        torch.nn.Module.__init__(self)
        vars(self).update(vars(own))  # the same buffers
        self.leader, self.number = leader, number

    def clear(self, slot: int) -> None:
        self.leader.plans.tell(Op.CLEAR, self.number, slot)
        super().clear(slot)

    def remove_nan(self, slot: int, length: int) -> None:
        self.leader.plans.tell(Op.REMOVE_NAN, self.number, slot, length)
        super().remove_nan(slot, length)

    def copy_prefix(self, *, source: int, target: int, length: int) -> None:
        self.leader.plans.tell(Op.COPY_PREFIX, self.number, source, target, length)
        super().copy_prefix(source=source, target=target, length=length)

    def another(self) -> KVCache:
        self.leader.plans.tell(Op.ANOTHER, self.number)
        return self.leader.cache(super().another())


@torch.inference_mode()
def follow(plans: Plans, forwards: Sequence[Forward], caches: list[KVCache]) -> None:
    """Do what rank 0 does, on this rank's shares, until it ends. What comes out is rank 0's to look at."""
    last: PendingStep | None = None
    while (plan := plans.hear()).op is not Op.END:
        number, *numbers = plan.numbers
        match plan.op:
            case Op.FORWARD:
                index, batch, _ = read_step(plan, caches)
                forwards[index](batch)
            case Op.START:
                index, batch, flags = read_step(plan, caches)
                after = last if flags.after else None
                last = cast(Startable, forwards[index]).start(batch, after=after, best_only=flags.best_only)
            case Op.ANOTHER:
                caches.append(caches[number].another())
            case _:
                if last is not None:
                    last.result()  # it writes to the cache
                change(caches[number], plan.op, numbers)


def change(cache: KVCache, op: Op, numbers: list[int]) -> None:
    match op:
        case Op.CLEAR:
            cache.clear(numbers[0])
        case Op.REMOVE_NAN:
            cache.remove_nan(numbers[0], numbers[1])
        case Op.COPY_PREFIX:
            cache.copy_prefix(source=numbers[0], target=numbers[1], length=numbers[2])
