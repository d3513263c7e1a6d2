"""From a model's modules to packed matrices: which format each gets, and its codes.

Shapes: N outputs, K inputs, G groups of inputs. Modules are nn.Linear or gpt_fast.quantize's; of the latter only
`quantized_weight()`, `scheme` and `bias` are used (ops know nothing of the layers above).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpt_fast.ops import rounding
from gpt_fast.ops.cpu import pack
from gpt_fast.ops.cpu.pack import Packed
from gpt_fast.ops.int4 import unpack_nibbles


class Packer:
    """Which format each of a model's matrices gets: a quantized module keeps its codes, a float one gets `weights`."""

    def __init__(self, weights: str, group: int) -> None:
        self.weights, self.group = weights, group

    def body(self, linear: Any) -> Packed:
        return self.pack(Codes.of(linear, self.weights, self.group), linear.bias)

    def head(self, head: Any) -> Packed:
        """A float head keeps 8 bits beside 4-bit layers, as in GGUF files: its errors go straight to the logits."""
        weights = "int8_groups" if self.weights == "int4" else self.weights
        return self.pack(Codes.of(getattr(head, "embedding", head), weights, self.group), None)

    def gate_up(self, feed_forward: Any) -> Packed:
        """Sixteen rows of w1 and sixteen of w3 in turn, both padded to whole groups of 32 hidden values."""
        w1, w3 = feed_forward.w1, feed_forward.w3
        gate, up = (Codes.of(linear, self.weights, self.group) for linear in (w1, w3))
        bias = None if w1.bias is None else interleave_tiles(w1.bias.detach(), w3.bias.detach())
        return self.pack(gate.interleave(up), bias)

    def pack(self, codes: Codes, bias_N: Tensor | None) -> Packed:
        bias_N = None if bias_N is None else bias_N.detach()
        if codes.format == pack.BF16:
            return pack.pack_bf16(codes.weight_NK, bias_N)
        assert codes.scale is not None
        if codes.format == pack.INT8_ROW:
            return pack.pack_int8_rows(codes.weight_NK, codes.scale, bias_N)
        if codes.format == pack.INT8_GROUP:
            return pack.pack_int8_groups(codes.weight_NK, codes.scale, bias_N)
        assert codes.minimum_NG is not None
        return pack.pack_int4(codes.weight_NK, codes.scale, codes.minimum_NG, bias_N, group=codes.group)


@dataclass(frozen=True)
class Codes:
    """A matrix before packing: its format, codes (or bfloat16 weights), and what its format adds to them."""

    format: int
    weight_NK: Tensor
    scale: Tensor | None = None  # [N], or [N, G]
    minimum_NG: Tensor | None = None
    group: int = pack.GROUP

    @classmethod
    def of(cls, module: Any, weights: str, group: int) -> Codes:
        """Of a gpt_fast.quantize module, or of a float linear to be stored as `weights`."""
        if hasattr(module, "quantized_weight"):
            return cls.of_quantized(module)
        w_NK = module.weight.detach()
        if weights == "bfloat16":
            return cls(pack.BF16, w_NK.to(torch.bfloat16))
        if weights == "int8":
            return cls(pack.INT8_ROW, *rounding.int8_rows(w_NK.float()))
        if weights == "int8_groups":
            return cls(pack.INT8_GROUP, *rounding.int8_groups(w_NK.float(), pack.GROUP))
        return cls(pack.INT4, *rounding.int4_groups(w_NK.float(), group), group=group)

    @classmethod
    def of_quantized(cls, module: Any) -> Codes:
        weight, scale, minimum_NG = module.quantized_weight()
        bits, group = module.scheme.bits, module.scheme.groupsize
        if bits == 4:
            return cls(pack.INT4, unpack_nibbles(weight), scale, minimum_NG, group)
        if group == 0:
            return cls(pack.INT8_ROW, weight, scale)
        return cls(pack.INT8_GROUP, weight, pack.repeat_groups(scale, group, weight.shape[1]))

    def interleave(self, other: Codes) -> Codes:
        """Tiles of 16 rows of this matrix and of another of the same format in turn."""
        if (self.format, self.group) != (other.format, other.group):
            raise ValueError("feed_forward: w1 and w3 must be stored alike")
        return Codes(
            self.format,
            interleave_tiles(self.weight_NK, other.weight_NK),
            None if self.scale is None or other.scale is None else interleave_tiles(self.scale, other.scale),
            None
            if self.minimum_NG is None or other.minimum_NG is None
            else interleave_tiles(self.minimum_NG, other.minimum_NG),
            self.group,
        )


def interleave_tiles(a: Tensor, b: Tensor) -> Tensor:
    """Tiles of 16 rows of `a` and `b` in turn, after padding both with zeros to a multiple of 32 rows."""
    rows = [nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, pack.padding(len(x), pack.GROUP))) for x in (a, b)]
    return torch.stack([x.unflatten(0, (-1, pack.TILE)) for x in rows], 1).flatten(0, 2)
