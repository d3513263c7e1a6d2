"""Screen: a 4-bit copy of a head that tells which of its rows can hold the largest logit (src/screen.h says how)."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref

import torch
from torch import Tensor

from gpt_fast.ops.cpu import pack
from gpt_fast.ops.cpu.pack import Arena
from gpt_fast.ops.cpu.structs import Linear, Screen

FOCUS = 32  # inputs whose error is kept
MOST_ROWS = 8  # of more, arithmetic costs more than the bytes that it saves
WORTH = 1 / 8  # of a step's bytes: a head that is less is read whole, for the screen takes memory too


def is_worth_it(head: Linear, step_bytes: int) -> bool:
    """Whether a head has more to read than its screen, and enough of a step's bytes to be worth the memory."""
    return head.format != pack.INT4 and code_bytes(head) >= WORTH * step_bytes


def code_bytes(head: Linear) -> int:
    """Of a head of 8 or 16 bits, without its scales."""
    return int(head.rows * head.cols * (2 if head.format == pack.BF16 else 1))


def build_screen(
    library: ctypes.CDLL, head: Linear, energy_K: Tensor, *, arena: Arena, threads: int
) -> tuple[Screen, list[Tensor]]:
    """The screen of a packed head, and the tensors it points to. energy_K: of its inputs, which decides the focus."""
    rows, groups = -(-head.rows // pack.PAIR) * pack.PAIR, -(-head.cols // pack.GROUP)
    tiles, focused = rows // pack.TILE, min(FOCUS, head.cols)
    q = arena.take(rows * groups * pack.GROUP // 2)
    scale = arena.take(rows * (4 + groups))  # a float a row, then a byte a group
    left = arena.take(rows * focused)
    unit, radius = torch.empty(2, rows)
    norm = torch.empty(tiles)
    focus = energy_K.topk(focused).indices.int()
    weights = Linear(format=pack.LEVELS, rows=head.rows, cols=head.cols, group=pack.GROUP,
                     q=q.data_ptr(), scale=scale.data_ptr(), bias=None)  # fmt: skip
    kept = [q, scale, left, unit, radius, norm, focus]
    empty = Screen(weights, *(t.data_ptr() for t in (focus, left, unit, radius, norm)), focused, MOST_ROWS, 0.0)

    def build(first: int) -> Screen:
        part = Screen.from_buffer_copy(empty)
        library.gf_screen_build(byref(head), byref(part), first, min(each, tiles - first))
        return part

    each = -(-tiles // (4 * threads))
    with ThreadPoolExecutor(threads) as pool:  # the foreign call lets go of the interpreter
        parts = list(pool.map(build, range(0, tiles, each)))
    whole = parts[0]
    whole.left_error = max(part.left_error for part in parts)
    return whole, kept
