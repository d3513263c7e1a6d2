"""The CPU decoder's plain PyTorch twin: the same model with the same codes and the same rounding of activations.

Shapes: N outputs, K inputs, G groups of 32 inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_fast.ops import rounding
from gpt_fast.ops.cpu import pack
from gpt_fast.ops.int8 import dequantize_int8, expand_groups

if TYPE_CHECKING:
    from gpt_fast.model.transformer import Transformer


def round_activations(x: Tensor, weights: str) -> Tensor:
    """What the kernels see of x: bfloat16, or int8 with scale max|x| / 127 per 32 inputs."""
    if weights == "bfloat16":
        return x.to(torch.bfloat16).float()
    K = x.shape[-1]
    x_Gg = F.pad(x, (0, pack.padding(K, pack.GROUP))).unflatten(-1, (-1, pack.GROUP))
    largest = x_Gg.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127).div(largest)  # 127 / largest would multiply by a reciprocal
    codes = (x_Gg * torch.where(largest > 0, inverse, 0)).round()
    x_BSK: Tensor = (codes * (largest / 127)).flatten(-2)
    return x_BSK[..., :K]


def round_weight(w_NK: Tensor, weights: str, group: int) -> Tensor:
    """The float matrix that a format's codes stand for."""
    if weights == "bfloat16":
        return w_NK.to(torch.bfloat16).float()
    if weights == "int8":
        return dequantize_int8(*rounding.int8_rows(w_NK))
    if weights == "int8_groups":
        return dequantize_int8(*rounding.int8_groups(w_NK, pack.GROUP), groupsize=pack.GROUP)
    codes_NK, *grid = rounding.int4_groups(w_NK, group)
    scale_NK, min_NK = (expand_groups(t.float(), w_NK.shape[1], group) for t in grid)
    return codes_NK * scale_NK + min_NK


class TwinLinear(nn.Module):
    """nn.Linear with rounded weights and activations."""

    def __init__(self, linear: nn.Linear, weights: str, group: int) -> None:
        super().__init__()
        self.weights, self.bias = weights, linear.bias
        self.weight_NK = round_weight(linear.weight.detach().float(), weights, group)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_activations(x, self.weights), self.weight_NK, self.bias)


def modules_with_linears(model: Any) -> Iterator[nn.Module]:
    for layer in model.layers:
        yield from (layer.attention, layer.feed_forward)


def twin(model: Transformer, *, weights: str, group: int = 32) -> Transformer:
    """A copy of a float32 `model` that computes what CpuDecoder(model, weights=weights) does."""
    result = copy.deepcopy(model)
    for parent in modules_with_linears(result):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, TwinLinear(child, weights, group))
    result.output = TwinLinear(model.output, "int8_groups" if weights == "int4" else weights, group)  # type: ignore[assignment]
    return result
