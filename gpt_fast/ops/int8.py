"""Linear layers with int8 weights: the plain op, which is the specification, and one fast op a device.

Shapes: M rows of activations, N output features, K input features, G groups of input features.

A weight is q_NK (int8) times a scale: scale_N, one a row ("per channel"), or scale_NG, one for each `groupsize`
consecutive inputs of a row; the last group is shorter where groupsize does not divide K.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Int8Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def expand_groups(value_NG: Tensor, columns: int, groupsize: int) -> Tensor:
    """Repeat each group's value over the group's inputs: [N, K]."""
    return value_NG.repeat_interleave(groupsize, dim=-1)[..., :columns]


def dequantize_int8(q_NK: Tensor, scale: Tensor, *, groupsize: int = 0) -> Tensor:
    """float32 [N, K]: q * scale. groupsize 0: scale_N is per row; otherwise scale_NG is per group."""
    if not groupsize:
        return q_NK.float() * scale.float()[..., None]
    return q_NK.float() * expand_groups(scale.float(), q_NK.shape[-1], groupsize)


def int8_linear(x: Tensor, q_NK: Tensor, scale: Tensor, *, groupsize: int = 0) -> Tensor:
    """x @ (q * scale)^T, the weight rounded once to x's dtype. The reference for every op below."""
    return F.linear(x, dequantize_int8(q_NK, scale, groupsize=groupsize).to(x.dtype))


def int8_linear_packed_cpu(x: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """torch's own per-channel kernel. scale_N has x's dtype.

    An output is off by no more than rounding a scale, a weight and a sum can make (tests/quantize/test_quantize.py).
    """
    return torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), q_NK, scale_N).view(*x.shape[:-1], -1)


def int8_linear_scaled(x: Tensor, q_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Convert, multiply, then scale the outputs: what torch.compile fuses into one kernel on a GPU (gpt-fast's op)."""
    return F.linear(x, q_NK.to(x.dtype)) * scale_N


def fast_int8_op(q_NK: Tensor, *, groupsize: int, dtype: torch.dtype) -> Int8Op | None:
    """The fast op for this weight and activations of `dtype` on its device; None where only the plain op fits."""
    if groupsize:
        return None
    if q_NK.device.type != "cpu":
        return int8_linear_scaled
    # The bfloat16 kernel reads 16 inputs at a time, past the end of the tensor where 16 does not divide K.
    fits = dtype in (torch.float32, torch.bfloat16, torch.float16) and q_NK.shape[1] % 16 == 0
    return int8_linear_packed_cpu if fits else None
