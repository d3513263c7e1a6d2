"""GPTQ: closer in output than rounding, sound on hard Hessians, and block by block over whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.ops.rounding import int4_grid, nearest_int4
from gpt_fast.quantize import QuantizationError, Scheme, gptq, packed_triangle
from gpt_fast.quantize.gptq import Hessian, InputSizes, damped_factor, gptq_int4
from gpt_fast.quantize.gptq_model import BlockRunner, GPTQOptions, gptq_model
from gpt_fast.quantize.gptq_streaming import HiddenStates
from gpt_fast.quantize.grid_search import fit_grid
from gpt_fast.quantize.packed_triangle import Triangle
from gpt_fast.quantize.rtn import dequantize_weight, quantize_weight
from gpt_fast.quantize.structure import plan
from support.examples import examples
from support.quantized import FAMILIES, logits_of, model_of_state, quantized_model, random_model, small_config

CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps  # two roundings: each is off by at most half of it


@pytest.fixture
def in_float64(monkeypatch):
    """All that is float32 in GPTQ becomes float64, so that sums in another order give the same codes.

    In float32 they need not: a weight near the middle of two steps may be rounded to either, and that moves all that
    come after it in its row. In float64 such sums differ by some 1e-14 of a step; of the million numbers or so that a
    test rounds, one lies that near to the middle in one test of a million.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[part], other[part]) for part in one)


