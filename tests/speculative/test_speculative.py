"""verify and match: exact by statistics, edge cases by hand; the controller's promise by simulation.

Sample sizes and alpha: 100,000 texts a case, p > 1e-6, so that a sound build fails once in about 10,000 runs and
each planted fault is caught with probability above 0.999.
"""

import itertools
import math

import pytest
import torch

from gpt_fast.config import SamplingParams
from gpt_fast.measure.significance import chi_square, total_variation
from gpt_fast.request import NO_TOKEN
from gpt_fast.sampling import invert_cdf, probabilities, sample, sampling_tensors, uniform
from gpt_fast.speculative.accept import accept, accept_at_once
from gpt_fast.speculative.verify import SAMPLE, Draws, Proposal, match, verify
from support import speculation as language

N = 100_000


def pair_p_value(p_VV, text_NT, position):
    """Chi-square of the two tokens from `position` on against the language's own probabilities."""
    V, state_V = len(p_VV), torch.nn.functional.one_hot(torch.tensor(0), len(p_VV)).double()
    for _ in range(position + 1):
        state_V = state_V @ p_VV.double()
    pair_N = text_NT[:, position] * V + text_NT[:, position + 1]
    expected_VV = len(text_NT) * state_V[:, None] * p_VV.double()
    return chi_square(torch.bincount(pair_N, minlength=V * V), expected_VV).p_value


