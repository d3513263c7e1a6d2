"""Sampling against a slow, obvious reference: Python floats, one row, sort and add.

Shapes: B rows, V vocabulary.
"""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from gpt_fast.config import SamplingParams
from gpt_fast.sampling import (
    CANDIDATES,
    edit_logits,
    invert_cdf,
    needs_edit,
    probabilities,
    sample,
    sampling_tensors,
    uniform,
)
from support.examples import examples

CPU = torch.device("cpu")
SMALLEST_STEP = 2.0**-53


def tensors(*params):
    return sampling_tensors(params, CPU)


# ------------------------------------------------------------------------------- the reference


def reference_probabilities(logits, params, *, edge=1e-6):
    """The distribution of one row, and whether it is certain: not, when top_p or min_p is met within rounding."""
    if params.temperature == 0:
        best = logits.index(max(logits))
        return [float(i == best) for i in range(len(logits))], True
    top = max(logits)
    weights = [math.exp((x - top) / params.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    kept = order[: params.top_k] if params.top_k else order
    certain, total = True, sum(weights[i] for i in kept)
    if params.top_p < 1:
        nucleus, mass = [], 0.0
        for i in kept:
            certain &= not nucleus or abs(mass / total - params.top_p) > edge
            if nucleus and mass / total >= params.top_p:
                break
            nucleus.append(i)
            mass += weights[i]
        kept = nucleus
    certain &= all(abs(weights[i] - params.min_p) > edge * params.min_p for i in kept) or params.min_p in (0.0, 1.0)
    kept = [i for i in kept if weights[i] >= params.min_p]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in set(kept) else 0.0 for i in range(len(logits))], certain


def any_params(**fixed):
    options = dict(
        temperature=st.sampled_from([0, 0.01, 0.5, 1.0, 1.7, 100.0]),
        top_k=st.sampled_from([0, 1, 2, 5, 50, 10**7]),
        top_p=st.sampled_from([1e-30, 0.1, 0.5, 0.9, 0.999, 1.0]) | st.floats(0.01, 1.0),
        min_p=st.sampled_from([0.0, 1e-4, 0.05, 0.5, 1.0]),
    )
    return st.builds(SamplingParams, **{**options, **fixed})


@st.composite
def any_logits(draw, size):
    """A row of logits: spread, peaked, full of ties, or with tokens ruled out."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["spread", "peaked", "ties", "flat", "ruled out"]))
    if kind == "flat":
        return [0.5] * size
    row = [rng.gauss(0, 8.0 if kind == "peaked" else 1.5) for _ in range(size)]
    if kind == "ties":
        row = [float(round(x)) for x in row]
    if kind == "ruled out":
        row = [x if rng.random() < 0.3 else -math.inf for x in row]
        row[rng.randrange(size)] = 1.0
    return torch.tensor(row, dtype=torch.float32).tolist()


@st.composite
def any_rows(draw, sizes=(1, 2, 7, 40)):
    size = draw(st.sampled_from(sizes))
    count = draw(st.integers(1, 5))
    rows = [draw(any_logits(size)) for _ in range(count)]
    return torch.tensor(rows), [draw(any_params()) for _ in range(count)]


# ------------------------------------------------------------------------------ probabilities


@given(case=any_rows())
@examples(400)
def test_probabilities_equal_the_reference(case):
    logits_BV, params = case
    stacked = tensors(*params)
    if stacked is None:
        assert all(p.temperature == 0 for p in params)
        return
    actual_BV = probabilities(logits_BV, stacked)
    torch.testing.assert_close(actual_BV.sum(-1), torch.ones(len(params)), atol=1e-5, rtol=0)
    for row, p, logits in zip(actual_BV, params, logits_BV.tolist(), strict=True):
        expected, certain = reference_probabilities(logits, p)
        if certain:
            assert row.tolist() == pytest.approx(expected, abs=1e-5), p
            assert [x > 0 for x in row.tolist()] == [torch.tensor(x).item() > 0 for x in expected], p


@given(case=any_rows(), noise=st.integers(0, 1000))
@examples(200)
def test_a_row_does_not_depend_on_its_neighbours(case, noise):
    """Bit for bit, whatever the neighbours hold and ask for, NaN included."""
    logits_BV, params = case
    params = [p if p.temperature else SamplingParams(temperature=1.0) for p in params]
    other = torch.randn(logits_BV.shape, generator=torch.Generator().manual_seed(noise)) * 3
    other[0] = float("nan") if noise % 3 == 0 else other[0]
    strangers = [SamplingParams(temperature=0.9, top_p=0.6), SamplingParams(), SamplingParams(temperature=1.0, top_k=3)]
    for i in range(len(params)):
        alone = probabilities(logits_BV[i : i + 1], tensors(params[i]))[0]
        company_BV = torch.cat((other, logits_BV[i : i + 1]))
        company = [strangers[(noise + j) % 3] for j in range(len(other))] + [params[i]]
        assert torch.equal(probabilities(company_BV, tensors(*company))[-1], alone)


VOCABULARY = 3 * CANDIDATES[-1]


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_more_candidates_than_are_sorted_at_first(spread):
    """Nuclei wider than CANDIDATES, beside narrow ones and a top_k above it: all equal the reference and themselves."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(5, VOCABULARY, generator=generator) * spread
    params = [
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, top_k=2 * CANDIDATES[1], top_p=0.95),
        SamplingParams(temperature=0.7, top_k=CANDIDATES[0] + 1),
        SamplingParams(temperature=1.3),
    ]
    together_BV = probabilities(logits_BV, tensors(*params))
    for i, p in enumerate(params):
        expected, _ = reference_probabilities(logits_BV[i].tolist(), p)
        kept = sum(x > 0 for x in expected)
        assert abs(int((together_BV[i] > 0).sum()) - kept) <= 1  # within rounding of top_p
        assert together_BV[i].tolist() == pytest.approx(expected, abs=1e-6)
        assert torch.equal(together_BV[i], probabilities(logits_BV[i : i + 1], tensors(p))[0])


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-38, 1e-6, 1e-3, 100.0])
def test_extreme_temperatures_stay_finite(temperature):
    logits_BV = torch.tensor([[30.0, -50.0, 29.0, -math.inf], [-3.0, -2.0, -4.0, -2.0], [1e4, -1e4, 0.0, 1e30]])
    params = [SamplingParams(temperature=temperature, top_p=0.9)] * 3
    probs_BV = probabilities(logits_BV, tensors(*params))
    assert probs_BV.isfinite().all()
    torch.testing.assert_close(probs_BV.sum(-1), torch.ones(3))
    if temperature <= 1e-3:
        assert probs_BV.argmax(-1).tolist() == [0, 1, 3]


