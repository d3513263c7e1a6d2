"""GreedyChain: greedy steps one after another, each fed the last one's best tokens without the host looking at them.

Shapes: B rows, S tokens of a row's first step, K steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch, PendingStep, Startable


class GreedyChain:
    """Decodes counts[i] greedy tokens for row i, back to back, without a word to the host.

    Row i first prefills tokens[i] at positions starts[i] and on; counts[i] == 0 skips the row. Two steps are under way
    at a time: one runs, and one waits for its tokens.
    """

    def __init__(
        self,
        model: Startable,
        cache: KVCache,
        *,
        tokens: list[list[int]],
        starts: list[int],
        slots: list[int],
        counts: list[int],
    ) -> None:
        rows = [row if count else [] for row, count in zip(tokens, counts, strict=True)]
        size, scratch = max(map(len, rows)), cache.scratch
        ends = [at + len(row) for row, at in zip(rows, starts, strict=True)]
        positions = [
            [*range(end - len(row), end), *[scratch] * (size - len(row))] for row, end in zip(rows, ends, strict=True)
        ]
        later = [
            [[end + i] if i + 1 < count else [scratch] for end, count in zip(ends, counts, strict=True)]
            for i in range(max(counts) - 1)
        ]
        self.model, self.cache, self.slots_B = model, cache, torch.tensor(slots)
        self.first_B = torch.zeros(len(rows), dtype=torch.int64)
        self.rest_KB1 = torch.tensor(later) if later else ()
        tokens_BS = torch.tensor([[*row, *[0] * (size - len(row))] for row in rows])
        last_B = torch.tensor([max(len(row) - 1, 0) for row in rows])
        self.steps = [self._begin(tokens_BS, torch.tensor(positions), last_B, None)]
        self._follow()

    def tokens(self) -> Tensor:
        """[B, K], NO_TOKEN where no logit was finite, anything where a row has fewer."""
        while len(self.steps) <= len(self.rest_KB1):
            self.steps[-2].result()  # its place is free for the next one to wait in
            self._follow()
        return torch.stack([step.best() for step in self.steps], 1)

    def _follow(self) -> None:
        """Begin the next step, if there is one, behind the one that runs."""
        done = len(self.steps) - 1
        if done < len(self.rest_KB1):
            tokens_B1 = self.first_B[:, None]  # of the right shape, and not looked at
            self.steps.append(self._begin(tokens_B1, self.rest_KB1[done], self.first_B, self.steps[-1]))

    def _begin(self, tokens_BS: Tensor, positions_BS: Tensor, last_B: Tensor, after: PendingStep | None) -> PendingStep:
        batch = Batch(tokens_BS, positions_BS, self.cache, self.cache.max_seq_len, self.slots_B, last_B)
        return self.model.start(batch, after=after, best_only=True)
