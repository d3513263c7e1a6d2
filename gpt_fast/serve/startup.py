"""From model_config.yaml to a running service: load, warm up, start the engine's thread."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt_fast.checkpoint.choice import choose_weights
from gpt_fast.cli.errors import text
from gpt_fast.config import EngineConfig
from gpt_fast.engine.ranks import Group
from gpt_fast.llm import Engine
from gpt_fast.load.engine import load_parts, start_following
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.model_config import read_config
from gpt_fast.serve.rounds import Rounds
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005  # the engine's thread waits that long for Python's lock, 5 ms by default, once or twice a token


def with_weights(config: EngineConfig) -> EngineConfig:
    """With the weights file that a checkpoint's directory means; the log says which it is."""
    choice = choose_weights(Path(config.checkpoint_path), config.quality, kv_cache=config.kv_cache)
    if choice.told:
        logger.info("gpt-fast: %s", choice.told)
    return dataclasses.replace(config, checkpoint_path=str(choice.weights))


def start_serving(
    yaml: Mapping[str, Any] | None, *, root: Path, model_name: str, group: Group | None = None
) -> Rounds | None:
    """Load and warm up the engine, start its thread; returns what the handler plays its rounds with.

    Of a group, rank 0 serves and gets the rounds; the others compute with it and have None.
    """
    engine_config, serve_config = read_config(yaml, root=root)
    engine_config = with_weights(engine_config)
    if not engine_config.threads:
        engine_config = dataclasses.replace(engine_config, threads=serving_threads(group))
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # what is imported stays: each full collection would go through it, for 0.1 s
    if group is not None and not group.leads:
        follow_beside(start_following(engine_config, group))
        return None
    engine = Engine(load_parts(engine_config, group))
    gc.freeze()
    told = engine.description
    logger.info("gpt-fast serves %s", json.dumps(told.as_dict()))
    service = Service(
        engine,
        threads=told.torch_threads,
        hung_after=serve_config.hung_seconds,
        interval=chunk_interval(
            serve_config.stream_interval, device=told.device, threads=told.threads * ranks_here(group)
        ),
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


def follow_beside(run: Callable[[], None]) -> None:
    """Compute with rank 0 on a thread of its own; the process ends with it, so that TorchServe starts all anew."""

    def loop() -> None:
        try:
            run()
        except Exception as error:
            logger.error("gpt-fast's rank cannot go on: %s", text(error))
        finally:
            logging.shutdown()
            os._exit(1)

    threading.Thread(target=loop, name="follower", daemon=True).start()


def serving_threads(group: Group | None = None) -> int:
    """Every core but one where there are more than two: TorchServe's front end and the handler need a share."""
    cores = available_cores()
    return max(1, (cores - 1 if cores > 2 else cores) // ranks_here(group))


def ranks_here(group: Group | None) -> int:
    return 1 if group is None else group.local.size


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
