"""Rounding, packing and the quantized modules, against bounds and against float32 twins."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.int4 import GROUPSIZES, dequantize_int4, pack_int4, pack_nibbles, regroup, unpack_nibbles
from gpt_fast.ops.int8 import fast_int8_op
from gpt_fast.quantize import (
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    QuantizationError,
    Quantized,
    Scheme,
    TiedHead,
    apply_structure,
    pack,
)
from gpt_fast.quantize.rtn import dequantize_weight, quantize_weight, sqnr_db
from gpt_fast.quantize.structure import apply_schemes, plan, stored_tensors
from support.examples import examples, rest_slow
from support.quantized import (
    FAMILIES,
    dequantized_model,
    logits_of,
    quantized_model,
    quantized_state,
    random_model,
    small_config,
)

INT8, INT8_G32 = Scheme(8, 0), Scheme(8, 32)
EVERY_SCHEME = [INT8, INT8_G32, *(Scheme(4, g) for g in GROUPSIZES)]
EDGE_ROWS = {
    "zero": torch.zeros(64),
    "constant": torch.full((64,), 0.37),
    "negative constant": torch.full((64,), -2.5),
    "outlier": torch.cat((torch.full((63,), 0.01), torch.tensor([1e4]))),
    "denormal": torch.linspace(-1e-40, 1e-40, 64),
    "one sided": torch.linspace(5.0, 6.0, 64),
    "float16's ends": torch.linspace(-65504.0, 65504.0, 64),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def round_trip(weight, scheme):
    return dequantize_weight(quantize_weight(weight, scheme, name="w"), scheme)


# ------------------------------------------------------------------------------------------ rounding


def test_int8_error_is_at_most_half_a_scale():
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    tensors = quantize_weight(weight, INT8, name="w")
    error = (weight - dequantize_weight(tensors, INT8)).abs()
    assert (error <= tensors["scale"][:, None] / 2 * (1 + 1e-4)).all()


@pytest.mark.parametrize(
    ("scheme", "least"),
    list(zip(EVERY_SCHEME, (40.0, 44.0, 21.5, 20.5, 19.5, 18.5), strict=True)),
    ids=str,
)
def test_signal_to_noise_of_gaussian_weights(scheme, least):
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    assert sqnr_db(weight, round_trip(weight, scheme)) >= least


@pytest.mark.parametrize("scheme", EVERY_SCHEME, ids=str)
@pytest.mark.parametrize("kind", EDGE_ROWS)
def test_edge_rows(kind, scheme):
    row = EDGE_ROWS[kind]
    result = round_trip(row[None], scheme)[0]
    assert result.isfinite().all()
    # Half a step, and what float16 loses of the scale (times 127 or 15 steps) and of the min.
    spread = row.max() - row.min() if scheme.bits == 4 else 2 * row.abs().max()
    half_step = spread / (2 * (15 if scheme.bits == 4 else 254))
    half_precision = 0 if scheme == INT8 else row.abs().max() * 2**-10 + 1e-6
    assert (row - result).abs().max() <= half_step + half_precision + 1.2e-38


def test_zero_rows_stay_exactly_zero():
    for scheme in EVERY_SCHEME:
        assert (round_trip(torch.zeros(3, 64), scheme) == 0).all()


@pytest.mark.parametrize("scheme", EVERY_SCHEME, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_name(bad, scheme):
    weight = torch.ones(8, 64)
    weight[5, 3] = bad
    with pytest.raises(QuantizationError, match=r"layers\.0\.wo: row 5 holds NaN or infinity"):
        quantize_weight(weight, scheme, name="layers.0.wo")


def test_weights_beyond_float16_are_refused_where_scales_are_float16():
    weight = torch.ones(4, 64)
    weight[2, 0] = -1e6
    with pytest.raises(QuantizationError, match=r"w: row 2 holds weights beyond float16's range"):
        quantize_weight(weight, Scheme(4, 32), name="w")
    assert torch.isfinite(round_trip(weight, INT8)).all()  # float32 scales reach them


@examples(50)
@given(rows=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_a_weight_that_was_four_bit_comes_back_exactly(rows, groups, seed):
    """Q4_1's grid: 16 levels of float16 scale and min, the least and largest level in use."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, groups, 32), generator=generator)
    q[..., 3], q[..., 17] = 0, 15
    scale = (torch.rand(rows, groups, 1, generator=generator) * 0.1).half().float()
    minimum = torch.randn(rows, groups, 1, generator=generator).half().float()
    weight = (q * scale + minimum).flatten(1)
    assert torch.equal(round_trip(weight, Scheme(4, 32)), weight)


