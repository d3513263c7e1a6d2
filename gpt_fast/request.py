"""The nouns that the engine's parts and its users share: a request, a step's plan, its tokens. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpt_fast.config import SamplingParams

NO_TOKEN = -1  # what a runner reports for a row whose logits are not numbers


@dataclass(eq=False)
class Request:
    """What the engine knows of one request. The first `computed` tokens have their keys and values in its slot.

    `drafted` tokens were proposed and verified for it so far, `accepted` of them were accepted. `prompt_logprobs` are
    those of the prompt's tokens behind the first, as far as it is computed, if they were asked for.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    owner: str = ""  # prefixes are shared only between equal owners
    output: list[int] = field(default_factory=list)
    slot: int = -1
    computed: int = 0
    reused: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    arrival: float = field(default_factory=time.monotonic)
    started: float | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop-1 of prompt and output together."""
        n = len(self.prompt)
        return self.prompt[start:stop] + self.output[max(start - n, 0) : max(stop - n, 0)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens of both are equal."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:  # the usual case, and a fast comparison
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of `request` from its `computed` on; `last` when they end the prompt, so one is sampled."""

    request: Request
    count: int
    last: bool


@dataclass(frozen=True)
class PrefixCopy:
    source: int
    target: int
    length: int


@dataclass(frozen=True)
class StepPlan:
    """What one step computes: after slots to zero and copies, chunks and one token for each decoding request.

    `more`: a prompt has tokens left behind it.
    """

    copies: tuple[PrefixCopy, ...]
    chunks: tuple[Chunk, ...]
    decodes: tuple[Request, ...]
    clears: tuple[int, ...] = ()
    more: bool = False

    def __bool__(self) -> bool:
        return bool(self.chunks or self.decodes)


Logprobs = tuple[tuple[int, float], ...]  # (token, logprob): the sampled one first, then the best


@dataclass(frozen=True)
class SampledToken:
    token: int
    logprobs: Logprobs = ()


@dataclass(frozen=True)
class TokenEvent:
    """A sampled token of a request; `finish_reason` ("stop", "length") with its last one.

    Reason "error": the model's logits were not numbers; the token is NO_TOKEN, the answer ends before it.
    """

    request_id: str
    token: int
    finish_reason: str | None = None
    logprobs: Logprobs = ()
