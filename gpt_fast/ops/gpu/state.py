"""What a decode keeps on the device from step to step, and how a step leaves it for the next.

Shapes: B rows, E end-of-sequence ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.ops.gpu.decoder import Inputs
from gpt_fast.ops.gpu.launch import Launch, power_of_two
from gpt_fast.request import NO_TOKEN

ENDED = -2  # in the output: the row had ended before this step


class Row(NamedTuple):
    """One sequence to go on with: `token` stands at `position` and is not computed yet.

    limit: prompt and answer together, in tokens. eos: whether end-of-sequence ids end it. seed and position decide
    the draws, as in gpt_fast.sampling.
    """

    slot: int
    token: int
    position: int
    limit: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    eos: bool = True

    @property
    def room(self) -> int:
        """Tokens until the limit."""
        return self.limit - self.position - 1


class State(NamedTuple):
    """What a step reads and leaves for the next. A row that has ended stands at `scratch`, where it harms nobody."""

    inputs: Inputs
    limit_B: Tensor  # int64
    eos_B: Tensor  # bool
    temperature_B: Tensor  # float32
    top_k_B: Tensor  # int64
    top_p_B: Tensor  # float32
    seed_B: Tensor  # int64

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> State:
        types = (torch.int64, torch.bool, torch.float32, torch.int64, torch.float32, torch.int64)
        return cls(Inputs.empty(rows, device), *(torch.zeros(rows, dtype=t, device=device) for t in types))

    def load(self, rows: Sequence[Row], scratch: int) -> None:
        """Put rows in place; those that are missing have ended."""
        ended = Row(slot=0, token=0, position=scratch, limit=0)
        filled = [*rows, *[ended] * (len(self.limit_B) - len(rows))]
        lengths = [1 if row.position == scratch else row.position + 1 for row in filled]
        columns = {
            self.inputs.tokens_M: [row.token for row in filled],
            self.inputs.positions_M: [row.position for row in filled],
            self.inputs.slots_M: [row.slot for row in filled],
            self.inputs.lengths_M: lengths,
            self.limit_B: [row.limit for row in filled],
            self.eos_B: [row.eos for row in filled],
            self.temperature_B: [row.temperature for row in filled],
            self.top_k_B: [row.top_k for row in filled],
            self.top_p_B: [row.top_p for row in filled],
            self.seed_B: [row.seed for row in filled],
        }
        for tensor, values in columns.items():
            host = torch.tensor(values, dtype=tensor.dtype)
            tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)


def advance(sampled_B: Tensor, state: State, eos_E: Tensor, out_B: Tensor, *, scratch: int) -> None:
    """Note what was sampled in out_B (ENDED for a row that had ended), and set every row to its next token.

    A row ends with an end-of-sequence id it heeds, at its limit, or with NO_TOKEN; it then stands at `scratch`.
    """
    if sampled_B.is_cuda:
        advance_launch(sampled_B, state, eos_E, out_B, scratch=scratch).run()
    else:
        advance_reference(sampled_B, state, eos_E, out_B, scratch=scratch)


def advance_launch(sampled_B: Tensor, state: State, eos_E: Tensor, out_B: Tensor, *, scratch: int) -> Launch:
    from gpt_fast.ops.gpu.state_triton import advance_kernel

    tokens_B, positions_B, _, lengths_B = state.inputs
    arguments = {
        "sampled": sampled_B,
        "tokens": tokens_B,
        "positions": positions_B,
        "lengths": lengths_B,
        "limit": state.limit_B,
        "heeds_eos": state.eos_B,
        "eos": eos_E,
        "out": out_B,
        "scratch": scratch,
        "rows": len(sampled_B),
        "eos_count": len(eos_E),
    }
    constants = {"BLOCK": power_of_two(len(sampled_B)), "NO_TOKEN": NO_TOKEN, "ENDED": ENDED}
    return Launch(advance_kernel, (1,), arguments, constants, num_warps=1)


def advance_reference(sampled_B: Tensor, state: State, eos_E: Tensor, out_B: Tensor, *, scratch: int) -> None:
    """The twin of the kernel."""
    tokens_B, positions_B, _, lengths_B = state.inputs
    live_B = positions_B != scratch
    hit_B = (sampled_B[:, None] == eos_E).any(1) & state.eos_B
    ended_B = hit_B | (sampled_B == NO_TOKEN) | (positions_B + 2 >= state.limit_B)
    goes_on_B = live_B & ~ended_B
    out_B.copy_(torch.where(live_B, sampled_B, ENDED))
    tokens_B.copy_(torch.where(goes_on_B, sampled_B, 0))
    positions_B.copy_(torch.where(goes_on_B, positions_B + 1, scratch))
    lengths_B.copy_(torch.where(goes_on_B, positions_B + 1, 1))  # of the new positions
