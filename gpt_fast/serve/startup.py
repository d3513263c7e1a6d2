"""From model_config.yaml to a running service: check every key, load, warm up, start the engine's thread."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_fast.config import ConfigError, EngineConfig, check_int
from gpt_fast.llm import Engine
from gpt_fast.serve.admission import Admit
from gpt_fast.serve.rounds import Rounds
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

RENAMED = {  # keys of TorchServe's gpt_fast example, and what became of them
    "converted_ckpt_dir": "renamed to checkpoint_path",
    "fx_graph_cache": "no longer needed: torch keeps its compile cache by default",
    "profile": "use python -m gpt_fast.generate --profile",
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the HTTP side of `handler:` may set; the rest of its keys are EngineConfig's.

    max_new_tokens: what a request gets that does not say. stream: whether a native request streams unless it says.
    """

    max_new_tokens: int = 50
    stream: bool = True

    def __post_init__(self) -> None:
        check_int("handler.max_new_tokens", self.max_new_tokens, 1, 1 << 22)
        if not isinstance(self.stream, bool):
            raise ConfigError("handler.stream", "must be true or false", got=self.stream)


def read_config(yaml: Mapping[str, Any] | None, *, root: Path) -> tuple[EngineConfig, ServeConfig]:
    """Split and check `handler:` of a parsed model_config.yaml; relative paths start at `root`."""
    handler = (yaml or {}).get("handler")
    if not isinstance(handler, dict):
        raise ConfigError("handler", "model_config.yaml needs a handler section with at least checkpoint_path")
    if (yaml or {}).get("continuousBatching") is not True:
        raise ConfigError("continuousBatching", "must be on: the handler streams through it", allowed="true")
    serve_keys = {field.name for field in dataclasses.fields(ServeConfig)}
    for key in handler:
        if key in RENAMED:
            raise ConfigError(f"handler.{key}", RENAMED[key])
    serve = ServeConfig(**{key: value for key, value in handler.items() if key in serve_keys})
    values = {key: value for key, value in handler.items() if key not in serve_keys}
    for key in values:
        if key.endswith("checkpoint_path") and isinstance(values[key], str):
            values[key] = str(root / values[key])
    return EngineConfig.from_mapping(values, where="handler", also_known=serve_keys), serve


def start_serving(yaml: Mapping[str, Any] | None, *, root: Path, model_name: str) -> Rounds:
    """Load and warm up the engine, start its thread; returns what the handler plays its rounds with."""
    engine_config, serve_config = read_config(yaml, root=root)
    if not engine_config.threads:
        engine_config = dataclasses.replace(engine_config, threads=serving_threads())
    engine = Engine.load(**dataclasses.asdict(engine_config))
    logger.info("gpt-fast serves %s", json.dumps(engine.description))
    service = Service(engine, threads=engine_config.threads)
    service.start()
    drain_file = Path(os.environ.get("GPT_FAST_DRAIN_FILE") or os.devnull + "/never")
    return Rounds(service, Admit(service, serve_config, model_name=model_name, drain_file=drain_file))


def serving_threads() -> int:
    """Every core but one where there are more than two: TorchServe's front end and the handler need a share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores - 1 if cores > 2 else cores
