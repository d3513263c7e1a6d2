"""Modules that hold quantized weights and answer the same calls as nn.Linear and nn.Embedding.

Shapes: N output features (or vocabulary), K input features, G groups of input features.

Order of use: build on any device, load the stored tensors, move and cast with `.to`, shard for tensor parallelism
(select_rows, select_columns), and last `pack` for the device's fast kernel. Unpacked modules run the plain op.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt_fast.ops import int4, int8
from gpt_fast.ops.int8 import expand_groups
from gpt_fast.quantize.scheme import CutScheme, QuantizationError, Scheme

SAME_SIZE_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Quantized(nn.Module, ABC):
    """Stored integers and scales of one [N, K] weight. `.to(dtype)` changes what it computes in, never what it holds.

    dtype: of the activations it will meet (a linear) or returns (an embedding).
    """

    weight: Tensor
    scale: Tensor
    packed = False

    def __init__(
        self, scheme: Scheme, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.scheme, self.dtype = scheme, dtype
        self.rows, self.columns = rows, columns
        for name, (stored, shape) in scheme.tensors(rows, columns).items():
            self.register_buffer(name, torch.zeros(shape, dtype=stored, device=device))

    @abstractmethod
    def pack(self) -> None:
        """Choose the fast op for this device and dtype; the plain op stays where none fits. Call it last."""

    @abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] times the weight: [..., N], without bias."""

    @abstractmethod
    def quantized_weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weight, scale, min) as stored; min is None for int8. RuntimeError after a pack() that dropped them."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """float32 [N, K]. Needs what quantized_weight gives."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.packed and dtype != self.dtype:
            raise RuntimeError(f"weights packed for {self.dtype} cannot change to {dtype}: cast before pack()")
        self.dtype = dtype
        # Seen as integers, the tensors move with the module and are not cast with it.
        held = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        for name, buffer in held.items():
            self._buffers[name] = buffer.view(SAME_SIZE_INT[buffer.element_size()])
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in held.items():
            self._buffers[name] = self._buffers[name].view(buffer.dtype)  # type: ignore[union-attr]
        return self


class Int8Weight(Quantized):
    """A weight in int8, with the product that a linear and a tied head share."""

    op: int8.Int8Op | None = None
    packed_scale: Tensor

    def pack(self) -> None:
        self.op = int8.fast_int8_op(self.weight, groupsize=self.scheme.groupsize, dtype=self.dtype)
        if self.op is not None:
            self.packed = True
            self.register_buffer("packed_scale", self.scale.to(self.dtype), persistent=False)

    def linear(self, x: Tensor) -> Tensor:
        if self.op is not None:
            return self.op(x, self.weight, self.packed_scale)
        return int8.int8_linear(x, self.weight, self.scale, groupsize=self.scheme.groupsize)

    def quantized_weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.weight, self.scale, None

    def dequantize(self) -> Tensor:
        return int8.dequantize_int8(self.weight, self.scale, groupsize=self.scheme.groupsize)


