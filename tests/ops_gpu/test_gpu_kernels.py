"""The GPU kernels against their plain PyTorch twins: in Triton's interpreter here, on the device where there is one."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the kernels are Triton's")

from gpt_fast.ops.gpu import gemv
from gpt_fast.ops.gpu.attention import attention_workspace, decode_attention, decode_attention_reference
from gpt_fast.ops.gpu.layer_cache import head_workspace
from gpt_fast.ops.gpu.sampler import sample, sample_reference, sampler_workspace
from support.examples import examples
from support.gpu_cases import DEVICE, layer_cache, normal, poisoned, weight

pytestmark = pytest.mark.slow  # Triton's interpreter

KINDS = ("bf16", "int8", "int8g", "int4", "fp8")
unshrunk = settings(phases=(Phase.explicit, Phase.generate))  # the interpreter is slow: a failure is not made smaller
few = examples(4, unshrunk)
fewer = examples(2, unshrunk)  # float64's bounds are held for the same kernel in test_gpu_bounds


def error(got, want):
    """Of the largest value; NaN, which poison leaves, is no number below any bound."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def bound(kind, tokens, dtype, *, norm):
    """Against float32 products of the same packed weights, of the largest output.

    One token: float32 sums, or 16-bit fixed-point activations. Several: what norm and dequantization round to x's
    dtype before the tensor cores see it.
    """
    if tokens == 1:
        return 1e-4 if kind.startswith("int") else 2e-6
    rounded = dtype == torch.bfloat16 and (norm or (kind == "int4" and tokens > 8))
    return 2e-2 if rounded else 2e-6


shapes = st.tuples(
    st.sampled_from([1, 1, 2, 5, 8, 9, 16]),  # tokens
    st.sampled_from([16, 40, 66]),  # rows
    st.sampled_from([64, 96, 576]),  # columns
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 99),  # seed
)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes)
def test_linear_residual(kind, shape):
    tokens, rows, columns, dtype, seed = shape
    w = weight(kind, rows, columns, seed=seed, dtype=dtype)
    x, residual = normal(tokens, columns, seed=seed + 1, dtype=dtype), normal(tokens, rows, seed=seed + 2, dtype=dtype)
    got, want = poisoned(tokens, rows, dtype=torch.float32), poisoned(tokens, rows, dtype=torch.float32)
    gemv.linear_residual(x, w, residual, got)
    gemv.linear_residual_reference(x, w, residual, want)
    assert error(got, want) < bound(kind, tokens, dtype, norm=False)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes)
def test_norm_head(kind, shape):
    tokens, rows, columns, dtype, seed = shape
    w = weight(kind, rows, columns, seed=seed, dtype=dtype)
    x, norm = normal(tokens, columns, seed=seed + 1, dtype=dtype), normal(columns, seed=seed + 2, dtype=dtype)
    got, want = poisoned(tokens, rows, dtype=torch.float32), poisoned(tokens, rows, dtype=torch.float32)
    gemv.norm_head(x, norm, w, got, eps=1e-5)
    gemv.norm_head_reference(x, norm, w, want, eps=1e-5)
    assert error(got, want) < bound(kind, tokens, dtype, norm=True)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(shape=shapes)
