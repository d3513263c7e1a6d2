"""Linear layers with int4 weights: the plain op, which is the specification, and torch's packed op a device.

Shapes: M rows of activations, N output features, K input features (even), G groups of input features, J = K/2 bytes.

A weight is q * scale + min with q in 0..15, and scale_NG, min_NG (float16) shared by `groupsize` consecutive inputs
of a row; the last group is shorter where groupsize does not divide K. Two weights share a byte: input 2j in the low
four bits, 2j+1 in the high ones. This is the layout on disk; the fast ops re-pack it at load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast.ops.int8 import expand_groups

GROUPSIZES = (32, 64, 128, 256)


class PackedInt4(NamedTuple):
    """A weight laid out for one device's kernel: run(x, weight, scale_and_zero, groupsize)."""

    run: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    weight: Tensor
    scale_and_zero_GN2: Tensor
    groupsize: int


def pack_nibbles(q_NK: Tensor) -> Tensor:
    """uint8 [N, K] of 0..15 to uint8 [N, K/2]. K must be even."""
    return q_NK[..., 0::2] | (q_NK[..., 1::2] << 4)


def unpack_nibbles(q_NJ: Tensor) -> Tensor:
    """The inverse of pack_nibbles: uint8 [N, K]."""
    return torch.stack((q_NJ & 0xF, q_NJ >> 4), dim=-1).flatten(-2)


def dequantize_int4(q_NJ: Tensor, scale_NG: Tensor, min_NG: Tensor, *, groupsize: int) -> Tensor:
    """float32 [N, K]: q * scale + min."""
    q_NK = unpack_nibbles(q_NJ).float()
    scale_NK = expand_groups(scale_NG.float(), q_NK.shape[-1], groupsize)
    return q_NK * scale_NK + expand_groups(min_NG.float(), q_NK.shape[-1], groupsize)


def int4_linear(x: Tensor, q_NJ: Tensor, scale_NG: Tensor, min_NG: Tensor, *, groupsize: int) -> Tensor:
    """x @ (q * scale + min)^T, the weight rounded once to x's dtype. The reference for the packed ops."""
    return F.linear(x, dequantize_int4(q_NJ, scale_NG, min_NG, groupsize=groupsize).to(x.dtype))


def regroup(value_NG: Tensor, columns: int, groupsize: int) -> tuple[Tensor, int]:
    """The same scales (or mins) with a groupsize that divides `columns`: the largest that also divides the old one.

    Exact: 576 inputs in groups of 128 (the last of 64) become nine groups of 64.
    """
    even = math.gcd(columns, groupsize)
    return expand_groups(value_NG, columns, groupsize)[:, ::even].contiguous(), even


def pack_int4(
    q_NJ: Tensor, scale_NG: Tensor, min_NG: Tensor, *, groupsize: int, dtype: torch.dtype
) -> PackedInt4 | None:
    """Lay the weight out for its device's kernel, for activations of `dtype`; None where only the plain op fits.

    The kernels keep scale and zero in the activations' dtype; an output is off by no more than that rounding, a
    weight's and a sum's can make (tests/quantize/test_quantize.py has the bound).
    """
    columns = 2 * q_NJ.shape[1]
    scale_NG, even = regroup(scale_NG.float(), columns, groupsize)
    min_NG, _ = regroup(min_NG.float(), columns, groupsize)
    if even not in GROUPSIZES:
        return None
    # Both kernels compute (q - 8) * scale + zero.
    scale_and_zero_GN2 = torch.stack((scale_NG, min_NG + 8 * scale_NG), dim=-1).transpose(0, 1).contiguous().to(dtype)
    if q_NJ.device.type == "cpu" and len(q_NJ) % 16 == 0:
        weight = torch._convert_weight_to_int4pack_for_cpu(unpack_nibbles(q_NJ).int(), 1)
        return PackedInt4(int4_linear_packed_cpu, weight, scale_and_zero_GN2, even)
    tiles = 8 if columns % 128 == 0 else 4 if columns % 64 == 0 else 2
    if q_NJ.device.type == "cuda" and dtype == torch.bfloat16 and len(q_NJ) % 8 == 0 and columns % (16 * tiles) == 0:
        high_first_NJ = (q_NJ << 4) | (q_NJ >> 4)  # the CUDA packer wants input 2j in the high four bits
        weight = torch._convert_weight_to_int4pack(high_first_NJ, tiles)
        return PackedInt4(int4_linear_packed_cuda, weight, scale_and_zero_GN2, even)
    return None


def int4_linear_packed_cpu(x: Tensor, weight: Tensor, scale_and_zero_GN2: Tensor, groupsize: int) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1])
    return torch._weight_int4pack_mm_for_cpu(x_MK, weight, groupsize, scale_and_zero_GN2).view(*x.shape[:-1], -1)


def int4_linear_packed_cuda(x: Tensor, weight: Tensor, scale_and_zero_GN2: Tensor, groupsize: int) -> Tensor:
    """tinygemm, as in gpt-fast; bfloat16 activations only."""
    x_MK = x.reshape(-1, x.shape[-1])
    return torch._weight_int4pack_mm(x_MK, weight, groupsize, scale_and_zero_GN2).view(*x.shape[:-1], -1)