def test_quantizing_twice_gives_the_same_bytes():
    weight = torch.randn(64, 576)
    for scheme in EVERY_SCHEME:
        first, second = (quantize_weight(weight, scheme, name="w") for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)


# ------------------------------------------------------------------------------------------- packing


@given(rows=st.integers(1, 7), half=st.integers(1, 65), seed=st.integers(0, 2**31))
def test_nibbles_round_trip(rows, half, seed):
    q = torch.randint(0, 16, (rows, 2 * half), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack_nibbles(q)
    assert packed.shape == (rows, half)
    assert torch.equal(unpack_nibbles(packed), q)
    assert torch.equal(packed & 0xF, q[:, ::2])


@pytest.mark.parametrize(
    ("columns", "groupsize", "even"), [(576, 128, 64), (576, 256, 64), (512, 128, 128), (96, 64, 32)]
)
def test_regrouping_changes_no_value(columns, groupsize, even):
    tensors = quantize_weight(torch.randn(16, columns), Scheme(4, groupsize), name="w")
    scale, size = regroup(tensors["scale"], columns, groupsize)
    minimum, _ = regroup(tensors["min"], columns, groupsize)
    assert size == even
    same = dequantize_int4(tensors["weight"], scale, minimum, groupsize=size)
    assert torch.equal(same, dequantize_weight(tensors, Scheme(4, groupsize)))


# ------------------------------------------------------------------------------------------ fast ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def assert_near(got, x, weight, scheme):
    """`got` is x @ weight^T but for rounding: of every output by as much as its own terms allow.

    Three things may be rounded to the dtype: a scale (and a zero point), a weight, a sum (before or after it is
    scaled). A sum of K products in float32 is off by at most K of its roundings, in whatever order it is taken, and
    the weights it is compared with are rounded twice.
    """
    weight_NK = dequantize_weight(weight, scheme).double()
    parts_NK = weight_NK.abs()  # the sizes of all that is rounded
    if scheme.bits == 4:  # (q - 8) * scale + zero
        zero_NG = (weight["min"] + 8 * weight["scale"].float()).double()
        zero_NK = zero_NG.repeat_interleave(scheme.groupsize, 1)[:, : weight_NK.shape[1]]
        parts_NK = parts_NK + (weight_NK - zero_NK).abs() + zero_NK.abs()
    roundings = 3 * torch.finfo(got.dtype).eps / 2 + (weight_NK.shape[1] + 2) * torch.finfo(torch.float32).eps / 2
    off = (got.double() - x.double() @ weight_NK.T).abs()
    assert (off <= 1.01 * roundings * (x.double().abs() @ parts_NK.T)).all(), len(x)


@pytest.mark.parametrize("dtype", rest_slow(DTYPES), ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (3, 64), (17, 48), (50, 80), (96, 576), (33, 31)])
def test_fast_int8_matches_the_plain_op(rows, columns, dtype):
    torch.manual_seed(0)
    tensors = quantize_weight(torch.randn(rows, columns) * 0.02, INT8, name="w")
    op = fast_int8_op(tensors["weight"], groupsize=0, dtype=dtype)
    assert (op is None) == (columns % 16 != 0)
    for m in range(1, 65) if op else ():
        x = torch.randn(m, columns).to(dtype)
        got = op(x, tensors["weight"], tensors["scale"].to(dtype))
        assert got.dtype == dtype and got.shape == (m, rows)
        assert_near(got, x, tensors, INT8)


@pytest.mark.parametrize("dtype", rest_slow(DTYPES), ids=str)
@pytest.mark.parametrize("groupsize", GROUPSIZES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (48, 96), (96, 576), (32, 256), (17, 64), (16, 50)])
def test_fast_int4_matches_the_plain_op(rows, columns, groupsize, dtype):
    torch.manual_seed(0)
    tensors = quantize_weight(torch.randn(rows, columns) * 0.02, Scheme(4, groupsize), name="w")
    stored = (tensors["weight"], tensors["scale"], tensors["min"])
    packed = pack_int4(*stored, groupsize=groupsize, dtype=dtype)
    assert (packed is None) == (rows % 16 != 0 or columns % 32 != 0)
    for m in range(1, 65) if packed else ():
        x = torch.randn(m, columns).to(dtype)
        got = packed.run(x, packed.weight, packed.scale_and_zero_GN2, packed.groupsize)
        assert got.dtype == dtype and got.shape == (m, rows)
        assert_near(got, x, tensors, Scheme(4, groupsize))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("groupsize", GROUPSIZES)
