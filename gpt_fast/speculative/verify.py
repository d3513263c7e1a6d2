"""Speculative decoding: propose cheaply, verify exactly, and stop where it does not pay.

Leviathan et al. (arXiv:2211.17192) and Chen et al. (arXiv:2302.01318): a row's proposals are scored by the target in
one forward, a prefix of them is accepted, and one more token follows, so that the text has the target's own
distribution whatever was proposed.

Shapes: B rows, K proposals of a row, S = K + 1 positions verified, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.request import Request
from gpt_fast.sampling import invert_cdf, on_device, uniform

# Streams of `uniform`: what a position's draws are for. Plain decode, a matched token and the bonus token all use
# SAMPLE, so a row whose proposals are only matched says exactly what plain decode says.
SAMPLE, ACCEPT, RESIDUAL, PROPOSE = 0, 1, 2, 3


# ------------------------------------------------------------------------------------------- verify


class Accepted(NamedTuple):
    accepted_B: Tensor  # int64: how many of the row's proposals were accepted
    next_B: Tensor  # int64: the token that follows them


class Draws(NamedTuple):
    """What a block's randomness is keyed by."""

    seed_B: Tensor  # int64
    position_B: Tensor  # int64: the position of the row's first proposal

    def uniform(self, stream: int, count: int) -> Tensor:
        """float64 [B, count], for positions position_B, position_B + 1, ..."""
        offset = torch.arange(count, device=self.position_B.device)
        return uniform(self.seed_B[:, None], self.position_B[:, None] + offset, stream)


def draws_of(requests: Sequence[Request], device: torch.device) -> Draws:
    """The keys of what comes next in each request."""
    return Draws(on_device([r.seed for r in requests], device), on_device([r.length for r in requests], device))


def verify(p_BSV: Tensor, q_BKV: Tensor, draft_BK: Tensor, count_B: Tensor, draws: Draws) -> Accepted:
    """Exact rejection sampling: accept draft d with probability min(1, p(d)/q(d)), else draw from (p - q)+.

    Args:
        p_BSV: the target's distributions at the S positions (one-hot where the row is greedy).
        q_BKV: the distributions the proposals were drawn from (one-hot for a deterministic proposer).
        count_B: how many of the row's K proposals are real; the rest are padding.
    The accepted tokens and the next one are distributed as if drawn from p one by one. Tensor operations only: no
    host synchronization.
    """
    K = draft_BK.shape[1]
    p_BK = p_BSV[:, :K].gather(2, draft_BK[:, :, None])[:, :, 0]
    q_BK = q_BKV.gather(2, draft_BK[:, :, None])[:, :, 0]
    accepted_B = leading(draws.uniform(ACCEPT, K) * q_BK < p_BK, count_B)
    rows_B = torch.arange(len(draft_BK), device=draft_BK.device)
    p_BV = p_BSV[rows_B, accepted_B]
    q_BV = q_BKV[rows_B, accepted_B.clamp(max=K - 1)]
    rejected_B = accepted_B < count_B
    residual_BV = torch.where(rejected_B[:, None], residual(p_BV, q_BV), p_BV)
    stream_BS = torch.where(rejected_B[:, None], draws.uniform(RESIDUAL, K + 1), draws.uniform(SAMPLE, K + 1))
    return Accepted(accepted_B, invert_cdf(residual_BV, stream_BS[rows_B, accepted_B]))


def residual(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """(p - q)+, not normalized. Where p equals q but for rounding it may be empty; p is then right to that rounding."""
    rest_NV = (p_NV - q_NV).clamp(min=0)
    return torch.where(rest_NV.sum(-1, keepdim=True) > 0, rest_NV, p_NV)


def match(target_BS: Tensor, draft_BK: Tensor, count_B: Tensor) -> Accepted:
    """Accept proposals while they are what the target draws anyway; the next token is the target's next draw.

    Rejection sampling with a one-hot q: draft d is accepted with probability p(d), a rejected one leaves the target's
    other tokens. The text is plain decode's, token for token.
    """
    K = draft_BK.shape[1]
    accepted_B = leading(draft_BK == target_BS[:, :K], count_B)
    return Accepted(accepted_B, target_BS.gather(1, accepted_B[:, None])[:, 0])


def leading(accept_BK: Tensor, count_B: Tensor) -> Tensor:
    """How many of each row's first `count` are accepted before the first rejection."""
    real_BK = torch.arange(accept_BK.shape[1], device=accept_BK.device) < count_B[:, None]
    return (accept_BK & real_BK).long().cumprod(-1).sum(-1)


@dataclass(frozen=True)
class Proposal:
    """The proposals of one step's rows, the first `counts[i]` of row i; the rest is padding.

    q_BKV is None where every row is matched (see `is_matched`). caught_up: tokens a draft had to be fed first.
    """

    draft_BK: Tensor
    counts: list[int]
    q_BKV: Tensor | None = None
    matched_B: Tensor | None = None  # bool, with q_BKV: the rows that are matched all the same
    caught_up: int = 0


def is_matched(request: Request) -> bool:
    """Greedy rows, and seeded ones: the same seed means the same text, whatever is proposed and how much of it."""
    return request.params.temperature == 0 or request.params.seed is not None
