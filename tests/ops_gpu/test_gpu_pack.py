"""Weights for the GPU kernels: what goes in comes out, and what no kernel reads is refused. No GPU, no Triton."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.ops.gpu.pack import dequantize, interleave, pack_fp8, pack_linear, unpack_int4
from gpt_fast.ops.int4 import dequantize_int4
from gpt_fast.ops.int8 import dequantize_int8
from support.gpu_cases import normal, weight


@given(
    st.integers(1, 5), st.sampled_from([32, 64, 96, 160, 576]), st.sampled_from([32, 64, 128, 256]), st.integers(0, 99)
)
def test_int4_comes_back_exactly(rows, columns, groupsize, seed):
    generator = torch.Generator().manual_seed(seed)
    q_NJ = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scale, minimum = torch.rand(2, rows, -(-columns // groupsize), generator=generator).half()
    packed = pack_linear(q_NJ, scale, minimum, groupsize=groupsize)
    assert torch.equal(unpack_int4(packed), q_NJ)
    assert torch.equal(dequantize(packed), dequantize_int4(q_NJ, scale, minimum, groupsize=groupsize))


def test_int8_and_floats_stay_as_they_are():
    q, scale = torch.randint(-127, 128, (5, 48), dtype=torch.int8), torch.rand(5)
    assert torch.equal(dequantize(pack_linear(q, scale)), dequantize_int8(q, scale))
    floats = normal(5, 48, seed=1)
    assert torch.equal(dequantize(pack_linear(floats)), floats.float())


@pytest.mark.parametrize("columns", [48, 64, 576])
@pytest.mark.parametrize("groupsize", [32, 128])
def test_int8_in_groups_stays_as_it_is(columns, groupsize):
    q, scale = torch.randint(-127, 128, (5, columns), dtype=torch.int8), torch.rand(5, -(-columns // groupsize)).half()
    packed = pack_linear(q, scale, groupsize=groupsize)
    assert columns % packed.group == 0 and packed.weight.data_ptr() == q.data_ptr()
    assert torch.equal(dequantize(packed), dequantize_int8(q, scale, groupsize=groupsize))


def test_fp8_rounds_to_three_bits_of_mantissa():
    weights = normal(8, 64, seed=2, dtype=torch.float32)
    got = dequantize(pack_fp8(weights))
    row_largest = weights.abs().amax(1, keepdim=True)
    assert ((got - weights).abs() <= weights.abs() / 16 + row_largest * 2**-18).all()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int8g", "int4", "fp8"])
def test_interleaved_rows_alternate(kind):
    gate, up = weight(kind, 6, 64, seed=3), weight(kind, 6, 64, seed=4)
    both = interleave(gate, up)
    assert (both.n, both.k) == (12, 64)
    assert torch.equal(dequantize(both)[0::2], dequantize(gate))
    assert torch.equal(dequantize(both)[1::2], dequantize(up))


def test_what_no_kernel_reads_is_refused():
    with pytest.raises(ValueError, match=r"16 inputs at a time .got 40"):
        pack_linear(torch.zeros(4, 40, dtype=torch.int8), torch.ones(4))
    with pytest.raises(ValueError, match=r"groups of 32 inputs .got 48 in 32s"):
        pack_linear(torch.zeros(4, 24, dtype=torch.uint8), torch.ones(4, 2), torch.ones(4, 2), groupsize=32)
    with pytest.raises(ValueError, match=r"stored alike"):
        interleave(weight("int8", 4, 64, seed=1), weight("bf16", 4, 64, seed=1))