def test_fast_ops_match_the_plain_ops_on_cuda(groupsize):
    torch.manual_seed(0)
    linear = torch.randn(96, 512, device="cuda") * 0.02
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    int4 = quantize_weight(linear, Scheme(4, groupsize), name="w")
    stored = (int4["weight"], int4["scale"], int4["min"])
    packed = pack_int4(*stored, groupsize=groupsize, dtype=torch.bfloat16)
    assert packed is not None
    got = packed.run(x, packed.weight, packed.scale_and_zero_GN2, packed.groupsize)
    assert_near(got, x, int4, Scheme(4, groupsize))
    int8 = quantize_weight(linear, INT8, name="w")
    op = fast_int8_op(int8["weight"], groupsize=0, dtype=torch.bfloat16)
    got = op(x, int8["weight"], int8["scale"].to(torch.bfloat16))
    assert_near(got, x, int8, INT8)


# ------------------------------------------------------------------------------------------- modules


def filled_linear(scheme, *, in_features=96, out_features=64, bias=False):
    kind = Int4Linear if scheme.bits == 4 else Int8Linear
    torch.manual_seed(1)
    linear = kind(scheme, in_features, out_features, bias=bias)
    linear.load_state_dict(
        quantize_weight(torch.randn(out_features, in_features), scheme, name="w")
        | ({"bias": torch.randn(out_features)} if bias else {})
    )
    return linear


@pytest.mark.parametrize("scheme", EVERY_SCHEME, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_equals_its_dequantized_twin_packed_or_not(scheme, bias):
    linear = filled_linear(scheme, bias=bias)
    x = torch.randn(2, 3, 96)
    expected = torch.nn.functional.linear(x, linear.dequantize(), linear.bias)
    assert torch.equal(linear(x), expected)
    linear.pack()
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scheme", EVERY_SCHEME, ids=str)
def test_casting_moves_the_stored_tensors_but_never_rounds_them(scheme):
    linear = filled_linear(scheme, bias=True)
    before = {k: v.clone() for k, v in linear.state_dict().items()}
    linear.to(torch.bfloat16).to(torch.float32)
    after = linear.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "bias")
    assert linear.to(torch.bfloat16)(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16
    linear.pack()
    if linear.packed:
        with pytest.raises(RuntimeError, match="cast before pack"):
            linear.float()


@pytest.mark.parametrize("scheme", EVERY_SCHEME, ids=str)
@pytest.mark.parametrize("cut", [32, 64])
def test_shards_add_up_to_the_whole(scheme, cut):
    linear = filled_linear(scheme, bias=True).double()  # sums in another order then agree to some 1e-14
    x = torch.randn(5, 96).double()
    rows = [linear.select_rows(torch.arange(0, 24)), linear.select_rows(torch.arange(24, 64))]
    torch.testing.assert_close(torch.cat([r(x) for r in rows], -1), linear(x))
    left, right = linear.select_columns(0, cut), linear.select_columns(cut, 96)
    whole = torch.cat((left.dequantize(), right.dequantize()), dim=1)
    assert torch.equal(whole, linear.dequantize())
    torch.testing.assert_close(left(x[:, :cut]) + right(x[:, cut:]) - linear.bias, linear(x))


def test_stored_tensors_are_offered_until_packing_drops_them():
    linear = filled_linear(Scheme(4, 32))
    weight, scale, minimum = linear.quantized_weight()
    assert (weight.dtype, scale.dtype, minimum.dtype) == (torch.uint8, torch.float16, torch.float16)
    linear.pack()
    with pytest.raises(RuntimeError, match=r"before pack\(\)"):
        linear.quantized_weight()
    assert filled_linear(INT8).quantized_weight()[2] is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "groupsize"), [("int8", 0), ("int4", 32), ("int4", 128)])
