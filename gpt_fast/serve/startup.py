"""From model_config.yaml to a running service: load, warm up, start the engine's thread."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_fast.llm import Engine
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.model_config import read_config
from gpt_fast.serve.rounds import Rounds
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005  # the engine's thread waits that long for Python's lock, 5 ms by default, once or twice a token


def start_serving(yaml: Mapping[str, Any] | None, *, root: Path, model_name: str) -> Rounds:
    """Load and warm up the engine, start its thread; returns what the handler plays its rounds with."""
    engine_config, serve_config = read_config(yaml, root=root)
    if not engine_config.threads:
        engine_config = dataclasses.replace(engine_config, threads=serving_threads())
    sys.setswitchinterval(SWITCH_SECONDS)
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
        model_names=serve_config.model_names or (model_name,),
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
