"""What a server should not be run with, though it would run: doctor's questions about safety and the machine."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from gpt_fast.serve.startup_check import is_true, parse_properties

FREE_BYTES = 500 << 20  # logs of three kinds, six files of 20 MB each, and an unpacked archive
CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")
SHOWN = 3  # packages off the lock that are named


def check_posture(properties: str, *, run_dir: Path, lock: Path, checkpoint: Path | None, user: int) -> list[str]:
    """One line a problem. user: the effective user id. lock: requirements.lock, where there is one."""
    settings = parse_properties(properties)
    return [
        *check_model_api(settings),
        *check_urls(settings.get("allowed_urls")),
        *check_key_file(run_dir / "key_file.json"),
        *check_user(user),
        *check_versions(lock),
        *check_disk(run_dir),
        *check_memory(checkpoint),
    ]


def check_model_api(settings: Mapping[str, str]) -> list[str]:
    if not is_true(settings.get("enable_model_api", "")):
        return []
    return ["enable_model_api: who reaches the management port could load and remove models (got true, allowed false)"]


def check_urls(allowed_urls: str | None) -> list[str]:
    """TorchServe's own default lets archives come from anywhere."""
    if allowed_urls is None:
        return [
            "allowed_urls: an archive could come from anywhere (got none given, allowed none, or file:///FOLDER/.*)"
        ]
    return [
        f"allowed_urls: an archive could come from anywhere (got {url}, allowed none, or file:///FOLDER/.*)"
        for url in allowed_urls.split(",")
        if url.strip() != "none" and not re.match(r"file:///[\w-]", url.strip())
    ]


def check_key_file(path: Path) -> list[str]:
    """TorchServe's keys are for their owner alone."""
    if not path.exists() or path.stat().st_mode & 0o077 == 0:
        return []
    return [f"{path}: others can read the keys (got mode {path.stat().st_mode & 0o777:o}, allowed 600)"]


def check_user(user: int) -> list[str]:
    """Root of a container is root of what is in it, and most images have no other user."""
    if user != 0 or in_container():
        return []
    return ["user: a flaw in the server would be a flaw in the machine (got root, allowed any other user)"]


def in_container() -> bool:
    """Docker, Podman, Kubernetes and systemd-nspawn say so."""
    told = any(Path(mark).exists() for mark in CONTAINER_MARKS)
    return told or not {"container", "KUBERNETES_SERVICE_HOST"}.isdisjoint(os.environ)


def check_versions(lock: Path) -> list[str]:
    """What is installed is what was tested. A build's tag (+cpu) is no other version."""
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;+]+)", text, re.MULTILINE))
    if not pinned:
        return []
    other = [
        f"{name} {got.partition('+')[0]} for {pinned[name]}"
        for name, got in installed().items()
        if name in pinned and got.partition("+")[0] != pinned[name]
    ]
    if not other:
        return []
    more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
    named = ", ".join(sorted(other)[:SHOWN])
    return [f"packages: not those of {lock.name} (got {named}{more}, allowed what make serve installs)"]


def installed() -> dict[str, str]:
    """Version by name, as locks spell it.

    Of two, the one that an import finds: setuptools puts the folder of its own copies at the end of the path once it is
    imported, and those belong to it alone.
    """
    versions: dict[str, str] = {}
    for path in sys.path:
        if Path(path).name == "_vendor":
            continue
        for each in metadata.distributions(path=[path]):
            if name := each.metadata["Name"]:
                versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), each.version)
    return versions


def check_disk(run_dir: Path) -> list[str]:
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free >= FREE_BYTES:
        return []
    return [f"disk: little room for logs at {folder} (got {free >> 20} MiB free, allowed {FREE_BYTES >> 20} or more)"]


def check_memory(checkpoint: Path | None) -> list[str]:
    """Weights are mapped and packed once more, so a machine needs their size at the least."""
    if checkpoint is None or not checkpoint.is_file():
        return []
    size, memory = checkpoint.stat().st_size, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size < memory:
        return []
    return [f"memory: less than the weights take (got {memory >> 20} MiB, allowed more than {size >> 20})"]
