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

OUTLIERS = 32  # inputs for which the copy's error is kept
MAX_ROWS = 8  # of a step: with more, arithmetic costs more than the bytes that a screen saves
MIN_SHARE = 1 / 8  # of a step's bytes: a head that is less is read whole, because the screen takes memory too


def is_worth_it(head: Linear, step_bytes: int) -> bool:
    """Whether a head has more to read than its screen, and enough of a step's bytes to be worth the memory."""
    return head.format != pack.INT4 and code_bytes(head) >= MIN_SHARE * step_bytes


def code_bytes(head: Linear) -> int:
    """Of a head of 8 or 16 bits, without its scales."""
    return int(head.rows * head.cols * (2 if head.format == pack.BF16 else 1))


def build_screen(
    library: ctypes.CDLL, head: Linear, energy_K: Tensor, *, arena: Arena, threads: int
) -> tuple[Screen, list[Tensor]]:
    """The screen of a packed head, and the tensors it points to. energy_K: of its inputs; the largest are outliers."""
    rows, groups = -(-head.rows // pack.PAIR) * pack.PAIR, -(-head.cols // pack.GROUP)
    tiles, count = rows // pack.TILE, min(OUTLIERS, head.cols)
    q = arena.take(rows * groups * pack.GROUP // 2)
    scale = arena.take(rows * (4 + groups))  # a float a row, then a byte a group
    outlier_error = arena.take(rows * count)
    error_scale, error_norm = torch.empty(2, rows)
    weight_norm = torch.empty(tiles)
    outliers = energy_K.topk(count).indices.int()
    weights = Linear(
        format=pack.LEVELS,
        rows=head.rows,
        cols=head.cols,
        group=pack.GROUP,
        q=q.data_ptr(),
        scale=scale.data_ptr(),
        bias=None,
    )
    arrays = (outliers, outlier_error, error_scale, error_norm, weight_norm)
    kept = [q, scale, *arrays]
    empty = Screen(weights, *(t.data_ptr() for t in arrays), count, MAX_ROWS, 0.0)

    def build(first: int) -> Screen:
        part = Screen.from_buffer_copy(empty)
        library.gf_screen_build(
            byref(head), byref(part), q.data_ptr(), scale.data_ptr(), first, min(each, tiles - first)
        )
        return part

    each = -(-tiles // (4 * threads))
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases Python's lock for the call
        parts = list(pool.map(build, range(0, tiles, each)))
    whole = parts[0]
    whole.outlier_rounding = max(part.outlier_rounding for part in parts)
    return whole, kept