def trained_like(rows=96, columns=192, tokens=1500, seed=0):
    """A weight, and inputs as trained models have them: correlated, with a few channels far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(32, columns, generator=generator) * 0.4
    inputs = torch.randn(tokens, 32, generator=generator) @ basis + torch.randn(tokens, columns, generator=generator)
    inputs *= torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs


def hessian_of(inputs, *, act_order=True):
    sizes = InputSizes(inputs.shape[-1], CPU)
    sizes.add(inputs)
    hessian = Hessian(inputs.shape[-1], CPU, sizes.order() if act_order else None)
    hessian.add(inputs)
    return hessian


def gptq_of(weight, inputs, *, groupsize, act_order=True, blocksize=128):
    factor = damped_factor(hessian_of(inputs, act_order=act_order), percdamp=0.01, name="w")
    return gptq_int4(weight, factor, groupsize=groupsize, blocksize=blocksize, device=CPU, name="w")


def output_error(weight, quantized, inputs):
    return float(((weight - quantized) @ inputs.T).square().mean())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groupsize", [32, 64, 128])
def test_outputs_on_unseen_inputs_are_far_closer_than_rounding_to_nearest(groupsize, act_order):
    weight, inputs = trained_like()
    seen, unseen = inputs[:1000], inputs[1000:]
    scheme = Scheme(4, groupsize)
    gptq = dequantize_weight(gptq_of(weight, seen, groupsize=groupsize, act_order=act_order), scheme)
    rtn = dequantize_weight(quantize_weight(weight, scheme, name="w"), scheme)
    # Over these cases and other seeds the quotient lies between 0.03 and 0.22.
    assert output_error(weight, gptq, unseen) < 0.6 * output_error(weight, rtn, unseen)


def test_act_order_helps_where_few_inputs_dominate():
    weight, inputs = trained_like()
    inputs[:, ::16] *= 20
    errors = []
    for act_order in (False, True):
        tensors = gptq_of(weight, inputs, groupsize=64, act_order=act_order)
        errors.append(output_error(weight, dequantize_weight(tensors, Scheme(4, 64)), inputs))
    assert errors[1] < errors[0]  # 0.60 to 0.76 of it over some seeds


@pytest.mark.parametrize("act_order", [False, True])
def test_blocksize_changes_speed_not_the_result(act_order, in_float64):
    weight, inputs = trained_like(columns=160)
    results = [gptq_of(weight, inputs, groupsize=32, act_order=act_order, blocksize=size) for size in (1, 64, 1024)]
    assert all(same_tensors(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("act_order", [False, True])
def test_a_four_bit_weight_comes_back_exactly(act_order):
    _, inputs = trained_like(columns=192)
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (8, 6, 32), generator=generator)
    q[..., 0], q[..., 31] = 0, 15
    weight = (q * torch.rand(8, 6, 1, generator=generator).half().float() - 0.5).flatten(1)
    tensors = gptq_of(weight, inputs, groupsize=32, act_order=act_order)
    assert torch.equal(dequantize_weight(tensors, Scheme(4, 32)), weight)


def test_the_last_group_may_be_short():
    weight, inputs = trained_like(columns=176)
    rtn = dequantize_weight(quantize_weight(weight, Scheme(4, 128), name="w"), Scheme(4, 128))
    for act_order in (False, True):
        tensors = gptq_of(weight, inputs, groupsize=128, act_order=act_order)
        assert tensors["scale"].shape == (96, 2)
        error = output_error(weight, dequantize_weight(tensors, Scheme(4, 128)), inputs)
        assert error < 0.6 * output_error(weight, rtn, inputs)


# ---------------------------------------------------------------------------------------- hard Hessians


def test_fewer_tokens_than_inputs_and_silent_inputs():
    weight, inputs = trained_like(columns=192, tokens=40)
    inputs[:, 17] = 0
    tensors = gptq_of(weight, inputs, groupsize=64)
    result = dequantize_weight(tensors, Scheme(4, 64))
    assert result.isfinite().all()
    scale, minimum = tensors["scale"].float()[:, 0], tensors["min"].float()[:, 0]
    # A silent input is rounded, not dropped, and makes up for no other: its entries of the factor are exactly 0.
    assert torch.equal(result[:, 17], nearest_int4(weight[:, 17], scale, minimum) * scale + minimum)


def with_matrix(matrix_KK):
    """A Hessian that holds this symmetric matrix."""
    hessian = Hessian(len(matrix_KK), CPU)
    for first, panel in hessian.sum_KK.row_blocks(packed_triangle.PANEL):
        panel.copy_(matrix_KK[first : first + len(panel), first:])
    return hessian


def dense(upper: Triangle):
    rows = upper.row_blocks(packed_triangle.PANEL)
    return torch.cat([torch.nn.functional.pad(panel, (upper.columns - panel.shape[1], 0)) for _, panel in rows])


@pytest.mark.parametrize("panel", [16, 32, 100])
def test_damping_grows_until_there_is_a_factor(panel, monkeypatch):
    monkeypatch.setattr(packed_triangle, "PANEL", panel)
    ones = torch.ones(80, 80)  # rank one, and percdamp 0 adds nothing at first
    factor = dense(damped_factor(with_matrix(ones), percdamp=0.0, name="w").upper_KK)
    assert factor.isfinite().all() and torch.equal(factor, factor.triu())
    added = factor @ factor.T - ones
    # A factor of 80 columns and the product of its rows make at most 81 + 80 roundings of numbers near 1; a matrix with
    # 0.001 on top of its ones has a factor despite them, and with nothing on top its second pivot is exactly 0.
    torch.testing.assert_close(added, 1e-3 * torch.eye(80), atol=81 * EPS, rtol=0)
    with pytest.raises(QuantizationError, match=r"^w: the Hessian of its inputs has no Cholesky factor even with"):
        damped_factor(with_matrix(-1e12 * torch.eye(80)), percdamp=0.0, name="w")


@examples(40)
@given(columns=st.integers(1, 90), panel=st.sampled_from([16, 32, 64, 128]), seed=st.integers(0, 2**31))
def test_a_triangle_in_panels_is_factored_or_left_as_it_was(columns, panel, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_triangle, "PANEL", panel)
        triangles = [hessian_of(inputs, act_order=False).sum_KK for _ in range(2)]
        expected = inputs.double().T @ inputs.double()
        size = inputs.double().abs().T @ inputs.double().abs()
        gathered = dense(triangles[0]).triu()
        # A sum of 2 * columns products is off by at most as many roundings of the sum of their sizes.
        assert ((gathered - expected.triu()).abs() <= columns * EPS * size).all()
        assert triangles[0].factor()
        factor = dense(triangles[0]).double()
        assert torch.equal(factor, factor.triu())
        # Sums of at most `columns` products follow, of factors whose squares add up to at most the largest entry: one
        # to factor, and to undo that one, one with the square above, one to add. Twice that is allowed.
        near = 4 * (columns + 1) * EPS * float(expected.max())
        torch.testing.assert_close(factor @ factor.T, expected, atol=near, rtol=0)
        sunk = torch.zeros(columns).double()
        sunk[int(torch.randint(columns, (1,), generator=generator))] = -2 * expected.max()  # below 0 on the diagonal
        triangles[1].add_to_diagonal(sunk)
        assert not triangles[1].factor()
        restored = (expected + sunk.diag()).triu()
        torch.testing.assert_close(dense(triangles[1]).triu().double(), restored, atol=2 * near, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True])
def test_panels_and_bands_change_memory_not_the_result(act_order, monkeypatch, in_float64):
    weight, inputs = trained_like(columns=176)
    whole = gptq_of(weight, inputs, groupsize=32, act_order=act_order)
    monkeypatch.setattr(packed_triangle, "PANEL", 64)
    monkeypatch.setattr(gptq, "ELEMENTS_AT_ONCE", 30 * 176)
    monkeypatch.setitem(gptq.ELEMENTS_FITTED_AT_ONCE, "cpu", 7 * 176)
    assert same_tensors(gptq_of(weight, inputs, groupsize=32, act_order=act_order), whole)


def test_the_values_are_those_of_the_paper(monkeypatch, in_float64):
    """Its own recurrence, with the factor of the inverse and on the same grids."""
    monkeypatch.setattr(packed_triangle, "PANEL", 64)
    weight, inputs = trained_like(rows=24)
    tensors = gptq_of(weight, inputs, groupsize=32)
    order = inputs.square().sum(0).argsort(descending=True, stable=True)
    ordered = inputs[:, order]
    hessian = ordered.T @ ordered
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(192)
    factor = torch.linalg.cholesky(hessian.inverse(), upper=True)
    scale, minimum = (tensors[part].double().repeat_interleave(32, 1)[:, order] for part in ("scale", "min"))
    work, result = weight[:, order], torch.empty(24, 192)
    for i in range(192):
        result[:, i] = nearest_int4(work[:, i], scale[:, i], minimum[:, i]) * scale[:, i] + minimum[:, i]
        work[:, i:] -= ((work[:, i] - result[:, i]) / factor[i, i])[:, None] * factor[i, i:]
    assert torch.equal(dequantize_weight(tensors, Scheme(4, 32))[:, order], result)


def test_inputs_that_are_not_finite_are_refused_by_name():
    weight, inputs = trained_like()
    inputs[3, 5] = float("inf")
    with pytest.raises(QuantizationError, match=r"w: the Hessian of its inputs: row \d+ holds NaN or infinity"):
        gptq_of(weight, inputs, groupsize=32)


@examples(25)
@given(seed=st.integers(0, 2**31), groupsize=st.sampled_from([32, 64]), columns=st.sampled_from([64, 80, 96]))
def test_a_fitted_grid_costs_no_more_than_the_full_range(seed, groupsize, columns):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, columns, generator=generator) * 10 ** float(torch.randn(1, generator=generator))
    importance = torch.rand(columns, generator=generator) ** 4

    def cost(scale, minimum):
        wide = [value.float().repeat_interleave(groupsize, 1)[:, :columns] for value in (scale, minimum)]
        off = weight - (nearest_int4(weight, *wide) * wide[0] + wide[1])  # to the last bit as fit_grid has it
        return (off.double().square() * importance).sum()

    fitted = cost(*fit_grid(weight, importance, groupsize=groupsize))
    # fit_grid compares float32 sums of `groupsize` products of three, each off by as many roundings and two at most.
    assert fitted <= cost(*int4_grid(weight, groupsize)) * (1 + (groupsize + 2) * EPS)


# ----------------------------------------------------------------------------------------- whole models


def gptq_twin(model, tokens_CS, *, groupsize, options=None):
    schemes = plan(model, mode="int4", groupsize=groupsize, embedding="keep")
    source = model.state_dict()
    state = {name: tensor for name, tensor in source.items() if name.removesuffix(".weight") not in schemes}
    results = gptq_model(model.config, source.__getitem__, schemes, tokens_CS, options=options or GPTQOptions())
    names = []
    for name, parts in results:
        names.append(name)
        state |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    assert sorted(names) == sorted(schemes)
    return model_of_state(model.config, schemes, state)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_is_closer_than_rounding(family):
    model = random_model(small_config(**FAMILIES[family]))
    generator = torch.Generator().manual_seed(7)
    basis = torch.randn(96, 12, generator=generator) @ torch.randn(12, 96, generator=generator)
    channels = torch.randn(96, generator=generator).exp() * 0.05
    model.tok_embeddings.weight.copy_((basis + 0.3 * torch.randn(96, 96, generator=generator)) * channels)
    tokens = torch.randint(0, 96, (40, 48), generator=generator)
    expected = logits_of(model, tokens[32:])
    gptq = logits_of(gptq_twin(model, tokens[:32], groupsize=64), tokens[32:])
    rtn = logits_of(quantized_model(model, mode="int4", groupsize=64, embedding="keep"), tokens[32:])
    # Over the families and other seeds the quotient lies between 0.06 and 0.1.
    assert float((gptq - expected).square().mean()) < 0.7 * float((rtn - expected).square().mean())


def test_blocks_run_as_the_model_does():
    """The hidden states that calibrate block i are those the model itself gives it, also where layers slide."""
    model = random_model(small_config(n_layer=3, sliding_window=5, sliding_layers=(1,)))
    tokens = torch.randint(0, 96, (3, 40))
    hidden = HiddenStates(3, 40, model.config.dim)
    hidden.write(0, model.tok_embeddings(tokens))
    for index in range(3):
        BlockRunner(model.config, index, model.state_dict().__getitem__, hidden, CPU).advance()
    torch.testing.assert_close(model.output(model.norm(hidden.read(0, 9))), logits_of(model, tokens))


def test_an_expert_without_tokens_is_rounded_to_nearest():
    model = random_model(small_config(n_expert=4, n_expert_per_token=1))
    model.layers[0].feed_forward.gate.weight[3] = -1e4 * model.layers[0].feed_forward.gate.weight[:3].sum(0)
    tokens = torch.zeros(1, 8, dtype=torch.int64)  # one token only: it reaches few experts
    twin = gptq_twin(model, tokens, groupsize=32)
    rounded = quantized_model(model, mode="int4", groupsize=32, embedding="keep")
    equal = [
        torch.equal(a.dequantize(), b.dequantize())
        for a, b in (
            (t.feed_forward.experts[e].w2, r.feed_forward.experts[e].w2)
            for t, r in zip(twin.layers, rounded.layers, strict=True)
            for e in range(4)
        )
    ]
    assert sum(equal) >= 4 and not all(equal)
