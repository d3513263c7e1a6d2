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
from typing import Any, NamedTuple

from gpt_fast.checkpoint.choice import choose_weights
from gpt_fast.cli.errors import text
from gpt_fast.config import EngineConfig
from gpt_fast.engine.ranks import Group
from gpt_fast.llm import Engine
from gpt_fast.load.engine import load_parts, start_following
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.model_config import ServeConfig, read_config
from gpt_fast.serve.rounds import Rounds
from gpt_fast.serve.service import Service

logger = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005  # the engine's thread waits that long for Python's lock, 5 ms by default, once or twice a token


def with_weights(config: EngineConfig) -> EngineConfig:
    """With the weights file that a checkpoint's directory means; the log says which it is."""
    path = Path(config.checkpoint_path)
    choice = choose_weights(path, config.quality, kv_cache=config.kv_cache, dtype=config.dtype)
    if choice.told:
        logger.info("gpt-fast: %s", choice.told)
    return dataclasses.replace(config, checkpoint_path=str(choice.weights))


class Started(NamedTuple):
    """What a door serves with: the engine behind its mailboxes, and who may enter."""

    service: Service
    admit: Admit


def start_serving(
    yaml: Mapping[str, Any] | None, *, root: Path, model_name: str, group: Group | None = None
) -> Rounds | None:
    """Load and warm up the engine, start its thread; returns what the handler plays its rounds with.

    Of a group, rank 0 serves and gets the rounds; the others compute with it and have None.
    """
    engine_config, serve_config = read_config(yaml, root=root)
    engine_config = prepare(engine_config, group)
    if group is not None and not group.leads:
        follow_beside(start_following(engine_config, group))
        return None
    drain_file = os.environ.get("GPT_FAST_DRAIN_FILE")
    draining = Path(drain_file).exists if drain_file else lambda: False
    service, admit = start_service(
        engine_config, serve_config, model_name=model_name, draining=draining, busy_interval=0.1, group=group
    )
    return Rounds(service, admit)


def prepare(engine_config: EngineConfig, group: Group | None) -> EngineConfig:
    """The configuration with its weights file named and its threads counted, and this process made ready to load."""
    engine_config = with_weights(engine_config)
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.freeze()  # what is imported stays: each full collection would go through it, for 0.1 s
    return dataclasses.replace(engine_config, threads=engine_config.threads or serving_threads(group))


def start_service(
    engine_config: EngineConfig,
    serve_config: ServeConfig,
    *,
    model_name: str,
    draining: Callable[[], bool],
    busy_interval: float,
    group: Group | None = None,
) -> Started:
    """Load and warm up the engine, start its thread. busy_interval: see `chunk_interval`."""
    engine = Engine(load_parts(engine_config, group))
    gc.freeze()
    told = engine.description
    logger.info("gpt-fast serves %s", json.dumps(told.as_dict()))
    threads = told.threads * ranks_here(group)
    interval = chunk_interval(serve_config.stream_interval, device=told.device, threads=threads, busy=busy_interval)
    service = Service(engine, threads=told.torch_threads, hung_after=serve_config.hung_seconds, interval=interval)
    service.start()
    limits = Limits(
        max_new_tokens=serve_config.max_new_tokens,
        stream=serve_config.stream,
        max_waiting=serve_config.max_waiting or 0,
        max_seconds=serve_config.request_seconds,
    )
    names = serve_config.model_names or (model_name,)
    return Started(
        service, Admit(engine, in_flight=service.in_flight, limits=limits, model_names=names, draining=draining)
    )


def chunk_interval(wanted: float | None, *, device: str, threads: int, busy: float = 0.1) -> float:
    """Seconds between two chunks of a stream: as wanted, else 0.02, or `busy` where the engine computes on every core.

    There whatever a door does stops the engine: each of TorchServe's rounds for some milliseconds.
    """
    if wanted is not None:
        return wanted
    return busy if device == "cpu" and threads >= available_cores() else 0.02


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
