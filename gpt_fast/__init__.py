"""gpt-fast for TorchServe: a small PyTorch-native engine for Llama-family models, and its server package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see
    from gpt_fast.config import EngineConfig, SamplingParams
    from gpt_fast.llm import Engine

__version__ = "0.1.0"  # pyproject.toml takes it from here
__all__ = ["Engine", "EngineConfig", "SamplingParams", "__version__"]
_HOMES = {"Engine": "gpt_fast.llm", "EngineConfig": "gpt_fast.config", "SamplingParams": "gpt_fast.config"}


def __getattr__(name: str) -> Any:
    """Import public names when asked for, so that importing a torch-free module stays free of torch (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