def p_value(p_VV, text_NT):
    """The least of: the first token's, the first two tokens', the last two tokens'."""
    first = chi_square(torch.bincount(text_NT[:, 0], minlength=len(p_VV)), len(text_NT) * p_VV[0]).p_value
    return min(first, pair_p_value(p_VV, text_NT, 0), pair_p_value(p_VV, text_NT, text_NT.shape[1] - 2))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_emitted_tokens_have_the_targets_distribution(seed):
    k = (1, 2, 4, 8)[seed % 4]
    p_VV, q_VV = language.tables(seed, 16, sharpness=(0.5, 1, 2, 4)[seed // 4 % 4])
    text_NT = language.texts(p_VV, q_VV, count=N, k=k, length=2)
    assert p_value(p_VV, text_NT) > language.ALPHA
    # 99.9 % of honest samples of this size lie below this for V = 16.
    assert total_variation(torch.bincount(text_NT[:, 0], minlength=16), p_VV[0]) < 0.0067


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bonus_token_and_every_later_round_too(k):
    """The last two of 2k + 3 tokens: reached over accepted blocks, bonus tokens and refusals."""
    p_VV, q_VV = language.tables(100 + k, 8, sharpness=0.7)
    length = 2 * k + 3
    text_NT = language.texts(p_VV, q_VV, count=N, k=k, length=length)
    assert p_value(p_VV, text_NT) > language.ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("fault", language.FAULTS)
def test_planted_faults_are_caught(fault):
    caught = 0
    for seed in range(4):
        p_VV, q_VV = language.tables(seed, 16)
        text_NT = language.texts(p_VV, q_VV, count=N, k=2, length=3, verify=fault)
        caught += p_value(p_VV, text_NT) < language.ALPHA
    assert caught == 4


@pytest.mark.slow
def test_a_draft_drawn_at_another_temperature_than_declared_is_caught():
    for seed in range(4):
        p_VV, q_VV = language.tables(seed, 16)
        hotter_VV = (q_VV.log() / 0.8).softmax(-1)
        text_NT = language.texts(p_VV, q_VV, count=N, k=2, length=3, drawn_from=hotter_VV)
        assert p_value(p_VV, text_NT) < language.ALPHA


@pytest.mark.parametrize("seed", range(6))
def test_acceptance_is_the_overlap_of_p_and_q(seed):
    """Chance to accept each evaluated proposal: the sum of min(p, q) of its context."""
    p_VV, q_VV = language.tables(seed, 16)
    p_VV, q_VV = p_VV[:1].expand(16, 16), q_VV[:1].expand(16, 16)  # the same in every context
    rates = []
    language.texts(p_VV, q_VV, count=N, k=4, length=1, rates=rates)
    _, accepted_N = rates[0]
    overlap = float(torch.minimum(p_VV[0], q_VV[0]).sum())
    for position in range(4):
        evaluated = int((accepted_N >= position).sum())
        accepted = int((accepted_N > position).sum())
        sigma = math.sqrt(overlap * (1 - overlap) / evaluated)
        assert abs(accepted / evaluated - overlap) < 4 * sigma


def block(p, q, draft, *, count=None, seeds=1000):
    """verify over many seeds of one position's p and q: [V], [V], a token."""
    p_BSV = torch.stack((p, torch.full_like(p, 1 / len(p)))).expand(seeds, 2, -1)
    draft_BK = torch.full((seeds, 1), draft)
    count_B = torch.full((seeds,), 1 if count is None else count)
    return verify(p_BSV, q.expand(seeds, 1, -1), draft_BK, count_B, Draws(torch.arange(seeds), torch.full((seeds,), 5)))


def one_hot(token, vocab=4):
    return torch.nn.functional.one_hot(torch.tensor(token), vocab).float()


def test_edge_cases_of_p_and_q():
    half = torch.tensor([0.5, 0.5, 0, 0])
    other = torch.tensor([0, 0, 0.25, 0.75])
    assert block(half, half, 0).accepted_B.all()  # equal: always accepted
    disjoint = block(half, other, 3)
    assert not disjoint.accepted_B.any() and set(disjoint.next_B.tolist()) == {0, 1}
    greedy = block(one_hot(2), one_hot(2), 2)  # temperature 0, the draft agrees
    assert greedy.accepted_B.all()
    refused = block(one_hot(2), one_hot(1), 1)  # temperature 0, it does not
    assert not refused.accepted_B.any() and (refused.next_B == 2).all()
    tiny = block(torch.tensor([1e-30, 1.0, 0, 0]), torch.tensor([1.0, 0, 0, 0]), 0)  # p is tiny at q's mode
    assert not tiny.accepted_B.any() and (tiny.next_B == 1).all()
    padding = block(half, one_hot(0), 0, count=0)  # a row without proposals draws from its first p
    assert not padding.accepted_B.any() and set(padding.next_B.tolist()) == {0, 1}


def test_a_residual_that_rounds_to_nothing_is_p_not_nan():
    p = torch.tensor([0.25, 0.25, 0.25, 0.25])
    q = p * (1 + 2**-22)  # above p everywhere by rounding
    found = block(p, q, 1, seeds=2_000_000 // 4)
    refused_B = found.accepted_B == 0
    assert bool(((found.next_B >= 0) & (found.next_B < 4)).all())
    assert int(refused_B.sum()) < 10
    nan = block(p, torch.full((4,), float("nan")), 1)  # an overflowed draft: refused, and p drawn from
    assert not nan.accepted_B.any() and set(nan.next_B.tolist()) == {0, 1, 2, 3}


def random_block(B, K, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_BSV = torch.randn(B, K + 1, V, generator=generator) * 3
    q_BKV = (logits_BSV[:, :K] + torch.randn(B, K, V, generator=generator)).softmax(-1)
    draft_BK = torch.multinomial(q_BKV.view(B * K, V), 1, generator=generator).view(B, K)
    count_B = torch.randint(0, K + 1, (B,), generator=generator)
    return logits_BSV, q_BKV, draft_BK, count_B, Draws(torch.arange(B) + 40, torch.arange(B) * 3 + 2)


def test_a_row_of_a_ragged_batch_is_the_row_alone():
    logits_BSV, q_BKV, draft_BK, count_B, draws = random_block(32, 5, 50)
    p_BSV = logits_BSV.softmax(-1)
    together = verify(p_BSV, q_BKV, draft_BK, count_B, draws)
    for i in range(32):
        row, count = slice(i, i + 1), max(int(count_B[i]), 1)
        alone = verify(
            p_BSV[row, : count + 1],
            q_BKV[row, :count],
            draft_BK[row, :count],
            count_B[row],
            Draws(draws.seed_B[row], draws.position_B[row]),
        )
        assert (alone.accepted_B, alone.next_B) == (together.accepted_B[row], together.next_B[row])
        assert int(alone.accepted_B) <= int(count_B[i])


def test_matched_rows_say_what_plain_decode_says():
    """Whatever is proposed: every accepted token and the next one are the plain draws at their positions."""
    kinds = itertools.product((0.0, 0.7, 1.5), (0, 5), (1.0, 0.8))
    rows = [SamplingParams(temperature=t, top_k=k, top_p=p) for t, k, p in kinds]
    logits_BSV, _, draft_BK, count_B, draws = random_block(len(rows), 4, 50)
    params = sampling_tensors(rows, torch.device("cpu"))
    found = accept(logits_BSV, params, Proposal(draft_BK, count_B.tolist()), draws)
    for i, row in enumerate(rows):
        one = sampling_tensors([row], torch.device("cpu"))
        seed, position = draws.seed_B[i : i + 1], draws.position_B[i : i + 1]
        plain = [int(sample(logits_BSV[i, j : j + 1], one, uniform(seed, position + j))) for j in range(5)]
        accepted = int(found.accepted_B[i])
        assert draft_BK[i, :accepted].tolist() == plain[:accepted] and int(found.next_B[i]) == plain[accepted]
        assert accepted == count_B[i] or draft_BK[i, accepted] != plain[accepted]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.0, top_p=0.7),
        SamplingParams(temperature=0.8, min_p=0.1),
    ],
)
def test_judge_is_exact_at_every_kind_of_sampling(params):
    """One context, drawn N times: the first token has the distribution the plain sampler draws from."""
    generator = torch.Generator().manual_seed(3)
    logits_V = torch.randn(12, generator=generator) * 2
    draft_V = logits_V + torch.randn(12, generator=generator)
    one = sampling_tensors([params], torch.device("cpu"))
    p_V, q_V = probabilities(logits_V[None], one)[0], probabilities(draft_V[None], one)[0]
    draws = Draws(torch.arange(N), torch.full((N,), 9))
    draft_BK = invert_cdf(q_V.expand(N, -1), draws.uniform(3, 1)[:, 0])[:, None]
    proposal = Proposal(draft_BK, [1] * N, q_V.expand(N, 1, -1), torch.zeros(N, dtype=torch.bool))
    flat = sampling_tensors([params], torch.device("cpu")).of(torch.zeros(N, dtype=torch.int64))
    accepted_B, next_B = accept(logits_V.expand(N, 2, -1), flat, proposal, draws)
    first_B = torch.where(accepted_B > 0, draft_BK[:, 0], next_B)
    assert chi_square(torch.bincount(first_B, minlength=12), N * p_V).p_value > language.ALPHA


def test_a_seeded_row_is_matched_beside_rows_that_are_not():
    """One step of a greedy, a seeded and an unseeded row: the first two say what plain decode says."""
    logits_BSV, q_BKV, draft_BK, _, draws = random_block(3, 4, 50)
    rows = [SamplingParams(), SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=1.0)]
    params = sampling_tensors(rows, torch.device("cpu"))
    matched_B = torch.tensor([True, True, False])
    mixed = accept(logits_BSV, params, Proposal(draft_BK, [4, 4, 4], q_BKV, matched_B), draws)
    plain = accept(logits_BSV, params, Proposal(draft_BK, [4, 4, 4]), draws)
    assert mixed.next_B[:2].tolist() == plain.next_B[:2].tolist()
    assert mixed.accepted_B[:2].tolist() == plain.accepted_B[:2].tolist()
    p_BSV = probabilities(logits_BSV[2], params.of(torch.full((5,), 2)))[None]
    alone = verify(p_BSV, q_BKV[2:], draft_BK[2:], torch.tensor([4]), Draws(draws.seed_B[2:], draws.position_B[2:]))
    assert (int(mixed.accepted_B[2]), int(mixed.next_B[2])) == (int(alone.accepted_B), int(alone.next_B))


