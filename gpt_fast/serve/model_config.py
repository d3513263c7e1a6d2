"""model_config.yaml, checked whole before anything starts: TorchServe's keys, and ours under `handler:`. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_fast.config import (
    ConfigError,
    EngineConfig,
    check_fields,
    check_int,
    checked,
    real,
    switch,
    unless_none,
    whole,
)
from gpt_fast.serve.frontend_keys import check_frontend_keys

RENAMED = {  # keys of TorchServe's gpt_fast example, and what became of them
    "converted_ckpt_dir": "renamed to checkpoint_path",
    "fx_graph_cache": "no longer needed: torch keeps its compile cache by default",
    "profile": "use python -m gpt_fast.generate --profile",
}

MAX_NAME = 256  # characters
MODEL_NAME = "gpt-fast"  # of a model that the configuration gives no served_model_name


def some_names(key: str, value: object) -> None:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in names):
        allowed = f"a string of 1..{MAX_NAME} characters, or a list of them"
        raise ConfigError(key, "must be a name or a list of names", got=value, allowed=allowed)
    if len(set(names)) < len(names):
        raise ConfigError(key, "has a name twice", got=value)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What the HTTP side of `handler:` may set; the rest of its keys are EngineConfig's.

    max_new_tokens, stream: for a native request that does not say. max_waiting: sequences that may wait for a slot
    before requests get 429; None: half of what batchSize leaves beside the slots. request_seconds: the longest any
    request may take. hung_seconds: a step that takes longer ends the worker, for TorchServe to restart.
    stream_interval: seconds between two chunks of a stream, after the first token; what is decoded meanwhile leaves
    together. 0 sends every token by itself; None: see `chunk_interval`. served_model_name: what requests may call the
    model, a name or several, of which answers carry the first; None: as TorchServe names it.
    """

    max_new_tokens: int = checked(50, whole(1, 1 << 22))
    stream: bool = checked(True, switch)
    max_waiting: int | None = checked(None, unless_none(whole(0, 1 << 16)))
    request_seconds: float = checked(600.0, real(0.001, 86400.0))
    hung_seconds: float = checked(60.0, real(1.0, 86400.0))
    stream_interval: float | None = checked(None, unless_none(real(0.0, 1.0)))
    served_model_name: str | Sequence[str] | None = checked(None, unless_none(some_names))

    @property
    def model_names(self) -> tuple[str, ...]:
        names = self.served_model_name or ()
        return (names,) if isinstance(names, str) else tuple(names)

    def __post_init__(self) -> None:
        check_fields(self, where="handler.")


def read_config(yaml: Mapping[str, Any] | None, *, root: Path) -> tuple[EngineConfig, ServeConfig]:
    """Split and check a parsed model_config.yaml; relative paths start at `root`. ValueError: its first problem."""
    handler = handler_section(yaml or {})
    if problems := check_frontend_keys(yaml or {}):
        raise ValueError(problems[0])
    return read_handler(handler, yaml or {}, root=root)


def problems_of(yaml: Mapping[str, Any], *, root: Path) -> list[str]:
    """What keeps a parsed model_config.yaml from being served, one line each: all of TorchServe's keys, our first."""
    problems = check_frontend_keys(yaml)
    try:
        read_handler(handler_section(yaml), yaml, root=root)
    except ValueError as error:
        problems.append(str(error))
    return problems


def handler_section(yaml: Mapping[str, Any]) -> dict[str, Any]:
    handler = yaml.get("handler")
    if not isinstance(handler, dict):
        raise ConfigError("handler", "model_config.yaml needs a handler section with at least checkpoint_path")
    return handler


def read_handler(
    handler: Mapping[str, Any], yaml: Mapping[str, Any], *, root: Path
) -> tuple[EngineConfig, ServeConfig]:
    """Split and check our own section, and what of TorchServe's keys it needs."""
    if "continuousBatching" not in yaml:
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
    engine = EngineConfig.from_mapping(values, where="handler", also_known=serve_keys)
    waiting = queue_places(yaml.get("batchSize", 1), slots=engine.max_num_seqs, wanted=serve.max_waiting)
    return engine, dataclasses.replace(serve, max_waiting=waiting)


def queue_places(batch_size: int, *, slots: int, wanted: int | None) -> int:
    """How many sequences may wait for a slot: `wanted`, else half of what batchSize leaves beside the slots.

    batchSize = running slots + waiting places + spare. Requests that get a spare place are refused at once with 429.
    TorchServe hands the handler no more than batchSize requests; those beyond it wait in TorchServe's own queue, where
    nobody can answer them.
    """
    check_int("batchSize", batch_size, 1, 1 << 16)
    spare = batch_size - slots
    if spare < 1:
        raise ConfigError("batchSize", "must be above handler.max_num_seqs", got=batch_size, allowed=f"> {slots}")
    if wanted is not None and wanted >= spare:
        problem = "must leave room in batchSize for requests that are refused"
        raise ConfigError("handler.max_waiting", problem, got=wanted, allowed=f"0..{spare - 1}")
    return spare // 2 if wanted is None else wanted
