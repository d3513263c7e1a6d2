"""Where the files around the package lie: all in its checkout; of an installed package, what the wheel brought along.

What is made (model_store/, build/, .run/) and what a yaml's relative paths count from is the checkout then, else the
current directory.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE_HOME = Path(__file__).resolve().parents[2]  # holds gpt_fast/: the checkout, or site-packages


def in_checkout() -> bool:
    return (PACKAGE_HOME / "handler.py").is_file() and (PACKAGE_HOME / "pyproject.toml").is_file()


def home() -> Path:
    """The folder to work in."""
    return PACKAGE_HOME if in_checkout() else Path.cwd()


def cache() -> Path:
    """For what can be made again: $GPT_FAST_CACHE, else gpt_fast under the user's cache directory."""
    if own := os.environ.get("GPT_FAST_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt_fast"


def shipped(name: str) -> Path:
    """A file beside the package, by its name in the checkout: handler.py, model_config.yaml, deploy/config.properties.

    Raises ValueError where an installation left it out.
    """
    if in_checkout():
        return PACKAGE_HOME / name
    for file in installed_files():
        if file.as_posix().endswith(f"share/gpt-fast/{name}"):
            return file
    raise ValueError(f"{name}: did not come with the package; install its wheel, or work in a checkout")


def nearest(name: str) -> Path:
    """The user's own file of that name in the folder to work in, else the shipped one."""
    own = home() / name
    return own if own.exists() else shipped(name)


def installed_files() -> list[Path]:
    """What pip notes that it installed."""
    try:
        return [Path(str(file.locate())).resolve() for file in files("gpt-fast") or []]
    except PackageNotFoundError:
        return []
