"""What must hold of model_config.yaml's own keys, which are TorchServe's, before anything starts. No torch.

TorchServe 0.12 takes a key it does not know, a number in quotes or a word it cannot use for absent, logs at most a
warning and serves with its default. Here each is one line, `key: problem (got X, allowed Y)`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

DAY = 86400  # seconds


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; this one tells them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        scalars = [key_node for key_node, _ in node.value if isinstance(key_node, yaml.ScalarNode)]
        for key_node in scalars:  # any other key is refused by PyYAML itself
            key = key_node.value
            if key in seen:
                raise ValueError(f"{key}: given twice (line {key_node.start_mark.line + 1}); keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse(text: str) -> dict[str, Any]:
    """A model_config.yaml's text. Raises ValueError in one line: not YAML, not a mapping, a key given twice."""
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"model_config.yaml: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(
            f"model_config.yaml: must be a mapping (got {type(values).__name__}, allowed keys with values)"
        )
    return values


@dataclass(frozen=True)
class Key:
    """One of TorchServe's keys: what it may be. `why` says what another value would lead to."""

    allowed: str
    fits: Callable[[Any], bool]
    why: str = "not a value that TorchServe uses"


def whole(low: int, high: int) -> Key:
    return Key(f"a whole number {low}..{high}", lambda v: type(v) is int and low <= v <= high)


def only(value: Any, why: str) -> Key:
    return Key(str(value).lower(), lambda v: type(v) is type(value) and v == value, why)


ONE_WORKER = "one worker holds the model and batches for all, with a second one requests hang"
OTHER_TRANSPORT = "the handler speaks continuousBatching only"
KEYS = {
    "minWorkers": only(1, ONE_WORKER),
    "maxWorkers": only(1, ONE_WORKER),
    "batchSize": whole(1, 1 << 16),
    "maxBatchDelay": whole(0, 60_000),  # milliseconds
    "responseTimeout": whole(1, DAY),
    "startupTimeout": whole(1, DAY),
    "maxRetryTimeoutInSec": whole(1, DAY),
    "clientTimeoutInMills": whole(0, DAY * 1000),
    "jobQueueSize": whole(1, 1 << 20),
    "continuousBatching": only(True, "the handler streams through it"),
    "deviceType": Key("cpu or gpu", lambda v: v in ("cpu", "gpu")),
    "deviceIds": Key("a list of GPU numbers", lambda v: isinstance(v, list) and all(type(i) is int for i in v)),
    "asyncCommunication": only(False, OTHER_TRANSPORT),
    "sequenceBatching": only(False, OTHER_TRANSPORT),
    "useJobTicket": only(False, OTHER_TRANSPORT),
    "useVenv": only(False, "the worker runs in the environment that TorchServe runs in"),
    "parallelLevel": whole(1, 1024),
    "parallelType": Key("tp", lambda v: v in ("tp", ""), "tensor parallelism is the only kind there is"),
    "torchrun": Key("a mapping", lambda v: isinstance(v, dict)),
    "handler": Key("a mapping", lambda _: True),  # model_config.py's
}


def check_frontend_keys(config: Mapping[str, Any]) -> list[str]:
    """The problems of a parsed model_config.yaml's keys, `handler:`'s own left aside; one line each."""
    problems = []
    for name, value in config.items():
        key = KEYS.get(name)
        if key is None:
            problems.append(f"{name}: no such key{suggestion(name)} (allowed {', '.join(KEYS)})")
        elif not key.fits(value):
            problems.append(f"{name}: {key.why} (got {value!r}, allowed {key.allowed})")
    return problems or check_ranks(config)


def check_ranks(config: Mapping[str, Any]) -> list[str]:
    """The problems of the keys that have TorchServe start several processes, ranks, which hold the model together.

    It takes torchrun for absent without parallelType, and cannot start without torchrun if that is there. Of torchrun's
    own keys it passes on others than nproc-per-node, too, but they are for several machines, to whose ranks it does not
    speak, or change nothing.
    """
    kind, torchrun, level = config.get("parallelType", ""), config.get("torchrun"), config.get("parallelLevel", 1)
    if kind == "" and torchrun is not None:
        return [f"torchrun: has no effect by itself (got {torchrun!r}, allowed with parallelType: tp)"]
    if kind == "":
        return [] if level == 1 else [f"parallelLevel: torchrun.nproc-per-node says it (got {level}, allowed 1)"]
    if torchrun is None:
        return [f"parallelType: needs torchrun beside it (got {kind!r}, allowed with torchrun: {{nproc-per-node: 2}})"]
    problems = [
        f"torchrun.{key}: is not used (got {value!r}, allowed nproc-per-node alone; threads are handler.threads')"
        for key, value in torchrun.items()
        if key != "nproc-per-node"
    ]
    count, cores = torchrun.get("nproc-per-node"), os.cpu_count() or 1
    on_gpus = config.get("deviceType") == "gpu"  # of which the handler knows how many there are
    if type(count) is not int or not 1 <= count <= (1024 if on_gpus else cores):
        limit = "the machine's GPUs" if on_gpus else f"{cores}, the machine's cores"
        problems.append(f"torchrun.nproc-per-node: not as many ranks as can run (got {count!r}, allowed 1..{limit})")
    elif config.get("parallelLevel", count) != count:
        problems.append(f"parallelLevel: is not torchrun.nproc-per-node (got {level}, allowed {count} or none)")
    return problems


def suggestion(name: object) -> str:
    near = difflib.get_close_matches(str(name), KEYS, n=1)
    return f", did you mean {near[0]}?" if near else ""
