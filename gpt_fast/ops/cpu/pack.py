"""Weights in the order the C++ kernels read them.

Shapes: N output rows, K inputs, G = K / group groups, T = N / 16 tiles (N is padded to whole pairs of tiles, K to 32).
A tile's 64-byte vector holds 4 consecutive inputs (2 in bfloat16) of each of its 16 rows; pairs of tiles take turns
every 32 inputs; see src/linear.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast.model import huge_pages

TILE = 16
PAIR = 2 * TILE
GROUP = 32
INT4_GROUPS = (32, 64, 128, 256)
SIGN_BITS = -0x7F7F7F80  # of a word's four bytes: flipped, int8 is uint8 with 128 added
INT8_ROW, INT8_GROUP, INT4, BF16, LEVELS = range(5)  # src/linear.h's Format


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One matrix: `q` int32 and `scale` as src/linear.h's Linear wants them; `bias` float32 padded to tiles, or None.

    Until they are `stored`, q and scale may be views of another order of memory: it changes in that one copy.
    """

    format: int
    rows: int
    cols: int
    group: int
    q: Tensor
    scale: Tensor | None
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def stored(self, arena: Arena) -> Packed:
        """With q and scale in the arena, as the kernels read them."""
        return replace(self, q=arena.put(self.q), scale=None if self.scale is None else arena.put(self.scale))


def pack_int8_rows(q_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None) -> Packed:
    """int8 codes with a scale a row."""
    scale = F.pad(scale_N.float(), (0, padding(len(scale_N), PAIR)))
    return packed(INT8_ROW, q_NK.shape, GROUP, interleave_int8(q_NK), scale, bias_N)


def pack_int8_groups(q_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None = None) -> Packed:
    """int8 codes with a scale per 32 inputs; scales are kept in half precision."""
    return packed(INT8_GROUP, q_NK.shape, GROUP, interleave_int8(q_NK), interleave_scales(scale_NG), bias_N)


def pack_int4(
    q_NK: Tensor, scale_NG: Tensor, minimum_NG: Tensor, bias_N: Tensor | None = None, *, group: int
) -> Packed:
    """uint8 codes 0..15 with w = scale * code + minimum; scales and minima are kept in half precision.

    group: 32, 64, 128 or 256 inputs; the last group of a row may be shorter.
    """
    if group not in INT4_GROUPS or scale_NG.shape[1] != -(-q_NK.shape[1] // group):
        raise ValueError(
            f"int4: group must be one of {INT4_GROUPS} and give one scale a group "
            f"(got {group} for {q_NK.shape[1]} inputs with {scale_NG.shape[1]} scales a row)"
        )
    words = words_of(q_NK)
    codes = words[:, ::2] | words[:, 1::2] << 4  # of eight inputs, 0-3 low and 4-7 high
    scale = torch.stack((interleave_scales(scale_NG), interleave_scales(minimum_NG)), 3)
    return packed(INT4, q_NK.shape, group, take_turns(codes, GROUP // 8), scale, bias_N)


def pack_bf16(w_NK: Tensor, bias_N: Tensor | None = None) -> Packed:
    """bfloat16 weights."""
    words = words_of(w_NK.to(torch.bfloat16))
    return packed(BF16, w_NK.shape, GROUP, take_turns(words, GROUP // 2), None, bias_N)


def packed(kind: int, shape: torch.Size, group: int, q: Tensor, scale: Tensor | None, bias_N: Tensor | None) -> Packed:
    bias = None if bias_N is None else F.pad(bias_N.float(), (0, padding(len(bias_N), PAIR)))
    return Packed(format=kind, rows=shape[0], cols=shape[1], group=group, q=q, scale=scale, bias=bias)


def interleave_int8(q_NK: Tensor) -> Tensor:
    """Codes + 128, the unsigned side of the dot-product instruction, as the kernels read them."""
    return take_turns(words_of(q_NK) ^ SIGN_BITS, GROUP // 4)


def interleave_scales(scale_NG: Tensor) -> Tensor:
    """[T/2, G, 2, 16] half-precision."""
    rows = F.pad(scale_NG.half(), (0, 0, 0, padding(len(scale_NG), PAIR)))
    return rows.view(-1, 2, TILE, rows.shape[1]).permute(0, 3, 1, 2)


def words_of(w_NK: Tensor) -> Tensor:
    """int32 [N, W]: the bytes of neighbouring inputs, four at a time, padded to whole tiles."""
    return pad_tiles(w_NK).view(torch.int32)


def take_turns(words_NW: Tensor, words: int) -> Tensor:
    """[T/2, G, 2, words, 16]: a view of rows of words as the kernels read them, with `words` words in 32 inputs."""
    return words_NW.view(-1, 2, TILE, words_NW.shape[1] // words, words).permute(0, 3, 1, 4, 2)


def pad_tiles(w_NK: Tensor) -> Tensor:
    columns, rows = padding(w_NK.shape[1], GROUP), padding(w_NK.shape[0], PAIR)
    return F.pad(w_NK, (0, columns, 0, rows)) if columns or rows else w_NK.contiguous()


def padding(size: int, multiple: int) -> int:
    return -size % multiple


def repeat_groups(scale_NG: Tensor, group: int, K: int) -> Tensor:
    """Scales of groups of `group` inputs (a multiple of 32) as scales of groups of 32."""
    return scale_NG.repeat_interleave(group // GROUP, 1)[:, : -(-K // GROUP)]


class Arena:
    """Tensors one after another in the order of use, in memory the system may back with huge pages."""

    BLOCK = 64 << 20

    def __init__(self) -> None:
        self.block = torch.empty(0, dtype=torch.uint8)
        self.used = 0

    def take(self, nbytes: int) -> Tensor:
        """Room for so many bytes, starting at a cache line: uint8."""
        if self.used + nbytes > len(self.block):
            self.block = huge_pages.empty(max(nbytes, self.BLOCK))
            self.used = 0
        place = self.block[self.used : self.used + nbytes]
        self.used += nbytes + padding(nbytes, 64)
        return place

    def put(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor`."""
        place = self.take(tensor.numel() * tensor.element_size())
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
