"""What a proposer is: it offers tokens for rows, proposes them, and learns what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gpt_fast.request import PrefixCopy, Request
from gpt_fast.speculative.verify import Proposal


class Offer(NamedTuple):
    """What a proposer could do for a row: propose up to `limit` tokens.

    kind: class of proposals whose acceptance is learned apart. behind: tokens that the proposer must be fed first.
    kind_if_expected: the class of its proposals one token later, if that token is the one it expects, without which it
    has none; None: it can propose whatever comes (a draft model).
    """

    limit: int
    kind: int = 0
    behind: int = 0
    kind_if_expected: int | None = None


class Proposer(Protocol):
    """Who proposes inherits from it; what does not concern a proposer, it leaves out."""

    def offers(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Offer]:
        """One a row; limits are how many proposals the row could use."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> Proposal:
        """At most counts[i] tokens for row i, within its offer."""

    def learn(self, requests: Sequence[Request], accepted: Sequence[int]) -> None:
        """How many of the last proposals were accepted."""
        return None

    def copied(self, copy: PrefixCopy) -> None:
        """The target's cache copied a prefix between slots."""
        return None

    def ended(self, request: Request) -> None:
        """It will not be asked about again."""
        return None

    def forget_slots(self) -> None:
        """Nothing that slots hold may serve another request."""
        return None
