"""Modules of shapes alone, on the meta device: what a checkpoint's tensors are checked against and assigned to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gpt_fast.config import ModelConfig
from gpt_fast.model.transformer import Transformer


def empty_model(config: ModelConfig) -> Transformer:
    """The model on the meta device: names, shapes and dtypes, no memory."""
    with without_memory():
        return Transformer(config)


@contextmanager
def without_memory() -> Iterator[None]:
    """Within it, new modules are on the meta device, and nothing fills their parameters."""
    with torch.device("meta"), SkipInit():
        yield


class SkipInit(TorchFunctionMode):
    """Leaves new parameters as they are: filling them, even on the meta device, imports a compiler (5 s, 150 MB)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
