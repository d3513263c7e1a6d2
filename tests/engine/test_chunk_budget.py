"""The chunk beside running streams: as large as their patience allows, on machines of every kind."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.engine.chunk_budget import TARGET, ChunkBudget, JoinedBudget, smooth
from support.examples import examples

SIZES = [16, 32, 64, 128, 512]


def machine(*, weights=2e-3, token=1e-4, double=1e9, context_read=0.0):
    """Seconds of a joined forward. The weights are read while tokens are computed; a prompt's context is read once, and
    attending to `double` positions of it takes as long as the rest of a token."""

    def seconds(decodes, prompt_tokens, context):
        computed = max(weights, token * (decodes + prompt_tokens))
        return computed + (prompt_tokens > 0) * context * (context_read + prompt_tokens * token / double)

    return seconds


# A token takes 6 to 100 % of a step, so a chunk is short beside the contexts over which attention's share grows.
MACHINES = st.builds(
    lambda weights, share, double, read: machine(
        weights=weights, token=weights * share, double=double, context_read=weights * read
    ),
    st.floats(1e-3, 5e-2),
    st.floats(0.06, 1),
    st.floats(500, 1e6),
    st.floats(0, 9e-4),
)


def prefill(budget, seconds, length, decodes, start=0):
    """(prompt tokens, seconds) of each step until a prompt of `length` is through."""
    steps, done = [], start
    while done < length:
        count = min(budget.tokens(decodes) if decodes else budget.sizes[-1], length - done)
        took = seconds(decodes, count, done)
        budget.learn(prompt_tokens=count, decodes=decodes, seconds=took)
        done += count
        steps.append((count, took))
    return steps


@given(seconds=MACHINES, decodes=st.integers(1, 16))
@examples(40)
def test_joined_steps_stay_below_twice_the_usual_where_a_machine_can(seconds, decodes):
    """But for the chunk that its smallest is tried from, where tokens are dear."""
    budget, usual = JoinedBudget([512]), seconds(decodes, 0, 0)
    for count, took in prefill(budget, seconds, 3000, decodes):
        assert took <= 2 * usual or count <= JoinedBudget.LEAST + 1


@given(seconds=MACHINES, decodes=st.integers(1, 16))
@examples(40)
def test_joined_steps_use_the_time_they_have(seconds, decodes):
    """Once found out, a step is as long as allowed, but for less than the two tokens more that would be too many."""
    budget, usual = JoinedBudget([512]), seconds(decodes, 0, 0)
    done = 0
    for index, (count, took) in enumerate(prefill(budget, seconds, 3000, decodes)):
        if index > 60 and 0 < count < min(512, 3000 - done):
            assert took > 0.85 * TARGET * usual or seconds(decodes, count + 2, done) > TARGET * usual
        done += count


@given(seconds=MACHINES, streams=st.lists(st.integers(1, 16), min_size=2, max_size=6))
@examples(40)
def test_streams_that_come_and_go_wait_hardly_longer(seconds, streams):
    budget = JoinedBudget([512])
    for decodes in streams:
        usual = seconds(decodes, 0, 0)
        for count, took in prefill(budget, seconds, 600, decodes):
            assert took <= 2.05 * usual or count <= JoinedBudget.LEAST + 1


@given(
    kind=st.sampled_from([lambda: ChunkBudget(SIZES), lambda: JoinedBudget([512]), lambda: JoinedBudget([1])]),
    steps=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 16), st.floats(1e-6, 10)), max_size=60),
    decodes=st.integers(1, 16),
)
def test_whatever_was_measured_prompts_advance_within_the_largest_chunk(kind, steps, decodes):
    budget = kind()
    for prompt_tokens, streams, seconds in steps:
        if prompt_tokens or streams:
            budget.learn(prompt_tokens=prompt_tokens, decodes=streams, seconds=seconds)
    counts = [count for count, _ in prefill(budget, lambda *_: 0.01, 5000, decodes)]
    assert max(counts) <= budget.sizes[-1] and all(count in (0, *budget.sizes) for count in counts[:-1])
    assert 0 not in counts[1:]  # the first may be the one that shows what is usual


def test_a_lone_step_without_a_prompt_does_not_change_what_is_usual():
    steady = machine()
    budget = JoinedBudget([512])
    prefill(budget, steady, 2000, 1)
    usual = budget.usual[1]
    budget.learn(prompt_tokens=0, decodes=1, seconds=3 * usual)
    assert budget.usual[1] == usual
    budget.learn(prompt_tokens=0, decodes=1, seconds=1.5 * usual)
    assert budget.usual[1] > usual


def test_a_hiccup_is_soon_forgotten():
    steady = machine()
    budget = JoinedBudget([512])
    usual_count = prefill(budget, steady, 2000, 1)[-2][0]
    budget.learn(prompt_tokens=usual_count, decodes=1, seconds=3.0)
    budget.learn(prompt_tokens=0, decodes=1, seconds=3.0)
    assert 0.5 * usual_count <= budget.tokens(1) <= 1.5 * usual_count
    assert prefill(budget, steady, 2000, 1)[-2][0] == pytest.approx(usual_count, rel=0.2)


def test_a_short_last_chunk_teaches_nothing():
    """Its forward took as long as any, so its tokens look dear."""
    steady = machine()
    budget = JoinedBudget([512])
    prefill(budget, steady, 2000, 1)
    before = budget.tokens(1)
    for _ in range(10):
        budget.learn(prompt_tokens=1, decodes=1, seconds=steady(1, 1, 0))
    budget.learn(prompt_tokens=0, decodes=1, seconds=steady(1, 0, 0))
    assert budget.tokens(1) == before


def separate(*, fixed, rate=10_000):
    """Seconds of a decode's forward, and of a chunk's behind it."""
    return lambda decodes, prompt_tokens, _: 0.01 * (decodes > 0) + (prompt_tokens > 0) * (fixed + prompt_tokens / rate)


@pytest.mark.parametrize(("fixed", "expected"), [(0.0, 64), (0.004, 64), (0.03, 128), (0.5, 128)])
def test_separate_chunks_hold_what_is_computed_in_the_time_that_any_takes(fixed, expected):
    """0.8 of a decode's 10 ms are 80 tokens at 10,000 a second; where even an empty chunk takes longer, more."""
    seconds, budget = separate(fixed=fixed), ChunkBudget(SIZES)
    prefill(budget, seconds, 5 * 512, 0)
    assert prefill(budget, seconds, 20_000, 4)[-2][0] == expected
    budget.learn(prompt_tokens=5, decodes=0, seconds=0.5)  # a short prompt's rate says little
    assert budget.tokens(4) == expected


def test_nothing_is_known_at_first():
    for budget, least in ((ChunkBudget(SIZES), 16), (JoinedBudget([512]), 2), (JoinedBudget([1]), 1)):
        assert budget.tokens(3) == 0  # one step shows what is usual
        budget.learn(prompt_tokens=0, decodes=3, seconds=0.01)
        assert budget.tokens(3) == least
        assert budget.tokens(2) == 0


def test_smooth_starts_with_the_first_value_and_follows():
    assert smooth(0.0, 3.0) == 3.0
    average = 1.0
    for _ in range(20):
        average = smooth(average, 2.0)
    assert average == pytest.approx(2.0, rel=0.01)
    assert smooth(1.0, 100.0) == 1.25
