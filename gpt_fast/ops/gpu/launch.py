"""A kernel launch as a value, so that what runs on a GPU can also be compiled and inspected where there is none."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """kernel[grid](**arguments, **constants): `constants` are compiled in."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1

    def run(self) -> None:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def is_native(tensor: Tensor) -> bool:
    """Whether kernels over this tensor may use dp4a and bfloat16 tensor cores: no interpreter, no ROCm."""
    return tensor.device.type != "cpu" and torch.version.hip is None


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below value."""
    return 1 << (value - 1).bit_length()


def divide_up(value: int, by: int) -> int:
    return -(-value // by)