def test_greedy_rows_take_the_first_best_token():
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 1.0, 2.0]])
    assert sample(logits_BV, None, torch.zeros(2, dtype=torch.float64)).tolist() == [1, 0]
    mixed = tensors(SamplingParams(), SamplingParams(temperature=1.0, top_k=1))
    for u in (0.0, 0.5, 1 - SMALLEST_STEP):
        assert sample(logits_BV, mixed, torch.full((2,), u, dtype=torch.float64)).tolist() == [1, 0]
    assert probabilities(logits_BV, mixed).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]


# -------------------------------------------------------------------------------- inverting


@given(case=any_rows(sizes=(1, 3, 40, 3000)), u=st.sampled_from([0.0, 5e-324, 0.3, 0.999999, 1 - SMALLEST_STEP]))
@examples(200)
def test_a_token_of_probability_zero_is_never_drawn(case, u):
    logits_BV, params = case
    params = [*params, SamplingParams(temperature=1.0)]
    logits_BV = torch.cat((logits_BV, logits_BV[:1]))
    probs_BV = probabilities(logits_BV, tensors(*params))
    token_B = invert_cdf(probs_BV, torch.full((len(params),), u, dtype=torch.float64))
    assert (probs_BV.gather(1, token_B[:, None]) > 0).all()


