"""Each GPU kernel against the same product in float64, within the bound that its docstring states.

A bound is componentwise: so much of the sum of |x w|, whatever cancels in it. NaN is within none.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are Triton's")

from gpt_fast.ops.gpu import gemv
from gpt_fast.ops.gpu.attention import attention_workspace, decode_attention
from gpt_fast.ops.gpu.layer_cache import head_workspace
from gpt_fast.ops.gpu.pack import dequantize
from gpt_fast.ops.gpu.sampler import sample, sampler_workspace
from support.gpu_cases import DEVICE, layer_cache, normal, poisoned, weight

pytestmark = pytest.mark.slow  # Triton's interpreter

BF16, FP32 = torch.bfloat16, torch.float32
KINDS = ("bf16", "int8", "int8g", "int4", "fp8")
CASES = [  # tokens, rows, columns, dtype
    (1, 33, 576, BF16),
    (1, 40, 96, FP32),
    (5, 66, 576, BF16),
    (8, 17, 96, FP32),
    (16, 40, 192, BF16),
]
ROUNDING = 2**-8 if DEVICE == "cuda" else 2**-7  # to bfloat16, which Triton's interpreter cuts off
kinds = pytest.mark.parametrize("kind", KINDS)
cases = pytest.mark.parametrize(("tokens", "rows", "columns", "dtype"), CASES)


def within(got, want, bound):
    off = (got.double() - want).abs()
    assert (off <= bound).all(), f"{float((off / bound).max()):.2f} times the bound"


def product(x_MK, w, *, norm_K=None):
    """x W^T in float64 of what the kernel multiplies before rsqrt, and its bound (gemv_triton.dots)."""
    x_MK, w_NK = x_MK.double() * (1 if norm_K is None else norm_K.double()), dequantize(w).double()
    want_MN, size_MN = x_MK @ w_NK.T, x_MK.abs() @ w_NK.abs().T
    tokens = len(x_MK)
    if w.zero is not None:  # q * scale and zero are added apart
        zero_NK = w.zero.double().repeat_interleave(w.group, 1)
        size_MN = x_MK.abs() @ ((w_NK - zero_NK).abs() + zero_NK.abs()).T
        if tokens > 1:  # 128 + q
            size_MN += 2 * 128 * x_MK.abs() @ w.scale.double().repeat_interleave(w.group, 1).T
    bound_MN = (32 + w.k / 64) * 2**-24 * size_MN
    if tokens == 1 and w.kind in gemv.INTEGERS:
        chunk = 32 if w.kind == "int4" else 16
        largest_MK = x_MK.abs().unflatten(1, (-1, chunk)).amax(-1).repeat_interleave(chunk, 1)
        codes_NK = w_NK if w.zero is None else w_NK - zero_NK
        bound_MN += 0.52 / 32512 * largest_MK @ codes_NK.abs().T
    return want_MN, bound_MN


def rounded(x_MK, w, *, norm_K=None):
    """What several tokens' inputs and int4 weights lose on their way to the tensor cores."""
    tokens, dtype = len(x_MK), x_MK.dtype
    x_MK, w_NK = x_MK.double() * (1 if norm_K is None else norm_K.double()), dequantize(w).double()
    unit = ROUNDING if dtype == BF16 else 2**-24
    loss_MN = x_MK.abs() @ w_NK.abs().T * (unit if tokens > 1 and norm_K is not None else 0)
    if tokens > 8 and w.kind == "int4":
        scale_NK, zero_NK = (v.double().repeat_interleave(w.group, 1) for v in (w.scale, w.zero))
        center_NK = zero_NK + 8 * scale_NK
        loss_MN += 2 * unit * x_MK.abs() @ ((w_NK - center_NK).abs() + center_NK.abs() + w_NK.abs()).T
    return loss_MN