def test_drawing_in_turn_is_drawing_at_once():
    """What the CPU does against what a GPU does: rows of every length, some ill, some greedy."""
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5, min_p=0.01),
        SamplingParams(temperature=1.0, top_p=0.8),
    ]
    for seed in range(8):
        logits_BSV, _, draft_BK, _, draws = random_block(12, 4, 20)
        logits_BSV = logits_BSV * 3 + torch.randn(20, generator=torch.Generator().manual_seed(seed)) * 3
        logits_BSV[5, 1] = float("nan")
        params = sampling_tensors(kinds * 3, torch.device("cpu"))
        S = logits_BSV.shape[1]
        flat_NV, uniform_N = logits_BSV.flatten(0, 1), draws.uniform(SAMPLE, S).flatten()
        target_BS = sample(flat_NV, params.of(torch.arange(12).repeat_interleave(S)), uniform_N).view(12, S)
        stands = torch.rand(12, 4, generator=torch.Generator().manual_seed(seed)) < 0.7
        draft_BK = torch.where(stands & (target_BS[:, :4] >= 0), target_BS[:, :4], draft_BK)
        counts = [i % 5 for i in range(12)]
        at_once = match(target_BS, draft_BK, torch.tensor(counts))
        in_turn = accept(logits_BSV, params, Proposal(draft_BK, counts), draws)
        assert torch.equal(in_turn.accepted_B, at_once.accepted_B) and torch.equal(in_turn.next_B, at_once.next_B)
        assert in_turn.accepted_B.max() > 1