def test_norm_gate_up_silu(kind, shape):
    tokens, rows, columns, dtype, seed = shape
    w = weight(kind, rows, columns, seed=seed, dtype=dtype)
    x, norm = normal(tokens, columns, seed=seed + 1, dtype=dtype), normal(columns, seed=seed + 2, dtype=dtype)
    got, want = poisoned(tokens, rows // 2, dtype=torch.float32), poisoned(tokens, rows // 2, dtype=torch.float32)
    gemv.norm_gate_up_silu(x, norm, w, got, eps=1e-5)
    gemv.norm_gate_up_silu_reference(x, norm, w, want, eps=1e-5)
    assert error(got, want) < 2 * bound(kind, tokens, dtype, norm=True)


@pytest.mark.parametrize("kind", KINDS)
@fewer
@given(
    shape=shapes,
    heads=st.sampled_from([(2, 1), (3, 1), (2, 2)]),
    head_dim=st.sampled_from([32, 64, 80, 96]),
    part=st.booleans(),
)
def test_norm_qkv_rope_write(kind, shape, heads, head_dim, part):
    """Queries, and the caches whole: what no token wrote stays as it was."""
    tokens, dtype = shape[0], shape[3]
    for got, want in zip(*(wrote(run, kind, shape, heads, head_dim, part, torch.float32) for run in RUNS), strict=True):
        assert error(got, want) < bound(kind, tokens, dtype, norm=True)


RUNS = (gemv.norm_qkv_rope_write, gemv.norm_qkv_rope_write_reference)


def wrote(run, kind, shape, heads, head_dim, part, cached):
    """Queries and all of the cache after two calls, of which the second finds the counters as the first left them."""
    tokens, _, columns, dtype, seed = shape
    q_heads, kv_heads = heads
    w = weight(kind, (q_heads + 2 * kv_heads) * head_dim, columns, seed=seed, dtype=dtype)
    x, norm = normal(tokens, columns, seed=seed + 1, dtype=dtype), normal(columns, seed=seed + 2, dtype=dtype)
    angles_PE = normal(20, head_dim // 4 if part else head_dim // 2, seed=seed + 5, dtype=torch.float32) * 6.28
    cos_sin = torch.stack((angles_PE.cos(), angles_PE.sin()), dim=1)
    places = torch.randperm(3 * 20, generator=torch.Generator().manual_seed(seed))[:tokens].to(DEVICE)
    workspace = head_workspace(tokens, kv_heads, head_dim, torch.device(DEVICE))
    workspace.heads.fill_(float("nan"))
    for _ in range(2):
        cache = layer_cache(3, kv_heads, 20, head_dim, seed=seed + 3, dtype=cached)
        q = poisoned(tokens, q_heads, head_dim, dtype=torch.float32)
        run(x, norm, w, cos_sin, places // 3, places % 3, cache, workspace, q, eps=1e-5)
        assert not workspace.arrived.any()
    return (q, *(part for part in cache if part is not None))


@pytest.mark.parametrize("kind", KINDS)
@fewer
@given(shape=shapes, heads=st.sampled_from([(2, 1), (3, 3)]), head_dim=st.sampled_from([32, 64, 80, 96, 128]))
def test_norm_qkv_rope_write_to_int8(kind, shape, heads, head_dim):
    """Scales as near as the outputs; codes at most one step off where rounding fell to the other side."""
    got, want = (wrote(run, kind, shape, heads, head_dim, False, torch.int8) for run in RUNS)
    near = bound(kind, shape[0], shape[3], norm=True)
    for index in (0, 3, 4):  # queries, scales
        assert error(got[index], want[index]) < near
    for index in (1, 2):
        off = (got[index].int() - want[index].int()).abs()
        assert off.max() <= max(1, 127 * 8 * near) and (off > 0).float().mean() < max(0.02, 16 * near)


def test_outputs_take_the_dtype_they_have():
    """bfloat16 in and out, and the output over the residual."""
    w, x, residual = weight("bf16", 64, 96, seed=1), normal(1, 96, seed=2), normal(1, 64, seed=3)
    want = poisoned(1, 64)
    gemv.linear_residual_reference(x, w, residual, want)
    gemv.linear_residual(x, w, residual, residual)
    assert error(residual, want) < 5e-3


@pytest.mark.parametrize("tokens", [0, 17])
def test_a_token_count_no_kernel_holds_is_refused(tokens):
    w = weight("bf16", 16, 64, seed=1)
    with pytest.raises(ValueError, match=f"tokens: .*got {tokens}, allowed 1..16"):
        gemv.linear_residual(normal(tokens, 64, seed=2), w, poisoned(tokens, 16), poisoned(tokens, 16))


@examples(24, unshrunk)
@given(
    heads=st.sampled_from([(4, 1), (3, 1), (4, 4), (8, 2), (7, 1), (8, 1)]),
    head_dim=st.sampled_from([64, 80, 96, 128]),
    splits=st.integers(1, 5),
    slots=st.integers(1, 2),
    verified=st.sampled_from([1, 1, 3, 5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    int8=st.booleans(),
    seed=st.integers(0, 99),
)
def test_decode_attention(heads, head_dim, splits, slots, verified, dtype, int8, seed):
    """Tokens of one length or of several after each other; what lies beyond a slot's length is NaN."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    tokens = slots * verified
    first = torch.randint(1, 300, (slots,), generator=generator)
    lengths = (first[:, None] + torch.arange(verified)).flatten().to(DEVICE)
    places = torch.randperm(3, generator=generator)[:slots].repeat_interleave(verified).to(DEVICE)
    cache = layer_cache(3, kv_heads, 310, head_dim, seed=seed, dtype=torch.int8 if int8 else dtype)
    for slot in range(3):
        for part in cache[2:] if int8 else cache[:2]:
            part[slot, :, int(lengths[places == slot].max()) if slot in places else 0 :] = float("nan")
    q = normal(tokens, q_heads, head_dim, seed=seed + 1, dtype=dtype)
    workspace = attention_workspace(tokens, q_heads, head_dim, splits=splits, device=torch.device(DEVICE))
    options = {"scale": head_dim**-0.5, "splits": splits, "rows_per_slot": verified}
    want = poisoned(tokens, q_heads, head_dim, dtype=torch.float32)
    decode_attention_reference(q, cache, places, lengths, None, want, **options)
    for _ in range(2):  # the second call finds the counters as the first left them
        got = poisoned(tokens, q_heads, head_dim, dtype=torch.float32)
        decode_attention(q, cache, places, lengths, workspace, got, **options)
        assert error(got, want) < (5e-3 if dtype == torch.bfloat16 else 2e-6)
        assert not workspace.arrived.any()


@examples(8, unshrunk)
@given(
    rows=st.integers(1, 2),
    vocab=st.sampled_from([1, 97, 128, 3000]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 200, 600, 9999]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.05, 0.999]),
    steps=st.sampled_from([0, 2, 8]),
    seed=st.integers(0, 999),
)
def test_sample(rows, vocab, temperature, top_k, top_p, steps, seed):
    """Token for token what gpt_fast.sampling draws, ties (steps: rounded logits) by lowest id included."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    logits = ((logits * steps).round() / steps if steps else logits).to(DEVICE)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64).to(DEVICE)
    params = [torch.full((rows,), value, device=DEVICE) for value in (temperature, top_k, top_p)]
    params[0][-1] = 0.7  # rows differ
    workspace = sampler_workspace(rows, vocab, torch.device(DEVICE))
    want = torch.full((rows,), -7, dtype=torch.int64, device=DEVICE)
    sample_reference(logits, *params, uniform, None, want)
    for _ in range(2):  # the second call finds the counters as the first left them
        got = torch.full_like(want, -7)
        sample(logits, *params, uniform, workspace, got)
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_row_of_no_numbers_gets_no_token(wrong):
    logits = normal(2, 300, seed=1, dtype=torch.float32)
    logits[0, 5:] = wrong
    logits[0, :5] = float("-inf")
    got = torch.full((2,), -7, device=DEVICE)
    options = [torch.tensor(pair, device=DEVICE) for pair in ([1.0, 0.0], [0, 0], [1.0, 1.0])]
    uniform = torch.full((2,), 0.5, dtype=torch.float64, device=DEVICE)
    sample(logits, *options, uniform, sampler_workspace(2, 300, torch.device(DEVICE)), got)
    assert got.tolist() == [-1, int(logits[1].argmax())]


@pytest.mark.parametrize("levels, top_k, top_p", [(1, 3, 1.0), (4, 0, 0.6), (4, 40, 0.9), (9000, 600, 1.0)])
def test_sample_at_the_edges(levels, top_k, top_p):
    """Ties at the cut (a few levels only), more than the candidates hold, and draws at both ends of the range."""
    draws = torch.tensor([0.0, 0.3, 0.97, 1 - 2**-53], dtype=torch.float64, device=DEVICE)
    vocab = 9000 if top_k > 512 else 700  # of 9000, the peaks bound the candidates
    logits = -((torch.arange(1, vocab + 1, device=DEVICE) * 37 % (vocab + 1)) % (levels + 1)).float() / 100
    logits = logits.repeat(len(draws), 1)
    params = [torch.full((len(draws),), value, device=DEVICE) for value in (1.0, top_k, top_p)]
    want, got = (torch.full((len(draws),), -7, device=DEVICE) for _ in range(2))
    sample_reference(logits, *params, draws, None, want)
    workspace = sampler_workspace(len(draws), vocab, torch.device(DEVICE))
    sample(logits, *params, draws, workspace, got)
    assert got.tolist() == want.tolist()
    assert not workspace.found.any() and not workspace.arrived.any()  # ready for the next call
