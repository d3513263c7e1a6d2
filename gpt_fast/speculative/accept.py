"""Accept or reject each row's proposals: exact match for greedy and seeded rows, rejection sampling for the rest, mixed
freely in one batch.

Shapes: B rows, K proposals of a row, S = K + 1 positions verified, V vocabulary, N = B * S,
L rows whose proposals were all accepted so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.request import NO_TOKEN
from gpt_fast.sampling import SamplingTensors, invert_cdf, normalized, on_device, sample, weights
from gpt_fast.speculative.verify import ACCEPT, RESIDUAL, SAMPLE, Accepted, Draws, Proposal, match, residual, verify


def accept(
    logits_BSV: Tensor,
    params: SamplingTensors | None,
    proposal: Proposal,
    draws: Draws,
    best_BS: Tensor | None = None,
) -> Accepted:
    """How many of each row's proposals are accepted, and the token after them; K = 0 is plain decode.

    params: as `sampling_tensors` gives them for the B rows. best_BS: the logits' argmax where it is on the host,
    NO_TOKEN where none is finite.
    """
    if params is None and best_BS is not None:
        return match_best(best_BS, proposal)
    if params is not None and logits_BSV.device.type == "cpu":
        return accept_in_turn(logits_BSV, params, proposal, draws)
    return accept_at_once(logits_BSV, params, proposal, draws)


def accept_at_once(logits_BSV: Tensor, params: SamplingTensors | None, proposal: Proposal, draws: Draws) -> Accepted:
    """`accept` without a look at any result before the last: for a device that must not be waited for."""
    B, S, V = logits_BSV.shape
    flat = None if params is None else params.of(torch.arange(B, device=logits_BSV.device).repeat_interleave(S))
    count_B = on_device(proposal.counts, logits_BSV.device)
    logits_NV = logits_BSV.reshape(B * S, V)
    weight_NV = None if flat is None else weights(logits_NV, flat)
    uniform_N = None if flat is None else draws.uniform(SAMPLE, S).flatten()
    target_BS = sample(logits_NV, flat, uniform_N, weight_NV).view(B, S)
    matched = match(target_BS, proposal.draft_BK, count_B)
    if proposal.q_BKV is None or proposal.matched_B is None or weight_NV is None:
        return matched
    p_BSV = normalized(weight_NV).view(B, S, V)
    accepted_B, next_B = verify(p_BSV, proposal.q_BKV, proposal.draft_BK, count_B, draws)
    ill_B = target_BS.gather(1, accepted_B[:, None])[:, 0] == NO_TOKEN
    next_B = torch.where(ill_B, NO_TOKEN, next_B)
    exact_B = proposal.matched_B  # greedy rows among them: their p_BSV is that of temperature 1
    return Accepted(torch.where(exact_B, matched.accepted_B, accepted_B), torch.where(exact_B, matched.next_B, next_B))


def accept_in_turn(logits_BSV: Tensor, params: SamplingTensors, proposal: Proposal, draws: Draws) -> Accepted:
    """`accept`, computing a position only where all proposals before it were accepted.

    Where looking at a result costs nothing (the CPU), a token then costs little more sampling than in plain decode.
    """
    B, S, _ = logits_BSV.shape
    accepted_B, next_B = torch.zeros(2, B, dtype=torch.int64)
    count_B, live_L = torch.tensor(proposal.counts), torch.arange(B)
    for i in range(S):
        token_L, accepted_L = accept_position(logits_BSV, params, proposal, draws, live_L, i, count_B[live_L] > i)
        next_B[live_L] = token_L
        live_L = live_L[accepted_L]
        accepted_B[live_L] += 1
        if not len(live_L):
            break
    return Accepted(accepted_B, next_B)


def accept_position(
    logits_BSV: Tensor,
    params: SamplingTensors,
    proposal: Proposal,
    draws: Draws,
    live_L: Tensor,
    i: int,
    more_L: Tensor,
) -> tuple[Tensor, Tensor]:
    """The token that ends each live row's block here, and which rows' i-th proposal is accepted instead.

    more_L: which rows have an i-th proposal.
    """
    logits_LV, own = logits_BSV[live_L, i], params.of(live_L)
    weight_LV = weights(logits_LV, own)
    token_L, sampled_L, fits_L = torch.zeros_like(live_L), torch.zeros_like(more_L), torch.zeros_like(more_L)
    p_LV = q_LV = weight_LV
    drafted_L = proposal.draft_BK[live_L, i] if bool(more_L.any()) else token_L
    if proposal.q_BKV is not None and proposal.matched_B is not None and bool(more_L.any()):
        sampled_L = more_L & ~proposal.matched_B[live_L]
        p_LV, q_LV, at_L1 = normalized(weight_LV), proposal.q_BKV[live_L, i], drafted_L[:, None]
        accept_L = draws.uniform(ACCEPT, i + 1)[live_L, i]
        fits_L = sampled_L & (accept_L * q_LV.gather(1, at_L1)[:, 0] < p_LV.gather(1, at_L1)[:, 0])
    if not bool(fits_L.all()):
        token_L = sample(logits_LV, own, draws.uniform(SAMPLE, i + 1)[live_L, i], weight_LV)
    rejected_L = sampled_L & ~fits_L
    if bool(rejected_L.any()):
        instead_L = invert_cdf(residual(p_LV, q_LV), draws.uniform(RESIDUAL, i + 1)[live_L, i])
        token_L = torch.where(rejected_L & (token_L != NO_TOKEN), instead_L, token_L)
    return token_L, torch.where(sampled_L, fits_L, more_L & (token_L == drafted_L))


def match_best(best_BS: Tensor, proposal: Proposal) -> Accepted:
    """`match` of greedy rows on the CPU, where a dozen operators on a few numbers take longer than a loop."""
    accepted, following = [], []
    for best, draft, count in zip(best_BS.tolist(), proposal.draft_BK.tolist(), proposal.counts, strict=True):
        length = next((i for i in range(count) if draft[i] != best[i]), count)
        accepted.append(length)
        following.append(best[length])
    return Accepted(torch.tensor(accepted), torch.tensor(following))