def test_inverting_meets_every_boundary():
    probs_BV = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    draws = {0.0: 1, 0.25 - SMALLEST_STEP: 1, 0.25: 3, 0.75 - SMALLEST_STEP: 3, 0.75: 4, 1 - SMALLEST_STEP: 4}
    for u, token in draws.items():
        assert invert_cdf(probs_BV, torch.tensor([u], dtype=torch.float64)).item() == token


def chi_square_passes(observed, expected):
    """Pearson's test at about 1e-6 (Wilson-Hilferty's normal approximation); small cells are merged."""
    cells, rest = [], [0.0, 0.0]
    for o, e in zip(observed, expected, strict=True):
        if e >= 5:
            cells.append((o, e))
        else:
            rest = [rest[0] + o, rest[1] + e]
    cells += [tuple(rest)] if rest[1] >= 5 else []
    degrees = len(cells) - 1
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    z = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return z < 4.75


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.5, top_k=6),
        SamplingParams(temperature=1.0, top_p=0.8),
        SamplingParams(temperature=1.2, min_p=0.1),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(p):
    """100,000 draws at successive positions of one seed, as a request makes them."""
    draws, vocab = 100_000, 16
    logits_V = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    expected, certain = reference_probabilities(logits_V.tolist(), p)
    assert certain
    uniform_B = uniform(torch.full((draws,), 1234), torch.arange(draws))
    tokens = invert_cdf(probabilities(logits_V[None], tensors(p)).expand(draws, -1), uniform_B)
    observed = torch.bincount(tokens, minlength=vocab).tolist()
    assert all(o == 0 for o, e in zip(observed, expected, strict=True) if e == 0)
    assert chi_square_passes(observed, [draws * e for e in expected])
    wrong = [draws * e for e in reference_probabilities([x / 1.1 for x in logits_V.tolist()], p)[0]]
    assert not chi_square_passes(observed, wrong)  # the test has the power to see a temperature off by a tenth


# ---------------------------------------------------------------------------------- uniforms


def cells(uniform_B, count):
    return torch.bincount((uniform_B * count).long(), minlength=count).tolist()


N = 200_000
ARANGE = torch.arange(N)
STREAMS = {
    "positions of a seed": (torch.full((N,), 7), ARANGE, 0),
    "positions of seed 0": (torch.zeros(N, dtype=torch.int64), ARANGE, 0),
    "seeds at a position": (ARANGE, torch.full((N,), 5), 0),
    "negative seeds": (-ARANGE, torch.full((N,), 5), 0),
    "huge seeds": ((1 << 63) - 1 - ARANGE, torch.full((N,), 5), 0),
    "another stream": (torch.full((N,), 7), ARANGE, 3),
}


@pytest.mark.parametrize("name", STREAMS)
def test_uniforms_are_uniform_and_successive_ones_independent(name):
    u = uniform(*STREAMS[name][:2], stream=STREAMS[name][2])
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert chi_square_passes(cells(u, 256), [N / 256] * 256)
    low_bits = (u * 2.0**53).long() & 255
    assert chi_square_passes(torch.bincount(low_bits, minlength=256).tolist(), [N / 256] * 256)
    for lag in (1, 2, 4):
        pairs = (u[:-lag] * 16).long() * 16 + (u[lag:] * 16).long()
        assert chi_square_passes(torch.bincount(pairs, minlength=256).tolist(), [(N - lag) / 256] * 256)


def test_uniforms_of_different_streams_and_seeds_are_independent():
    base = uniform(torch.full((N,), 7), ARANGE)
    for seed, stream in ((7, 1), (7, 2), (7, 3), (8, 0), (-7, 0), (7 ^ (1 << 62), 0)):
        other = uniform(torch.full((N,), seed), ARANGE, stream)
        pairs = (base * 16).long() * 16 + (other * 16).long()
        assert chi_square_passes(torch.bincount(pairs, minlength=256).tolist(), [N / 256] * 256)
        assert not torch.equal(base, other)


