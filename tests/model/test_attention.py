"""Masks and attention against loops that say what they mean; the cache's writes, reads and copies.

Shapes: B rows, S tokens of a row, H query heads, K KV heads, T cached positions, D head_dim.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.model.attention import attend, causal_mask
from gpt_fast.model.cache import KVCache

CPU = torch.device("cpu")


@given(
    positions=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=3),
    length=st.integers(1, 13),
    group=st.integers(1, 3),
    window=st.none() | st.integers(1, 14),
)
def test_a_query_reads_its_past_within_the_window(positions, length, group, window):
    mask = causal_mask(torch.tensor(positions), length, group=group, window=window)
    assert mask.shape == (len(positions), 1, group * 3, length)
    for row, row_mask in zip(positions, mask[:, 0].tolist(), strict=True):
        for index, allowed in enumerate(row_mask):
            p = row[index % 3]  # group outermost
            assert allowed == [t <= p and (window is None or t > p - window) for t in range(length)]


@given(seed=st.integers(0, 1000), kv_heads=st.integers(1, 3), group=st.integers(1, 3), S=st.integers(1, 4))
def test_attention_equals_a_softmax_head_by_head(seed, kv_heads, group, S):
    generator = torch.Generator().manual_seed(seed)
    B, T, D, H = 2, 7, 4, kv_heads * group
    q_BSHD = torch.randn(B, S, H, D, generator=generator)
    k_BKTD = torch.randn(B, kv_heads, T, D, generator=generator)
    v_BKTD = torch.randn(B, kv_heads, T, D, generator=generator)
    positions_BS = torch.randint(0, T, (B, S), generator=generator)
    out = attend(q_BSHD, k_BKTD, v_BKTD, causal_mask(positions_BS, T, group=group))
    for b in range(B):
        for s in range(S):
            seen = int(positions_BS[b, s]) + 1
            for h in range(H):
                k_TD, v_TD = k_BKTD[b, h // group, :seen], v_BKTD[b, h // group, :seen]
                expected = (k_TD @ q_BSHD[b, s, h] / math.sqrt(D)).softmax(0) @ v_TD
                torch.testing.assert_close(out[b, s, h], expected, atol=1e-5, rtol=0)


@pytest.fixture
def cache(tiny_model):
    return KVCache(tiny_model().config, slots=3, max_seq_len=8, dtype=torch.float32, device=CPU)


def test_a_write_lands_in_its_layer_slot_and_position_only(cache):
    k_BSHD, v_BSHD = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8)
    slots_B, positions_BS = torch.tensor([2, 0]), torch.tensor([[3, 4], [0, cache.scratch]])
    cache.write(1, slots_B, positions_BS, k_BSHD, v_BSHD)
    for buffer, written in ((cache.k_LNHTD, k_BSHD), (cache.v_LNHTD, v_BSHD)):
        expected = torch.zeros_like(buffer)
        for b in range(2):
            for s in range(2):
                expected[1, slots_B[b], :, positions_BS[b, s]] = written[b, s]
        assert torch.equal(buffer, expected)


def test_reads_are_the_rows_slots_and_no_copy_where_they_are_in_order(cache):
    cache.k_LNHTD.copy_(torch.randn(cache.k_LNHTD.shape))
    k_BHTD, _ = cache.read(1, torch.tensor([2, 0]), 2, 5)
    assert torch.equal(k_BHTD, cache.k_LNHTD[1, [2, 0], :, :5])
    k_BHTD, v_BHTD = cache.read(1, None, 2, 5)
    assert torch.equal(k_BHTD, cache.k_LNHTD[1, :2, :, :5])
    assert v_BHTD.data_ptr() == cache.v_LNHTD[1].data_ptr()


def test_copy_and_clear_touch_one_slot(cache):
    before = torch.randn(cache.k_LNHTD.shape)
    cache.k_LNHTD.copy_(before)
    cache.v_LNHTD.copy_(-before)
    cache.copy_prefix(source=0, target=2, length=5)
    cache.clear(1)
    expected = before.clone()
    expected[:, 2, :, :5] = before[:, 0, :, :5]
    expected[:, 1] = 0
    assert torch.equal(cache.k_LNHTD, expected) and torch.equal(cache.v_LNHTD, -expected)


def test_the_cache_says_what_it_takes(cache):
    elements = 2 * 2 * 3 * 2 * 9 * 8  # k and v, layers, slots, heads, positions and the scratch one, head_dim
    assert cache.nbytes == 4 * elements and cache.scratch == cache.max_seq_len == 8
