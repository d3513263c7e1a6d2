"""What GPTQ over a large model reads from disk instead of holding: a block's weights, and the hidden states.

Shapes: C calibration windows, S tokens of a window, B windows read or written together, D model dim, N output
features, K input features.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_fast.checkpoint.safetensors_file import put_tensor
from gpt_fast.quantize.rtn import dequantize_weight
from gpt_fast.quantize.scheme import Scheme

ELEMENTS_AT_ONCE = 1 << 24  # of a weight in float32: 64 MiB

ReadTensor = Callable[[str], Tensor]


class StreamedLinear(nn.Module):
    """nn.Linear in float32 whose weight is read a band of rows at a time, from the source or what was made of it."""

    def __init__(self, linear: nn.Linear, read: ReadTensor, name: str, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.read, self.name, self.device = read, name, device
        self.bias = None if linear.bias is None else read(f"{name}.bias").to(device).float()
        self.quantized: tuple[dict[str, Tensor], Scheme] | None = None

    def source(self) -> Tensor:
        """The weight as the source has it, [N, K]."""
        return self.read(f"{self.name}.weight")

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        band = max(1, ELEMENTS_AT_ONCE // self.in_features)
        for first in range(0, self.out_features, band):
            rows = slice(first, first + band)
            out[..., rows] = F.linear(x, self.rows(rows), None if self.bias is None else self.bias[rows])
        return out

    def rows(self, rows: slice) -> Tensor:
        if self.quantized is None:
            return self.source()[rows].to(self.device).float()
        tensors, scheme = self.quantized
        return dequantize_weight({part: tensor[rows].to(self.device) for part, tensor in tensors.items()}, scheme)


class HiddenStates:
    """float32 [C, S, D] in a temporary file, which has no name and goes when this does."""

    def __init__(self, windows: int, length: int, dim: int, *, directory: Path | None = None) -> None:
        self.windows, self.length, self.dim = windows, length, dim
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 (closed with this object)

    def read(self, first: int, count: int) -> Tensor:
        """[B, S, D], B = `count` or what is left."""
        count = min(count, self.windows - first)
        row_bytes = self.length * self.dim * 4
        data = bytearray(count * row_bytes)
        self.file.seek(first * row_bytes)
        self.file.readinto(data)
        return torch.frombuffer(data, dtype=torch.float32).view(count, self.length, self.dim)

    def write(self, first: int, hidden_BSD: Tensor) -> None:
        self.file.seek(first * self.length * self.dim * 4)
        put_tensor(self._append, hidden_BSD.float())

    def _append(self, data: memoryview) -> None:
        self.file.write(data)
