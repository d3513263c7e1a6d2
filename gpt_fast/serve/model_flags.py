"""Which model a command serves, and how: model_config.yaml, and the flags that say otherwise. No torch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_fast.cli.errors import at_least
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.serve.frontend_keys import parse
from gpt_fast.serve.model_config import ServeConfig, read_config

CONFIG = Path("model_config.yaml")
DEFAULTS = {"continuousBatching": True, "batchSize": 64, "handler": {"max_num_seqs": 16, "max_new_tokens": 256}}
OVERRIDES: dict[str, Callable[[str], Any]] = {  # of the configuration's `handler:` keys, by flags of their names
    "checkpoint_path": str,
    "served_model_name": str,
    "device": str,
    "dtype": str,
    "kv_cache": str,
    "max_seq_len": at_least(0),
    "max_num_seqs": at_least(1),
    "threads": at_least(0),
    "draft_checkpoint_path": str,
    "speculate": str,
}
PATHS = ("checkpoint_path", "draft_checkpoint_path")  # relative to where the command runs


def add_model_flags(flags: argparse.ArgumentParser) -> None:
    model = flags.add_argument_group("the model: what the configuration says, and instead of its handler's keys")
    add = model.add_argument
    add("--config", type=Path, help=f"TorchServe's model configuration (default: ./{CONFIG} where there is one)")
    for name, kind in OVERRIDES.items():
        add(f"--{name}", type=kind, help=f"handler.{name} (docs/serving.md)")


def read_configs(args: argparse.Namespace, check: Callable[[dict[str, Any]], None]) -> tuple[EngineConfig, ServeConfig]:
    """The configuration's file, or the defaults where there is none, with what the flags say instead.

    check: raises ConfigError for what the command cannot do of it.
    """
    path = args.config or (CONFIG if CONFIG.is_file() else None)
    yaml: dict[str, Any] = parse(path.read_text(encoding="utf-8")) if path else dict(DEFAULTS)
    check(yaml)
    handler = yaml.get("handler")
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    given |= {name: checkpoint_of(given[name]) for name in PATHS if name in given}
    if isinstance(handler, dict):
        yaml = yaml | {"handler": handler | given}
        if "checkpoint_path" not in yaml["handler"]:
            raise ConfigError("--checkpoint_path", "is required where there is no ./model_config.yaml")
    root = Path(os.environ.get("GPT_FAST_ROOT") or (path.parent if path else "."))
    return read_config(yaml, root=root)


def checkpoint_of(name: str) -> str:
    """What a flag names, converted where it has to be: a directory, a weights file, a GGUF, a pulled ORG/NAME."""
    from gpt_fast.convert.named import converted  # all that converts: not for the help

    return str(converted(name).absolute())
