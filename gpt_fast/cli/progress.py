"""A progress bar of bytes."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class Bar:
    """A progress bar that is drawn when the first bytes are written: a refusal comes without one."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> Bar:
        return self

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc=self.title)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()
