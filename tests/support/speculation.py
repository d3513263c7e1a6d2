"""A language small enough to test against exactly: the next token depends on the last one only.

Shapes: N texts, K proposals, V vocabulary.
"""

import torch

from gpt_fast.sampling import invert_cdf
from gpt_fast.speculative.verify import PROPOSE, Accepted, Draws, leading, verify

ALPHA = 1e-6


def tables(seed, vocab, *, sharpness=2.0):
    """Random target and draft: P[a], Q[a] are the distributions after token a."""
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(vocab, vocab, generator=generator) * sharpness).softmax(-1)
    q = (torch.randn(vocab, vocab, generator=generator) * sharpness).softmax(-1)
    return p, (p * q).sqrt() / (p * q).sqrt().sum(-1, keepdim=True)


def texts(p_VV, q_VV, *, count, k, length, verify=verify, drawn_from=None, rates=None):
    """`count` texts of `length` tokens after token 0, by rounds of k proposals and verify: int64 [N, length].

    drawn_from: what the draft really draws from (default: the q it declares). rates: a list that gets each round's
    (counts, accepted).
    """
    drawn_from = q_VV if drawn_from is None else drawn_from
    rows_N = torch.arange(count)
    text_NT = torch.zeros(count, length + k + 1, dtype=torch.int64)
    end_N = torch.ones(count, dtype=torch.int64)  # token 0 stands at position 0
    while int(end_N.min()) <= length:
        draws = Draws(rows_N * 1009 + 7, end_N)
        block = [text_NT[rows_N, end_N - 1]]
        uniform_NK = draws.uniform(PROPOSE, k)
        for i in range(k):
            block.append(invert_cdf(drawn_from[block[-1]], uniform_NK[:, i]))
        block_NS = torch.stack(block, 1)
        # A finished text goes on in a scratch tail, so that rows stay together.
        found = verify(p_VV[block_NS], q_VV[block_NS[:, :k]], block_NS[:, 1:], torch.full((count,), k), draws)
        if rates is not None:
            rates.append((end_N.clone(), found.accepted_B))
        out_NS = torch.cat((block_NS[:, 1:], block_NS[:, :1]), 1).scatter(
            1, found.accepted_B[:, None], found.next_B[:, None]
        )
        live_N = end_N <= length
        for i in range(k + 1):
            writes_N = live_N & (i <= found.accepted_B) & (end_N + i <= length)
            text_NT[rows_N[writes_N], end_N[writes_N] + i] = out_NS[writes_N, i]
        end_N = torch.where(live_N, end_N + found.accepted_B + 1, end_N)
    return text_NT[:, 1 : length + 1]


# ------------------------------------------------------------------------------------------ faults


def residual_not_used(p_BSV, q_BKV, draft_BK, count_B, draws):
    """After a refusal the next token comes from p, not from (p - q)+."""
    accepted_B, _ = verify(p_BSV, q_BKV, draft_BK, count_B, draws)
    p_BV = p_BSV[torch.arange(len(p_BSV)), accepted_B]
    return Accepted(accepted_B, invert_cdf(p_BV, draws.uniform(2, 9)[torch.arange(len(p_BSV)), accepted_B]))


def wrong_q(p_BSV, q_BKV, draft_BK, count_B, draws):
    """The ratio is taken with another position's q."""
    return verify(p_BSV, q_BKV.flip(1) if q_BKV.shape[1] > 1 else q_BKV.square(), draft_BK, count_B, draws)


def ratio_swapped(p_BSV, q_BKV, draft_BK, count_B, draws):
    """Accepts with probability q/p."""
    K = draft_BK.shape[1]
    p_BK = p_BSV[:, :K].gather(2, draft_BK[:, :, None])[:, :, 0]
    q_BK = q_BKV.gather(2, draft_BK[:, :, None])[:, :, 0]
    swapped_B = leading(draws.uniform(1, K) * p_BK < q_BK, count_B)
    rows = torch.arange(len(p_BSV))
    p_BV, q_BV = p_BSV[rows, swapped_B], q_BKV[rows, swapped_B.clamp(max=K - 1)]
    residual_BV = torch.where((swapped_B < count_B)[:, None], (p_BV - q_BV).clamp(min=0), p_BV)
    return Accepted(swapped_B, invert_cdf(residual_BV, draws.uniform(2, K + 1)[rows, swapped_B]))


def bonus_dropped(p_BSV, q_BKV, draft_BK, count_B, draws):
    """Of a fully accepted block and its bonus token, one token is lost."""
    accepted_B, next_B = verify(p_BSV, q_BKV, draft_BK, count_B, draws)
    return Accepted(torch.where(accepted_B == count_B, (accepted_B - 1).clamp(min=0), accepted_B), next_B)


FAULTS = [residual_not_used, wrong_q, ratio_swapped, bonus_dropped]
