"""Pictures of results. The one place that imports matplotlib (extra `plot`)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpt_fast.files import replacing

FORMATS = (".png", ".svg", ".pdf")


def picture_path(value: str) -> Path:
    """For argparse: what no picture could be written to is refused before anything is measured."""
    if find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install 'matplotlib>=3.10'")
    path = Path(value)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"unknown format (got {value!r}, allowed a name in {', '.join(FORMATS)})")
    return path


@contextmanager
def picture(path: Path, *, inches: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib Figure to draw on; it is at `path` once the context ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    yield figure
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."), dpi=120)
