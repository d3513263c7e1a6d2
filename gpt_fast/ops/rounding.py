"""Round to nearest: the codes and scales of a float matrix, for checkpoints and for kernels that pack one at load.

Shapes: N output features, K input features, G groups of input features, E groupsize. The last group of a row is
shorter where E does not divide K. Weights are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast.ops.int8 import expand_groups

TINY = torch.finfo(torch.float32).tiny


def int8_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale a row: codes -127..127 [N, K] and float32 scales [N].

    A scale is never below the smallest normal number, so that a row of zeros has codes of zero, and one of denormals
    is off by at most scale / 2.
    """
    scale_N = (weight_NK.abs().amax(-1) / 127).clamp(min=TINY)
    return (weight_NK / scale_N[:, None]).round().clamp(-127, 127).to(torch.int8), scale_N


def int8_groups(weight_NK: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a float16 scale a group (32: GGUF's Q8_0): codes -127..127 [N, K] and scales [N, G].

    Codes are zero where the scale is, which is where float16 has no number that small.
    """
    scale_NG = (split_groups(weight_NK.abs(), groupsize, pad=0.0).amax(-1) / 127).half()
    divisor_NK = expand_groups(scale_NG.float(), weight_NK.shape[1], groupsize)
    codes_NK = torch.where(divisor_NK > 0, weight_NK / divisor_NK, 0)
    return codes_NK.round().clamp(-127, 127).to(torch.int8), scale_NG


def int4_groups(weight_NK: Tensor, groupsize: int) -> tuple[Tensor, Tensor, Tensor]:
    """w ~ scale * code + min (32: GGUF's Q4_1): codes 0..15 as uint8 [N, K], float16 scales and mins [N, G].

    Codes are zero where a group has one value only.
    """
    scale_NG, min_NG = int4_grid(weight_NK, groupsize)
    scale_NK, min_NK = (expand_groups(t.float(), weight_NK.shape[1], groupsize) for t in (scale_NG, min_NG))
    return nearest_int4(weight_NK, scale_NK, min_NK).to(torch.uint8), scale_NG, min_NG


def int4_grid(weight_NK: Tensor, groupsize: int) -> tuple[Tensor, Tensor]:
    """scale_NG and min_NG (float16) that span each group from its least to its largest weight.

    The scale is taken from the rounded min, so a group that already is q * scale + min comes back exactly.
    """
    low_NG = split_groups(weight_NK, groupsize, pad=torch.inf).amin(-1)
    high_NG = split_groups(weight_NK, groupsize, pad=-torch.inf).amax(-1)
    min_NG = low_NG.half()
    scale_NG = ((high_NG - min_NG.float()).clamp(min=0) / 15).half()
    return scale_NG, min_NG


def nearest_int4(weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest of 0..15, as float; 0 where the scale is 0. All arguments of one shape."""
    return torch.where(scale > 0, (weight - minimum) / scale, 0).round().clamp(0, 15)


def split_groups(weight_NK: Tensor, groupsize: int, *, pad: float) -> Tensor:
    """[N, G, E], the last group filled up with `pad`."""
    missing = -weight_NK.shape[1] % groupsize
    weight_NGE: Tensor = F.pad(weight_NK, (0, missing), value=pad).unflatten(-1, (-1, groupsize))
    return weight_NGE
