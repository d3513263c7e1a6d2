"""What is asked of a target, and what it measured: plain values that cross process borders."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Case:
    """`rows` streams decoded together, each of its own prompt of `prompt_len` random token ids below `vocabulary`.

    temperature: of our own sampler; a peer takes the best token, or none.
    """

    prompt_len: int
    new_tokens: int
    rows: int = 1
    round: int = 0
    vocabulary: int = 1000
    temperature: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """What makes two cases comparable: all but the round."""
        return self.prompt_len, self.new_tokens, self.rows

    def prompts(self) -> list[list[int]]:
        """One prompt a row; another round has other prompts, so that no prefix is ever reused."""
        rng = random.Random(f"{self.round} {self.rows} {self.prompt_len}")
        low = min(100, self.vocabulary // 2)  # the first ids are often special
        return [[rng.randrange(low, self.vocabulary) for _ in range(self.prompt_len)] for _ in range(self.rows)]


@dataclass(frozen=True)
class Segment:
    """A piece of a decode: `steps` forwards that made `tokens` tokens over all rows in `seconds`.

    foreign: share of the machine's CPU time that other processes used meanwhile, 0..1; None where it is not known.
    gaps: seconds from token to token, where the target shows single tokens.
    """

    tokens: int
    steps: int
    seconds: float
    foreign: float | None = None
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One run of one case. ttft: seconds from tokenized prompts to every row's first token."""

    case: Case
    ttft: float
    segments: tuple[Segment, ...]
    ttft_foreign: float | None = None
    bandwidth: float | None = None  # bytes a second, probed just before the run


@dataclass(frozen=True)
class Description:
    """A target once it is loaded.

    weight_bytes: read by one forward, whatever the rows. kv_bytes: of one position of one row, over all layers.
    facts: anything else worth recording, such as versions and formats.
    greedy_bytes: weight_bytes of a greedy step of at most greedy_rows rows, where they are less.
    """

    weight_bytes: int | None = None
    kv_bytes: int | None = None
    load_seconds: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    greedy_bytes: int | None = None
    greedy_rows: int = 0

    def bytes_per_step(self, case: Case) -> float | None:
        """Weights, and each row's cache at half of the decode."""
        if self.weight_bytes is None or self.kv_bytes is None:
            return None
        weights = self.weight_bytes
        if self.greedy_bytes is not None and case.temperature == 0 and case.rows <= self.greedy_rows:
            weights = self.greedy_bytes
        return weights + case.rows * self.kv_bytes * (case.prompt_len + case.new_tokens / 2)


class Target(Protocol):
    """Something that decodes, loaded and warm."""

    def describe(self) -> Description: ...

    def run(self, case: Case) -> Sample: ...


class Unavailable(RuntimeError):
    """A target that cannot be had here: one line that says what to install or give."""
