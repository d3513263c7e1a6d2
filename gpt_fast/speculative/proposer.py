"""What a proposer is: it offers tokens for rows, proposes them, and learns what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gpt_fast.request import PrefixCopy, Request
from gpt_fast.speculative.verify import Proposal


class Offer(NamedTuple):
    """What a proposer could do for a row: up to `limit` tokens, of a `kind` whose acceptance is learned apart, after
    first computing `lag` tokens it has not seen. then: the kind it will have if the next token is the one it expects,
    None: it can propose whatever comes."""

    limit: int
    kind: int = 0
    lag: int = 0
    then: int | None = None


class Proposer(Protocol):
    def offers(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Offer]:
        """One a row; limits are how many proposals the row could use."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> Proposal:
        """At most counts[i] tokens for row i, within its offer."""

    def learn(self, requests: Sequence[Request], accepted: Sequence[int]) -> None:
        """How many of the last proposals stood."""

    def copied(self, copy: PrefixCopy) -> None:
        """The target's cache copied a prefix between slots."""