def test_a_quantized_model_is_its_dequantized_twin(family, mode, groupsize):
    model = random_model(small_config(**FAMILIES[family]))
    tokens = torch.randint(0, 96, (2, 24))
    expected = logits_of(dequantized_model(model, mode=mode, groupsize=groupsize), tokens)
    quantized = quantized_model(model, mode=mode, groupsize=groupsize)
    torch.testing.assert_close(logits_of(quantized, tokens), expected)
    pack(quantized)
    torch.testing.assert_close(logits_of(quantized, tokens), expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_uses_the_embeddings_int8_rows():
    quantized = quantized_model(random_model(small_config()), mode="int8", groupsize=0)
    assert isinstance(quantized.output, TiedHead) and quantized.output.embedding is quantized.tok_embeddings
    assert not [name for name in quantized.state_dict() if name.startswith("output")]
    twin = copy.deepcopy(quantized).to(torch.bfloat16)
    assert twin.output.embedding is twin.tok_embeddings
    assert twin.tok_embeddings(torch.tensor([3])).dtype == torch.bfloat16


def test_the_plan_names_what_each_mode_quantizes():
    tied = random_model(small_config(n_expert=2, n_expert_per_token=1))
    schemes = plan(tied, mode="int4", groupsize=64)
    assert schemes["tok_embeddings"] == INT8_G32 and "output" not in schemes
    assert schemes["layers.1.feed_forward.experts.0.w2"] == Scheme(4, 64)
    assert "layers.0.feed_forward.gate" not in schemes
    untied = random_model(small_config(tie_embeddings=False))
    assert "tok_embeddings" not in plan(untied, mode="int8", groupsize=0)
    assert plan(untied, mode="int8", groupsize=0)["output"] == INT8
    assert plan(untied, mode="int8", groupsize=0, embedding="int8")["tok_embeddings"] == INT8
    assert "tok_embeddings" not in plan(tied, mode="int8", groupsize=0, embedding="keep")


@pytest.mark.parametrize(("mode", "groupsize"), [("int8", 0), ("int4", 128)])
def test_the_planned_tensors_are_those_that_rounding_makes(mode, groupsize):
    model = random_model(small_config())
    schemes = plan(model, mode=mode, groupsize=groupsize)
    state = quantized_state(model, schemes)
    planned = stored_tensors(model, schemes)
    assert list(planned) == list(state)
    for name, (dtype, shape) in planned.items():
        assert shape == tuple(state[name].shape) and dtype in (None, state[name].dtype)


# ------------------------------------------------------------------------------------------ bad input


def metadata(said=None, **modules):
    return {"version": 1, "modules": modules} | (said or {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"version": 2, "modules": {"output": "int8"}}, r"unknown version \(got 2, allowed 1\)"),
        ([], r"unknown version \(got \[\], allowed 1\)"),
        (metadata(), r"modules must be a non-empty object \(got \{\}\)"),
        (metadata(output="fp8"), r"scheme: unknown \(got 'fp8', allowed int8, int8.gN, int4.gN\)"),
        (metadata(output="int4"), r"groupsize: unknown for int4 \(got 0, allowed 32, 64, 128, 256\)"),
        (metadata(output="int4.g48"), r"groupsize: unknown for int4 \(got 48, "),
        (metadata({"mode": "int2"}, output="int8"), r"mode: unknown \(got 'int2', allowed int8, int4, int4-gptq\)"),
        (
            metadata({"mode": "int8"}, output="int4.g32"),
            r"output is int4.g32, but mode int8 with groupsize None means int8",
        ),
        (
            metadata({"mode": "int8", "groupsize": 32}, output="int8"),
            r"output is int8, but mode int8 with .* means int8.g32",
        ),
        (metadata({"mode": "int4", "groupsize": 64}, output="int4.g32"), r"output is int4.g32, .* 64 means int4.g64"),
        (metadata({"mode": "int4-gptq"}, output="int4.g32"), r"groupsize: unknown for int4 \(got None, allowed 32, "),
        (metadata(nothing="int8"), r"nothing is int8, but the model has no such module"),
        (metadata(norm="int8"), r"norm: a RMSNorm cannot be int8"),
        (metadata(tok_embeddings="int4.g32"), r"tok_embeddings: a Embedding cannot be int4.g32"),
    ],
)
def test_bad_metadata_is_one_line_naming_both_sides(wrong, message):
    with pytest.raises(QuantizationError, match=message) as caught:
        apply_structure(Transformer(small_config(tie_embeddings=False)), wrong)
    assert "\n" not in str(caught.value)


def test_an_odd_number_of_inputs_cannot_be_int4():
    with pytest.raises(QuantizationError, match=r"w: int4 needs an even number of inputs \(got 33\)"):
        quantize_weight(torch.ones(2, 33), Scheme(4, 32), name="w")
    model = Transformer(small_config(intermediate_size=161))
    with pytest.raises(QuantizationError, match=r"layers\.0\.feed_forward\.w2: int4 needs an even number of inputs"):
        apply_schemes(model, plan(model, mode="int4", groupsize=32))


def test_every_module_of_a_quantized_model_is_reached_by_pack():
    quantized = quantized_model(random_model(small_config()), mode="int8", groupsize=0)
    pack(quantized)
    kinds = [m for m in quantized.modules() if isinstance(m, Quantized)]
    assert len(kinds) == 11 and all(m.packed for m in kinds)
    assert isinstance(quantized.tok_embeddings, Int8Embedding)
