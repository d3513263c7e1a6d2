"""The kernel of state.py: one program, a lane a row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def advance_kernel(
    sampled, tokens, positions, lengths, limit, heeds_eos, eos, out, scratch, rows, eos_count,
    BLOCK: tl.constexpr, NO_TOKEN: tl.constexpr, ENDED: tl.constexpr,
):  # fmt: skip
    row_B = tl.arange(0, BLOCK)
    real_B = row_B < rows
    token_B = tl.load(sampled + row_B, mask=real_B, other=NO_TOKEN)
    position_B = tl.load(positions + row_B, mask=real_B, other=0)
    limit_B = tl.load(limit + row_B, mask=real_B, other=0)
    heeds_B = tl.load(heeds_eos + row_B, mask=real_B, other=0) != 0
    ended_B = (token_B == NO_TOKEN) | (position_B + 2 >= limit_B)
    for index in range(eos_count):
        ended_B = ended_B | (heeds_B & (token_B == tl.load(eos + index)))
    live_B = position_B != scratch
    goes_on_B = live_B & (ended_B == 0)
    tl.store(out + row_B, tl.where(live_B, token_B, ENDED), mask=real_B)
    tl.store(tokens + row_B, tl.where(goes_on_B, token_B, 0), mask=real_B)
    tl.store(positions + row_B, tl.where(goes_on_B, position_B + 1, scratch), mask=real_B)
    tl.store(lengths + row_B, tl.where(goes_on_B, position_B + 2, 1), mask=real_B)
