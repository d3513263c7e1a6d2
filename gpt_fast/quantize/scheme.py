"""How one weight is stored, as files and commands spell it: int8, int8.g32, int4.g64.

Shapes: N output features, K input features, G groups of input features.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from gpt_fast.ops.int4 import GROUPSIZES

INT8_GROUPSIZES = (0, *GROUPSIZES)


class QuantizationError(ValueError):
    """A quantization that cannot be made or loaded: one line naming the tensor or flag and both sides."""


@dataclass(frozen=True)
class Scheme:
    """bits 8: symmetric, groupsize 0 means one scale a row. bits 4: scale and min a group."""

    bits: int
    groupsize: int

    def __post_init__(self) -> None:
        allowed = {8: INT8_GROUPSIZES, 4: GROUPSIZES}.get(self.bits)
        if allowed is None:
            raise QuantizationError(f"bits: unknown (got {self.bits}, allowed 4, 8)")
        if self.groupsize not in allowed:
            raise QuantizationError(
                f"groupsize: unknown for int{self.bits} (got {self.groupsize}, allowed {', '.join(map(str, allowed))})"
            )

    @classmethod
    def parse(cls, text: object) -> Scheme:
        match = re.fullmatch(r"int([48])(?:\.g(\d+))?", text) if isinstance(text, str) else None
        if match is None:
            raise QuantizationError(f"scheme: unknown (got {text!r}, allowed int8, int8.gN, int4.gN)")
        return cls(int(match[1]), int(match[2] or 0))

    def __str__(self) -> str:
        return f"int{self.bits}" + (f".g{self.groupsize}" if self.groupsize else "")

    def groups(self, columns: int) -> int:
        return -(-columns // self.groupsize)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each stored tensor of an [N, K] weight, by its name's last part."""
        if self.bits == 4:
            group_shape = (rows, self.groups(columns))
            return {
                "weight": (torch.uint8, (rows, columns // 2)),
                "scale": (torch.float16, group_shape),
                "min": (torch.float16, group_shape),
            }
        scale = (torch.float16, (rows, self.groups(columns))) if self.groupsize else (torch.float32, (rows,))
        return {"weight": (torch.int8, (rows, columns)), "scale": scale}


class CutScheme(Scheme):
    """Of a part that was cut out of a matrix: its groups may have any size, such as no file has."""

    def __post_init__(self) -> None:
        pass
