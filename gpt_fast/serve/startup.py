"""From model_config.yaml to a running service: check every key, load, warm up, start the engine's thread."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
from collections.abc import Mapping
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
from gpt_fast.llm import Engine
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.frontend_keys import check_frontend_keys
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

    max_new_tokens, stream: for a native request that does not say. max_waiting: sequences that may wait for a slot
    before requests get 429; None: half of what batchSize leaves beside the slots. request_seconds: the longest any
    request may take. hung_seconds: a step that takes longer ends the worker, for TorchServe to restart.
    stream_interval: seconds between two chunks of a stream, after the first token; what is decoded meanwhile leaves
    together. 0 sends every token by itself; None: see `chunk_interval`.
    """

    max_new_tokens: int = checked(50, whole(1, 1 << 22))
    stream: bool = checked(True, switch)
    max_waiting: int | None = checked(None, unless_none(whole(0, 1 << 16)))
    request_seconds: float = checked(600.0, real(0.001, 86400.0))
    hung_seconds: float = checked(60.0, real(1.0, 86400.0))
    stream_interval: float | None = checked(None, unless_none(real(0.0, 1.0)))

    def __post_init__(self) -> None:
        check_fields(self, where="handler.")


def read_config(yaml: Mapping[str, Any] | None, *, root: Path) -> tuple[EngineConfig, ServeConfig]:
    """Split and check `handler:` of a parsed model_config.yaml; relative paths start at `root`."""
    handler = (yaml or {}).get("handler")
    if not isinstance(handler, dict):
        raise ConfigError("handler", "model_config.yaml needs a handler section with at least checkpoint_path")
    if problems := check_frontend_keys(yaml or {}):
        raise ValueError(problems[0])
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
    engine = EngineConfig.from_mapping(values, where="handler", also_known=serve_keys)
    waiting = queue_places((yaml or {}).get("batchSize", 1), slots=engine.max_num_seqs, wanted=serve.max_waiting)
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


def start_serving(yaml: Mapping[str, Any] | None, *, root: Path, model_name: str) -> Rounds:
    """Load and warm up the engine, start its thread; returns what the handler plays its rounds with."""
    engine_config, serve_config = read_config(yaml, root=root)
    if not engine_config.threads:
        engine_config = dataclasses.replace(engine_config, threads=serving_threads())
    gc.freeze()  # what is imported stays: each full collection would go through it, for 0.1 s
    engine = Engine.load(**dataclasses.asdict(engine_config))
    gc.freeze()
    told = engine.description
    logger.info("gpt-fast serves %s", json.dumps(told.as_dict()))
    service = Service(
        engine,
        threads=told.torch_threads,
        hung_after=serve_config.hung_seconds,
        interval=chunk_interval(serve_config.stream_interval, device=told.device, threads=told.threads),
    )
    service.start()
    drain_file = os.environ.get("GPT_FAST_DRAIN_FILE")
    limits = Limits(
        max_new_tokens=serve_config.max_new_tokens,
        stream=serve_config.stream,
        max_waiting=serve_config.max_waiting or 0,
        max_seconds=serve_config.request_seconds,
    )
    admit = Admit(
        engine,
        in_flight=service.in_flight,
        limits=limits,
        model_name=model_name,
        drain_file=Path(drain_file) if drain_file else None,
    )
    return Rounds(service, admit)


def chunk_interval(wanted: float | None, *, device: str, threads: int) -> float:
    """Seconds between two chunks of a stream: as wanted, else 0.02, or 0.1 where the engine computes on every core.

    There each of TorchServe's rounds stops the engine for some milliseconds.
    """
    if wanted is not None:
        return wanted
    return 0.1 if device == "cpu" and threads >= available_cores() else 0.02


def serving_threads() -> int:
    """Every core but one where there are more than two: TorchServe's front end and the handler need a share."""
    cores = available_cores()
    return cores - 1 if cores > 2 else cores


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
