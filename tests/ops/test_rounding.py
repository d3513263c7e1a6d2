"""Rounding to nearest: the edge cases, decided once for checkpoints and for what kernels pack at load."""

from __future__ import annotations

import pytest
import torch

from gpt_fast.ops.int8 import dequantize_int8, expand_groups
from gpt_fast.ops.rounding import TINY, int4_groups, int8_groups, int8_rows


def test_stored_q4_1_comes_back_without_loss() -> None:
    scale, minimum = torch.rand(16, 2).half(), torch.randn(16, 2).half()
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15  # as a quantizer leaves them: both ends are used
    w_NK = codes * expand_groups(scale.float(), 64, 32) + expand_groups(minimum.float(), 64, 32)
    for got, expected in zip(int4_groups(w_NK, 32), (codes, scale, minimum), strict=True):
        assert torch.equal(got, expected)


def test_rows_of_zeros_have_codes_of_zero_and_the_smallest_scale() -> None:
    codes_NK, scale_N = int8_rows(torch.zeros(2, 40))
    assert not codes_NK.any() and (scale_N == TINY).all()


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-13, 1e-12, 1.0, 1e30])
def test_rows_of_any_size_are_off_by_half_a_scale(size: float) -> None:
    w_NK = torch.linspace(-1, 1, 40)[None] * size
    codes_NK, scale_N = int8_rows(w_NK)
    off = (dequantize_int8(codes_NK, scale_N).double() - w_NK.double()).abs().max()
    assert off <= 0.5001 * float(scale_N.double())
    assert size < 127 * TINY or int(codes_NK.abs().max()) == 127


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6])
def test_groups_too_small_for_float16_become_zero(size: float) -> None:
    """float16's smallest number is 6e-8; half of it and less is rounded to 0."""
    codes_NK, scale_NG = int8_groups(torch.linspace(-1, 1, 64)[None] * size, 32)
    assert not codes_NK.any() and not scale_NG.any()
    codes_NK, scale_NG, min_NG = int4_groups(torch.linspace(0, 1, 64)[None] * size / 10, 32)
    assert not codes_NK.any() and not scale_NG.any() and float(min_NG.max()) <= size / 10


def test_a_group_of_one_value_is_its_min() -> None:
    codes_NK, scale_NG, min_NG = int4_groups(torch.full((1, 32), -2.5), 32)
    assert not codes_NK.any() and not scale_NG.any() and (min_NG == -2.5).all()


@pytest.mark.parametrize("rounded", [int8_groups, int4_groups])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_short_last_group_is_rounded_as_if_alone(rounded, sign: int) -> None:
    """Its padding widens no range: all of its weights lie on one side of zero."""
    w_NK = sign * (1 + torch.rand(3, 40, generator=torch.Generator().manual_seed(2)))
    codes_NK, *grid = rounded(w_NK, 32)
    codes_last, *grid_last = rounded(w_NK[:, 32:], 8)
    assert torch.equal(codes_NK[:, 32:], codes_last)
    assert all(torch.equal(all_NG[:, 1:], last) for all_NG, last in zip(grid, grid_last, strict=True))