@pytest.mark.parametrize("seed", range(6))
def test_refusing_in_turn_is_refusing_at_once(seed):
    """Sampled, seeded, greedy and ill rows, with drafts that stand often or seldom: one answer on CPU and GPU."""
    kinds = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=2),
        SamplingParams(temperature=1.0, top_p=0.8),
    ]
    rows = kinds * 8
    logits_BSV, _, draft_BK, _, draws = random_block(len(rows), 4, 20)
    generator = torch.Generator().manual_seed(seed)
    logits_BSV = logits_BSV + torch.randn(20, generator=generator) * 3
    logits_BSV[5, 1] = logits_BSV[7, 0] = float("nan")
    params = sampling_tensors(rows, torch.device("cpu"))
    near_BKV = logits_BSV[:, :4].nan_to_num() + torch.randn(len(rows), 4, 20, generator=generator) * (seed / 4)
    q_BKV = near_BKV.softmax(-1)
    draft_BK = invert_cdf(q_BKV.flatten(0, 1), torch.rand(len(rows) * 4, generator=generator).double()).view(-1, 4)
    matched_B = torch.tensor([p.temperature == 0 or p.seed is not None for p in rows])
    proposal = Proposal(draft_BK, [i % 5 for i in range(len(rows))], q_BKV, matched_B)
    in_turn, whole = accept(logits_BSV, params, proposal, draws), accept_at_once(logits_BSV, params, proposal, draws)
    assert in_turn.accepted_B.tolist() == whole.accepted_B.tolist()
    assert in_turn.next_B.tolist() == whole.next_B.tolist()
    assert 0 < int(whole.accepted_B.sum()) < sum(proposal.counts)


def test_logits_that_are_not_numbers_end_the_block_there():
    logits_BSV, q_BKV, draft_BK, _, draws = random_block(2, 3, 20)
    logits_BSV[:, 0] = -50.0
    logits_BSV[:, 0].scatter_(1, draft_BK[:, :1], 50.0)  # the first proposal is certain
    logits_BSV[:, 1] = float("nan")
    params = sampling_tensors([SamplingParams(temperature=1.0)] * 2, torch.device("cpu"))
    q_BKV[:, 0] = torch.nn.functional.one_hot(draft_BK[:, 0], 20).float()
    found = accept(logits_BSV, params, Proposal(draft_BK, [3, 3], q_BKV, torch.tensor([True, False])), draws)
    assert found.accepted_B.tolist() == [1, 1] and found.next_B.tolist() == [NO_TOKEN, NO_TOKEN]


def test_match_counts_the_leading_run_only():
    target_BS = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    draft_BK = torch.tensor([[1, 2, 3], [9, 2, 3], [1, 9, 3], [1, 2, 3]])
    found = match(target_BS, draft_BK, torch.tensor([3, 3, 3, 1]))
    assert found.accepted_B.tolist() == [3, 0, 1, 1] and found.next_B.tolist() == [4, 1, 2, 2]