def splitmix(x):
    """SplitMix64's finalizer in Python's whole numbers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@given(seed=st.integers(-(1 << 63), (1 << 63) - 1), position=st.integers(0, 1 << 40), stream=st.integers(0, 3))
def test_the_uniform_is_the_documented_hash(seed, position, stream):
    """So a seed gives the same text on every machine and in every release."""
    word = splitmix(splitmix(seed % 2**64) ^ ((position * 4 + stream) * 0x9E3779B97F4A7C15) % 2**64)
    actual = uniform(torch.tensor([seed]), torch.tensor([position]), stream).item()
    assert actual == (word >> 11) * 2.0**-53


# ------------------------------------------------------------------------------------ edits


def edited(logits, *, prompt=(), output=(), eos_ids=(), **params):
    original = torch.tensor(logits)
    out = edit_logits(original, SamplingParams(**params), prompt=prompt, output=output, eos_ids=eos_ids)
    assert original.tolist() == torch.tensor(logits).tolist()  # the model's own logits stay, for the logprobs
    return out


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=12, max_size=12),
    prompt=st.lists(st.integers(0, 11), min_size=1, max_size=20),
    output=st.lists(st.integers(0, 11), max_size=20),
    penalty=st.sampled_from([0.5, 1.1, 2.0]),
)
def test_repetition_penalty_equals_transformers(logits, prompt, output, penalty):
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), torch.tensor([logits]))[0]
    torch.testing.assert_close(edited(logits, prompt=prompt, output=output, repetition_penalty=penalty), theirs)


@given(
    output=st.lists(st.integers(0, 5), max_size=20),
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
)
def test_presence_and_frequency_are_openais_formula(output, presence, frequency):
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, with c counted over the answer only."""
    logits = [0.1, -2.0, 3.0, 0.0, 7.0, -1.0]
    c = [output.count(j) for j in range(6)]
    expected = [x - n * frequency - (n > 0) * presence for x, n in zip(logits, c, strict=True)]
    out = edited(logits, prompt=[4, 5], output=output, presence_penalty=presence, frequency_penalty=frequency)
    assert out.tolist() == pytest.approx(expected, abs=1e-5)


def test_bias_is_added_after_the_penalties():
    out = edited(
        [2.0, 2.0, 2.0],
        prompt=[0],
        output=[1, 1],
        repetition_penalty=2.0,
        presence_penalty=0.5,
        logit_bias={0: 100.0, 2: -100.0},
    )
    assert out.tolist() == [101.0, 0.5, -98.0]


def test_end_of_sequence_is_impossible_until_min_tokens():
    assert edited([1.0, 5.0, 2.0], output=[0], eos_ids=[1, 2], min_tokens=2).tolist() == [1.0, -math.inf, -math.inf]
    assert edited([1.0, 5.0, 2.0], output=[0, 0], eos_ids=[1, 2], min_tokens=2).tolist() == [1.0, 5.0, 2.0]
    assert edited([1.0, 5.0, 2.0], eos_ids=[], min_tokens=2).tolist() == [1.0, 5.0, 2.0]


@given(output=st.lists(st.integers(0, 3), max_size=5), min_tokens=st.integers(0, 6))
def test_neutral_parameters_need_no_edit_and_change_nothing(output, min_tokens):
    logits = [0.5, -1.0, 2.0, 0.0]
    assert not needs_edit(SamplingParams(), len(output))
    assert torch.equal(edited(logits, prompt=[1], output=output, eos_ids=[2]), torch.tensor(logits))
    params = SamplingParams(min_tokens=min_tokens)
    assert needs_edit(params, len(output)) == (len(output) < min_tokens)
