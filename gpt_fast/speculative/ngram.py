"""Prompt lookup: n-grams of the request's own tokens propose what followed them last time.

Shapes: B rows, K proposals of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from gpt_fast.request import Request
from gpt_fast.sampling import on_device
from gpt_fast.speculative.proposer import Offer, Proposer
from gpt_fast.speculative.verify import Proposal


class NGramIndex:
    """A request's tokens and where each token and each pair of neighbours ended; grows in O(1) a token.

    pairs[pair] is the newest end of a pair and before[end] the one before it (0: none): plain integers, which give
    the garbage collector nothing to look through.
    """

    LOOKED_AT = 16  # candidates, most recent first
    LONGEST = 32  # a longer match says no more

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pairs: dict[int, int] = {}
        self.before: list[int] = [0, 0]
        self.singles: dict[int, int] = {}
        self.single = 0  # where the last token ended the time before; 0: it is new

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self.tokens.append(token)
            end = len(self.tokens)
            self.single = self.singles.get(token, 0)
            self.singles[token] = end
            if end > 1:
                pair = self.tokens[-2] << 32 | token
                self.before.append(self.pairs.get(pair, 0))
                self.pairs[pair] = end

    def propose(self, count: int) -> tuple[list[int], int]:
        """What followed the most recent of the longest matches of the last tokens, and the match's length.

        A match that reaches the end itself (a loop) goes on periodically. ([], 0) when the last token is new.
        """
        best, length = self.single, int(self.single > 0)
        end = self.before[len(self.tokens)] if best else 0
        for _ in range(self.LOOKED_AT):
            if not end or length == self.LONGEST:
                break
            if (matched := self._matched(end)) > length:
                best, length = end, matched
            end = self.before[end]
        period = len(self.tokens) - best
        return [self.tokens[best + i % period] for i in range(count)] if best else [], length

    def _matched(self, end: int) -> int:
        length = 2
        while length < min(self.LONGEST, end) and self.tokens[end - length - 1] == self.tokens[-length - 1]:
            length += 1
        return length


class NGramProposer(Proposer):
    """Prompt lookup (Saxena, github.com/apoorvumang/prompt-lookup-decoding): what followed last time follows again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.indices: dict[Request, NGramIndex] = {}
        self.found: dict[Request, list[int]] = {}

    def offers(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Offer]:
        offers, self.found = [], {}
        for request, limit in zip(requests, limits, strict=True):
            index = self.indices.setdefault(request, NGramIndex())
            index.extend(request.tokens(len(index.tokens), request.length))
            tokens, length = index.propose(limit)
            self.found[request] = tokens
            # Lengths 1, 2-3, 4-7, 8-15, ...
            offers.append(Offer(len(tokens), kind=length.bit_length(), kind_if_expected=(length + 1).bit_length()))
        return offers

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> Proposal:
        K = max(counts)
        found = [self.found[r][:count] for r, count in zip(requests, counts, strict=True)]
        rows = [tokens + [0] * (K - len(tokens)) for tokens in found]
        return Proposal(on_device(rows, self.device), list(counts))

    def ended(self, request: Request) -> None:
        self.indices.pop(request, None)
