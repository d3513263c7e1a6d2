"""Round to nearest (gpt_fast.ops.rounding): a float weight to a scheme's stored tensors, without calibration.

Shapes: N output features, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.ops.int4 import dequantize_int4, pack_nibbles
from gpt_fast.ops.int8 import dequantize_int8
from gpt_fast.ops.rounding import int4_groups, int8_groups, int8_rows
from gpt_fast.quantize.scheme import QuantizationError, Scheme

ELEMENTS_AT_ONCE = 1 << 20  # rounded together: 4 MiB in float32, however large the tensor


def quantize_weight(weight_NK: Tensor, scheme: Scheme, *, name: str, first_row: int = 0) -> dict[str, Tensor]:
    """The stored tensors of `weight_NK`; `name` and `first_row` (of a band of a larger weight) are for errors.

    Errors are at most scale/2 an element (plus float16's rounding of scale and min where groups are used).
    QuantizationError: a NaN, an infinity, a value that float16 scales cannot reach, an odd K for int4.
    """
    weight_NK = weight_NK.float()
    check_finite(weight_NK, name=name, first_row=first_row)
    if scheme.bits == 4 or scheme.groupsize:
        check_float16_range(weight_NK, name=name, first_row=first_row)
    if scheme.bits == 4:
        return quantize_int4(weight_NK, groupsize=scheme.groupsize, name=name)
    return quantize_int8(weight_NK, groupsize=scheme.groupsize)


def quantize_in_bands(weight_NK: Tensor, scheme: Scheme, *, device: torch.device, name: str) -> dict[str, Tensor]:
    """quantize_weight on `device`, with temporaries for ELEMENTS_AT_ONCE elements only; the result is on the CPU."""
    rows, columns = weight_NK.shape
    parts = {part: torch.empty(shape, dtype=dtype) for part, (dtype, shape) in scheme.tensors(rows, columns).items()}
    band = max(1, ELEMENTS_AT_ONCE // columns)
    for first in range(0, rows, band):
        chunk = quantize_weight(weight_NK[first : first + band].to(device), scheme, name=name, first_row=first)
        for part, tensor in chunk.items():
            parts[part][first : first + band] = tensor.cpu()
    return parts


def dequantize_weight(tensors: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """float32 [N, K] of what quantize_weight stored."""
    if scheme.bits == 4:
        return dequantize_int4(tensors["weight"], tensors["scale"], tensors["min"], groupsize=scheme.groupsize)
    return dequantize_int8(tensors["weight"], tensors["scale"], groupsize=scheme.groupsize)


def quantize_int8(weight_NK: Tensor, *, groupsize: int) -> dict[str, Tensor]:
    q_NK, scale = int8_groups(weight_NK, groupsize) if groupsize else int8_rows(weight_NK)
    return {"weight": q_NK, "scale": scale}


def quantize_int4(weight_NK: Tensor, *, groupsize: int, name: str) -> dict[str, Tensor]:
    if weight_NK.shape[1] % 2:
        raise QuantizationError(f"{name}: int4 needs an even number of inputs (got {weight_NK.shape[1]})")
    q_NK, scale_NG, min_NG = int4_groups(weight_NK, groupsize)
    return {"weight": pack_nibbles(q_NK), "scale": scale_NG, "min": min_NG}


def check_finite(weight_NK: Tensor, *, name: str, first_row: int = 0) -> None:
    refuse_rows(~weight_NK.isfinite().all(-1), f"{name}: row %d holds NaN or infinity", first_row)


def check_float16_range(weight_NK: Tensor, *, name: str, first_row: int = 0) -> None:
    """float16 scales and mins reach no further."""
    limit = torch.finfo(torch.float16).max
    problem = f"{name}: row %d holds weights beyond float16's range (allowed -{limit:.0f}..{limit:.0f})"
    refuse_rows(weight_NK.abs().amax(-1) > limit, problem, first_row)


def refuse_rows(bad_N: Tensor, problem: str, first_row: int) -> None:
    if bad_N.any():
        raise QuantizationError(problem % (first_row + int(bad_N.nonzero()[0])))


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise, 10 log10(|w|^2 / |w - w'|^2); inf where they are equal."""
    noise = (reference.double() - quantized.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))
