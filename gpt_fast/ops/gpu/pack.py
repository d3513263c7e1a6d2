"""Weights as the GPU kernels read them: one GpuLinear a matrix, from what checkpoints store.

Shapes: N output rows, K inputs, G groups of inputs, J = K/2 bytes, C = K/32 chunks.

bf16 (or float16, float32) and int8 stay as they are. An int4 row is cut into chunks of 32 inputs of 16 bytes each,
one load of one thread; byte j of a chunk holds input j in the low four bits and input 16 + j in the high ones, so
that masking a 32-bit word leaves four neighbouring inputs in four bytes, which is what a dp4a wants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.ops.int4 import dequantize_int4, pack_nibbles, regroup, unpack_nibbles
from gpt_fast.ops.int8 import dequantize_int8

CHUNK = 32  # inputs of an int4 chunk
FP8 = torch.float8_e4m3fn


class GpuLinear(NamedTuple):
    """A weight [n, k] for the kernels of gemv.py.

    kind "bf16": weight as it computes, any float dtype. "int8", "fp8": weight * scale_N (float32).
    "int8g": weight * scale_NG (float16), `group` inputs a group.
    "int4": q * scale_NG + zero_NG (float16), q in 0..15, `group` inputs a group; weight is uint8 [n, k/2].
    """

    kind: str
    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    n: int
    k: int
    group: int


def pack_linear(
    weight: Tensor, scale: Tensor | None = None, minimum: Tensor | None = None, *, groupsize: int = 0
) -> GpuLinear:
    """A stored weight for the kernels: floats [N, K], int8 [N, K] with scale_N or scale_NG, or our int4 (ops/int4.py).

    Exact. Raises ValueError for what no kernel reads: int8 rows or groups that 16 inputs do not fill, an int4 row that
    32-input groups do not fill.
    """
    if weight.dtype == torch.uint8 and scale is not None and minimum is not None:
        return pack_int4(weight, scale, minimum, groupsize=groupsize)
    rows, columns = weight.shape
    if scale is None:
        return GpuLinear("bf16", weight.contiguous(), None, None, rows, columns, 0)
    if columns % 16:
        raise ValueError(f"columns: the GPU's int8 kernels read 16 inputs at a time (got {columns})")
    if not groupsize:
        return GpuLinear("int8", weight.contiguous(), scale.float().contiguous(), None, rows, columns, 0)
    scale, even = regroup(scale, columns, groupsize)
    return GpuLinear("int8g", weight.contiguous(), scale, None, rows, columns, even)


def pack_int4(q_NJ: Tensor, scale_NG: Tensor, min_NG: Tensor, *, groupsize: int) -> GpuLinear:
    """Our checkpoint's int4 in chunks of 32 inputs; exact. ValueError where the groups do not divide into chunks."""
    rows, columns = len(q_NJ), 2 * q_NJ.shape[1]
    scale_NG, even = regroup(scale_NG, columns, groupsize)
    min_NG, _ = regroup(min_NG, columns, groupsize)
    if even % CHUNK:
        raise ValueError(f"columns: the GPU's int4 kernels need groups of 32 inputs (got {columns} in {groupsize}s)")
    q_NCHj = unpack_nibbles(q_NJ).view(rows, -1, 2, CHUNK // 2)
    weight_NJ = (q_NCHj[:, :, 0] | (q_NCHj[:, :, 1] << 4)).reshape(rows, -1)
    return GpuLinear("int4", weight_NJ.contiguous(), scale_NG, min_NG, rows, columns, even)


def pack_fp8(weight_NK: Tensor) -> GpuLinear:
    """Round to e4m3 with one scale a row, which takes the row's largest weight to the format's."""
    scale_N = weight_NK.float().abs().amax(1).clamp(min=1e-12) / torch.finfo(FP8).max
    weight = (weight_NK.float() / scale_N[:, None]).to(FP8)
    rows, columns = weight.shape
    return GpuLinear("fp8", weight, scale_N, None, rows, columns, 0)


def interleave(gate: GpuLinear, up: GpuLinear) -> GpuLinear:
    """Rows gate 0, up 0, gate 1, up 1, ...: a program then holds both halves of each SiLU product.

    ValueError where the two differ in kind or shape.
    """
    if gate[:1] + gate[4:] != up[:1] + up[4:]:
        raise ValueError(f"gate and up must be stored alike (got {gate[:1] + gate[4:]} and {up[:1] + up[4:]})")

    def rows(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.stack((a, b), dim=1).flatten(0, 1)

    weight = torch.stack((gate.weight, up.weight), dim=1).flatten(0, 1)
    return gate._replace(
        weight=weight, scale=rows(gate.scale, up.scale), zero=rows(gate.zero, up.zero), n=gate.n + up.n
    )


def unpack_int4(linear: GpuLinear) -> Tensor:
    """The checkpoint's bytes, uint8 [N, K/2], back from a packed int4 weight."""
    bytes_NCj = linear.weight.view(linear.n, -1, CHUNK // 2)
    return pack_nibbles(torch.stack((bytes_NCj & 0xF, bytes_NCj >> 4), dim=2).flatten(1))


def dequantize(linear: GpuLinear) -> Tensor:
    """float32 [N, K]: the weight that every kernel and twin computes with."""
    if linear.scale is None:
        return linear.weight.float()
    if linear.zero is None:
        return dequantize_int8(linear.weight, linear.scale, groupsize=linear.group)
    return dequantize_int4(unpack_int4(linear), linear.scale, linear.zero, groupsize=linear.group)
