"""What a forward is: its arguments, its face, and a step that is begun without waiting for it.

Shapes: B rows, S tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from gpt_fast.model.cache import KVCache


@dataclass(frozen=True, eq=False)
class Batch:
    """S tokens of each of B rows, to run against their slots' caches, which gain the tokens' keys and values.

    tokens_BS, positions_BS: int64. A padding token has position `cache.scratch`.
    length: cached positions to read; every real position must be below it (a bucket, so that shapes repeat).
    slots_B: each row's slot; None means rows are slots 0..B-1 (no copy of the cache on the plain path).
    select_B: index along S of the one token of each row whose logits are wanted; None wants all.
    """

    tokens_BS: Tensor
    positions_BS: Tensor
    cache: KVCache
    length: int
    slots_B: Tensor | None = None
    select_B: Tensor | None = None

    def rows(self, part: slice) -> Batch:
        """Some of the rows."""
        slots_B = torch.arange(len(self.tokens_BS), device=self.tokens_BS.device)
        return replace(
            self,
            tokens_BS=self.tokens_BS[part],
            positions_BS=self.positions_BS[part],
            slots_B=(slots_B if self.slots_B is None else self.slots_B)[part],
            select_B=None if self.select_B is None else self.select_B[part],
        )


class Forward(Protocol):
    """A model's forward: Transformer itself, compiled, or a fused twin."""

    def __call__(self, batch: Batch, /) -> Tensor:
        """float32 logits: [B, S, V] or, with select_B, [B, V]."""


class PendingStep(Protocol):
    """A forward under way. On ranks it ends whether or not anyone asks for its result, for the others wait for it."""

    def result(self) -> Tensor:
        """The logits, once they are there."""

    def best(self) -> Tensor:
        """The argmax of each row's logits, NO_TOKEN where none is finite: int64, shaped as the logits but for V."""

    @property
    def latest(self) -> bool:
        """Whether no other step has begun since, so that one may follow it."""


class Startable(Forward, Protocol):
    """A Forward that can also be begun without waiting for it."""

    def start(self, batch: Batch, *, after: PendingStep | None = None, best_only: bool = False) -> PendingStep:
        """Begin a forward.

        Args:
            after: the step begun last, of one token a row, whose best tokens are fed in place of the batch's, without
                anyone having looked at them.
            best_only: nobody looks at the logits, so that there need be none.
        """