class Int8Embedding(Int8Weight):
    """nn.Embedding over int8 rows."""

    def forward(self, tokens: Tensor) -> Tensor:
        rows = int8.dequantize_int8(self.weight[tokens], self.scale[tokens], groupsize=self.scheme.groupsize)
        return rows.to(self.dtype)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all other rows (a vocabulary shard), in place: a head tied to them has the same. Before pack()."""
        self.weight, self.scale, self.rows = self.weight[rows], self.scale[rows], len(rows)


class TiedHead(nn.Module):
    """An output head over an embedding's int8 rows; it holds nothing of its own."""

    def __init__(self, embedding: Int8Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not a child too

    @property
    def embedding(self) -> Int8Embedding:
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        """Transformer.tie_output assigns here; the embedding's weight is what is used already."""

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding.linear(x)


class QuantizedLinear(Quantized):
    """What Int8Linear and Int4Linear share: nn.Linear's sizes, its bias, and cutting for tensor parallelism."""

    def __init__(
        self,
        scheme: Scheme,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(scheme, out_features, in_features, dtype=dtype, device=device)
        self.in_features, self.out_features = in_features, out_features
        empty = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.bias is None else y + self.bias

    def select_rows(self, rows: Tensor) -> QuantizedLinear:
        """The linear of these output features only (a column-parallel shard). Before pack()."""
        tensors = {name: tensor[rows] for name, tensor in self._stored().items()}
        bias = None if self.bias is None else self.bias[rows]
        return self._like(self.scheme, tensors, in_features=self.in_features, bias=bias)

    def select_columns(self, start: int, stop: int) -> QuantizedLinear:
        """The linear of inputs start..stop-1 only (a row-parallel shard), with the bias. Before pack().

        Where a boundary cuts through a group, the groups become smaller ones, each with the scale of its old one.
        QuantizationError where it cuts through a byte of two weights.
        """
        scheme, tensors = self._regrouped(*{start, stop} - {0, self.in_features})
        size = scheme.groupsize or 1
        per_byte = 8 // scheme.bits
        cut = {"weight": tensors["weight"][:, start // per_byte : stop // per_byte]}
        for name in tensors.keys() - {"weight"}:
            cut[name] = tensors[name][:, start // size : -(-stop // size)] if scheme.groupsize else tensors[name]
        return self._like(scheme, cut, in_features=stop - start, bias=self.bias)

    def _regrouped(self, *cuts: int) -> tuple[Scheme, dict[str, Tensor]]:
        """The same weight with groups small enough to be cut before these inputs."""
        tensors, scheme = self._stored(), self.scheme
        size = math.gcd(scheme.groupsize, *cuts)
        if not scheme.groupsize or size == scheme.groupsize:
            return scheme, tensors
        if size % (8 // scheme.bits):
            where = " and ".join(map(str, sorted(cuts)))
            raise QuantizationError(f"{scheme} of {self.in_features} inputs cannot be cut at {where} (allowed: even)")
        smaller = CutScheme(scheme.bits, size)
        for name in tensors.keys() - {"weight"}:
            tensors[name] = expand_groups(tensors[name], self.in_features, scheme.groupsize)[:, ::size]
        return smaller, tensors

    def _stored(self) -> dict[str, Tensor]:
        weight, scale, minimum = self.quantized_weight()
        return {"weight": weight, "scale": scale} | ({} if minimum is None else {"min": minimum})

    def _like(
        self, scheme: Scheme, tensors: dict[str, Tensor], *, in_features: int, bias: Tensor | None
    ) -> QuantizedLinear:
        rows = len(tensors["weight"])
        new = type(self)(scheme, in_features, rows, bias=bias is not None, dtype=self.dtype, device="meta")
        for name, tensor in tensors.items():
            setattr(new, name, tensor.contiguous())
        new.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return new


class Int8Linear(QuantizedLinear, Int8Weight):
    """nn.Linear with an int8 weight: one scale a row, or one a group of inputs."""


class Int4Linear(QuantizedLinear):
    """nn.Linear with an int4 weight, scale and min a group of inputs."""

    min: Tensor
    packed_weight: Tensor
    packed_scale_and_zero_GN2: Tensor
    run: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    run_groupsize: int

    def pack(self) -> None:
        packed = int4.pack_int4(self.weight, self.scale, self.min, groupsize=self.scheme.groupsize, dtype=self.dtype)
        if packed is None:
            return
        self.packed, self.run, self.run_groupsize = True, packed.run, packed.groupsize
        self.register_buffer("packed_weight", packed.weight, persistent=False)
        self.register_buffer("packed_scale_and_zero_GN2", packed.scale_and_zero_GN2, persistent=False)
        self.weight = self.scale = self.min = None  # type: ignore[assignment]

    def linear(self, x: Tensor) -> Tensor:
        if self.packed:
            return self.run(x, self.packed_weight, self.packed_scale_and_zero_GN2, self.run_groupsize)
        return int4.int4_linear(x, self.weight, self.scale, self.min, groupsize=self.scheme.groupsize)

    def quantized_weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.packed:
            raise RuntimeError("the stored int4 tensors are gone: ask for them before pack()")
        return self.weight, self.scale, self.min

    def dequantize(self) -> Tensor:
        return int4.dequantize_int4(self.weight, self.scale, self.min, groupsize=self.scheme.groupsize)


def pack(model: nn.Module) -> None:
    """Pack every quantized module for the device and dtype it is on. The last step of a load."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.pack()