def normed(x_MK, norm_K, w):
    """RMSNorm and product in float64, and the bound of the kernel's."""
    inverse_M1 = torch.rsqrt(x_MK.double().square().mean(1, keepdim=True) + 1e-5)
    want_MN, bound_MN = product(x_MK, w, norm_K=norm_K)
    bound_MN = bound_MN + rounded(x_MK, w, norm_K=norm_K)
    return want_MN * inverse_M1, bound_MN * inverse_M1 * 1.01 + 2**-18 * (want_MN * inverse_M1).abs()


@kinds
@cases
def test_linear_residual(kind, tokens, rows, columns, dtype):
    w, x = weight(kind, rows, columns, seed=rows, dtype=dtype), normal(tokens, columns, seed=tokens, dtype=dtype)
    residual, got = normal(tokens, rows, seed=3, dtype=dtype), poisoned(tokens, rows, dtype=FP32)
    gemv.linear_residual(x, w, residual, got)
    want, bound = product(x, w)
    want += residual.double()
    within(got, want, bound + rounded(x, w) + 2**-23 * want.abs())


@kinds
@cases
def test_norm_head(kind, tokens, rows, columns, dtype):
    w, x = weight(kind, rows, columns, seed=rows, dtype=dtype), normal(tokens, columns, seed=tokens, dtype=dtype)
    norm, got = normal(columns, seed=3, dtype=dtype), poisoned(tokens, rows, dtype=FP32)
    gemv.norm_head(x, norm, w, got, eps=1e-5)
    within(got, *normed(x, norm, w))


