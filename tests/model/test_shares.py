"""Any model's heads, features and tokens are shared out whole, and evenly, among any number of ranks."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import ConfigError
from gpt_fast.model.shares import FINE, GRAIN, heads, runs, share_out
from support.examples import examples
from support.quantized import small_config


def joined(parts):
    return [item for part in parts for item in part]


@examples(300)
@given(st.integers(1, 16), st.integers(1, 20), st.integers(1, 24))
def test_every_query_head_is_one_ranks_and_its_kv_head_is_there_too(n_kv_head, group, size):
    n_head = n_kv_head * group
    size = min(size, n_head)
    held = [heads(n_head, n_kv_head, rank, size) for rank in range(size)]
    assert joined(query for query, _ in held) == list(range(n_head))
    assert sorted(set(joined(kv for _, kv in held))) == list(range(n_kv_head))
    for query, kv in held:
        each = len(query) // len(kv)  # what `attend` makes of the rank's own numbers of heads
        assert len(query) == each * len(kv) > 0
        assert [q // group for q in query] == [k for k in kv for _ in range(each)]
    # Balance: of KV heads one more than the fewest, or, where ranks share them, of the query heads of one.
    kv_counts = [len(kv) for _, kv in held]
    assert max(kv_counts) == math.ceil(n_kv_head / size) and max(kv_counts) - min(kv_counts) <= 1
    if size > n_kv_head:
        assert max(len(query) for query, _ in held) <= math.ceil(group / (size // n_kv_head))
    assert kv_counts[0] == max(kv_counts)


@examples(500)
@given(st.integers(1, 200_000), st.integers(1, 24), st.sampled_from([0, 32, 64, 128, 256]))
def test_runs_are_the_whole_and_none_is_empty_or_large(count, size, group):
    size = min(size, count)
    held = runs(count, size, group=group)
    assert joined(held) == list(range(count)) and len(held) == size and all(held)
    largest, even = max(map(len, held)), count / size
    if group:
        assert largest < even + max(GRAIN, even / FINE) + 1
    else:
        assert largest < max(even * (1 + 1 / FINE), even + 1)
    if group and count >= GRAIN * size:
        assert all(run.start % GRAIN == 0 for run in held)


@pytest.mark.parametrize(
    ("count", "size", "group", "widths"),
    [
        (1536, 2, 0, [768, 768]),  # SmolLM2-135M
        (1536, 4, 32, [384] * 4),
        (49152, 4, 0, [12288] * 4),
        (11008, 4, 128, [2688, 2816, 2688, 2816]),  # Llama-2-7B: 86 groups of 128
        (14336, 8, 256, [1792] * 8),  # Llama-3.1-8B
        (128256, 3, 0, [42752] * 3),
        (160, 3, 32, [32, 64, 64]),
    ],
)
def test_models_of_the_field(count, size, group, widths):
    assert [len(run) for run in runs(count, size, group=group)] == widths


def test_smollm2s_nine_heads_on_two_and_four_ranks():
    assert [tuple(map(list, heads(9, 3, rank, 2))) for rank in range(2)] == [
        ([0, 1, 2, 3, 4, 5], [0, 1]),
        ([6, 7, 8], [2]),
    ]
    assert [tuple(map(list, heads(9, 3, rank, 4))) for rank in range(4)] == [
        ([0, 1], [0]), ([2], [0]), ([3, 4, 5], [1]), ([6, 7, 8], [2])]  # fmt: skip


def test_ranks_that_would_hold_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"^n_head: has none for some of 5 ranks \(got 4, allowed 4 ranks at most\)"):
        share_out(small_config(), 0, 5)
