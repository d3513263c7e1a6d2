"""Tasks for lm-evaluation-harness: its own by name, the ones shipped here, and YAML files with local data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gpt_fast.cli.hub import OFFLINE, why_unreachable, work_offline
from gpt_fast.config import ConfigError
from gpt_fast.measure.texts import Text, sha256

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
SHIPPED = Path(__file__).parent / "data"


def find_tasks(names: list[str]) -> list[str | dict[str, Any]]:
    """What the harness accepts for each name: a shipped task or a path to a YAML file as its config, else the name."""
    return [read_task(path) if (path := yaml_path(name)) is not None else name for name in names]


def yaml_path(name: str) -> Path | None:
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    return Path(name) if name.endswith((".yaml", ".yml")) else None


def read_task(path: Path) -> dict[str, Any]:
    """The task's config, its local data files made absolute: they stand beside the YAML file, wherever that is."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("tasks", f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict) or "task" not in config:
        raise ConfigError("tasks", f"{path} must be a YAML object with a `task` name")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        config["dataset_kwargs"]["data_files"] = {split: str(path.parent / file) for split, file in files.items()}
    return config


def task_manager(found: Sequence[str | dict[str, Any]]) -> Any:
    """The harness's index of its own tasks, which takes seconds to build, only where one of them is asked for."""
    quiet_harness()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("tasks", "need lm-evaluation-harness: pip install 'lm-eval>=0.4.9'") from None
    return TaskManager(include_defaults=any(isinstance(task, str) for task in found))


def load_tasks(names: list[str]) -> dict[str, Any]:
    """The harness's Task objects by name, their data taken from this machine where the Hub cannot be reached.

    ConfigError when the harness is not installed or knows no such task, or its data is nowhere.
    """
    found = find_tasks(names)
    problem = why_unreachable(switches=OFFLINE) if any(map(needs_hub, found)) else None
    if problem is not None:
        work_offline()
    manager = task_manager(found)
    for task in found:
        if isinstance(task, str) and not manager.match_tasks([task]):
            shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
            allowed = f"lm-evaluation-harness's tasks, {shipped}, or a .yaml file"
            raise ConfigError("tasks", "unknown task", got=task, allowed=allowed)
    try:
        return dict(manager.load(found)["tasks"])
    except ConnectionError as error:
        data = f"the data of {', '.join(names)} is not on this machine"
        raise ConfigError("tasks", f"{data}, and {problem or error}") from None


def needs_hub(task: str | dict[str, Any]) -> bool:
    """Whether a task's data is a repository's: the harness's own tasks', and a YAML file's without local files."""
    return isinstance(task, str) or task.get("dataset_path") not in LOCAL_FORMATS


def quiet_harness() -> None:
    """Its progress is shown by bars; its log at the default level is pages long."""
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def task_text(names: list[str]) -> Text:
    """The documents of the tasks as running text, to calibrate on: training documents, or what a task has instead."""
    tasks = load_tasks(names)
    content = "\n\n".join(document_text(task, doc) for task in tasks.values() for doc in docs_of(task))
    return Text(content, "+".join(names), sha256(content))


def document_text(task: Any, doc: Any) -> str:
    """Question and right answer, as the task itself joins them."""
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    return f"{task.doc_to_text(doc)}{task.config.target_delimiter}{target}".strip()


def docs_of(task: Any) -> Any:
    if task.has_training_docs():
        return task.training_docs()
    return task.validation_docs() if task.has_validation_docs() else task.test_docs()