@kinds
@cases
def test_norm_gate_up_silu(kind, tokens, rows, columns, dtype):
    rows = rows // 2 * 2
    w, x = weight(kind, rows, columns, seed=rows, dtype=dtype), normal(tokens, columns, seed=tokens, dtype=dtype)
    norm, got = normal(columns, seed=3, dtype=dtype), poisoned(tokens, rows // 2, dtype=FP32)
    gemv.norm_gate_up_silu(x, norm, w, got, eps=1e-5)
    (gate, up), (gate_off, up_off) = (y.unflatten(1, (-1, 2)).unbind(2) for y in normed(x, norm, w))
    want = F.silu(gate) * up
    steep = 1.1 * gate_off  # the slope of silu is at most 1.1
    within(got, want, steep * up.abs() + F.silu(gate).abs() * up_off + steep * up_off + 2**-20 * want.abs())


@kinds
@pytest.mark.parametrize("cached", [FP32, torch.int8])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "dtype"),
    [(1, (3, 1), 80, BF16), (5, (2, 1), 64, BF16), (16, (8, 1), 32, FP32)],
)
def test_norm_qkv_rope_write(kind, cached, tokens, heads, head_dim, dtype):
    (q_heads, kv_heads), columns = heads, 96
    w = weight(kind, (q_heads + 2 * kv_heads) * head_dim, columns, seed=1, dtype=dtype)
    x, norm = normal(tokens, columns, seed=2, dtype=dtype), normal(columns, seed=3, dtype=dtype)
    angles = normal(20, head_dim // 2, seed=4, dtype=FP32) * 3
    cos_sin = torch.stack((angles.cos(), angles.sin()), dim=1)
    places = torch.randperm(60, generator=torch.Generator().manual_seed(5))[:tokens].to(DEVICE)
    slots, positions = places // 20, places % 20
    cache = layer_cache(3, kv_heads, 20, head_dim, seed=6, dtype=cached)
    got_q = poisoned(tokens, q_heads, head_dim, dtype=FP32)
    workspace = head_workspace(tokens, kv_heads, head_dim, torch.device(DEVICE))
    gemv.norm_qkv_rope_write(x, norm, w, cos_sin, positions, slots, cache, workspace, got_q, eps=1e-5)
    flat, off = (y.unflatten(1, (-1, head_dim)) for y in normed(x, norm, w))
    turns = flat[:, : q_heads + kv_heads]
    want = gemv.rotate(turns, cos_sin[positions].double())
    pairs = (off[:, : q_heads + kv_heads] + 2**-20 * turns.abs()).unflatten(2, (-1, 2)).sum(3)
    bound = pairs.repeat_interleave(2, 2)  # |cos| and |sin| are at most 1
    within(got_q, want[:, :q_heads], bound[:, :q_heads])
    values = slice(q_heads + kv_heads, None)
    keys = (cache.k_NHTD, cache.k_scale_NHT, want[:, q_heads:], bound[:, q_heads:])
    for held, steps, exact, near in (keys, (cache.v_NHTD, cache.v_scale_NHT, flat[:, values], off[:, values])):
        got = held[slots, :, positions].double()
        if steps is not None:
            step = steps[slots, :, positions].double()[..., None]
            within(step, exact.abs().amax(2, keepdim=True) / 127, near.amax(2, keepdim=True) / 127 + 2**-22 * step)
            got, near = got * step, near + 0.501 * step
        within(got, exact, near)


@pytest.mark.parametrize("cached", ["own", "int8"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(
    ("heads", "head_dim", "verified", "splits"),
    [((1, 1), 64, 1, 1), ((6, 2), 80, 1, 3), ((7, 1), 96, 3, 2), ((8, 1), 128, 1, 4)],
)
def test_decode_attention(cached, dtype, heads, head_dim, verified, splits):
    q_heads, kv_heads = heads
    lengths = (torch.tensor([3, 201])[:, None] + torch.arange(verified)).flatten().to(DEVICE)
    slots = torch.tensor([2, 0]).repeat_interleave(verified).to(DEVICE)
    tokens, scale = 2 * verified, head_dim**-0.5
    cache = layer_cache(3, kv_heads, 210, head_dim, seed=1, dtype=torch.int8 if cached == "int8" else dtype)
    q, got = normal(tokens, q_heads, head_dim, seed=2, dtype=dtype), poisoned(tokens, q_heads, head_dim, dtype=FP32)
    workspace = attention_workspace(tokens, q_heads, head_dim, splits=splits, device=torch.device(DEVICE))
    decode_attention(q, cache, slots, lengths, workspace, got, scale=scale, splits=splits, rows_per_slot=verified)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        k_KTD, v_KTD = (x.double().repeat_interleave(q_heads // kv_heads, 0) for x in exactly(cache, slot, length))
        q_H1D = q[row].double()[:, None]
        weight_H1T = (scale * q_H1D @ k_KTD.mT).softmax(-1)
        score_off = (scale * (q_H1D.abs() @ k_KTD.mT.abs())).amax(-1, keepdim=True) * (head_dim + 8) * 2**-24
        unit = 2 * score_off + (32 + length / 64) * 2**-24 + (ROUNDING if dtype == BF16 else 0)
        within(got[row], (weight_H1T @ v_KTD)[:, 0], (unit * (weight_H1T @ v_KTD.abs()))[:, 0])


def exactly(cache, slot, length):
    """Keys and values of a slot in float64: integers times their scales, unrounded."""
    scales = (cache.k_scale_NHT, cache.v_scale_NHT)
    for held, steps in zip((cache.k_NHTD, cache.v_NHTD), scales, strict=True):
        exact = held[slot, :, :length].double()
        yield exact if steps is None else exact * steps[slot, :, :length, None].double()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_sample(temperature):
    """A draw lies in its token's part of the float64 distribution, or 2**-20 beside it."""
    logits = normal(1, 700, seed=1, dtype=FP32).expand(48, -1).contiguous()
    uniform = ((torch.arange(48, dtype=torch.float64) + 0.5) / 48).to(DEVICE)
    columns = [torch.full((48,), value, device=DEVICE) for value in (temperature, 0, 1.0)]
    got = torch.full((48,), -7, device=DEVICE)
    sample(logits, *columns, uniform, sampler_workspace(48, 700, torch.device(DEVICE)), got)
    weight_V = (logits[0].double() / temperature).softmax(0)
    end = weight_V.cumsum(0)[got]
    assert (uniform <= end + 2**-20).all() and (uniform >= end - weight_V[got] - 2**-20).all()
    assert len(set(got.tolist())) > 5
