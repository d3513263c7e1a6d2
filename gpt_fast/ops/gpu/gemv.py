"""The GEMV family: every product with a weight in a decode step, fused with what stands before and after it.

Shapes: M tokens (1..16), N rows of the weight, K inputs, D model dim, H query heads, E head_dim, I feed-forward dim,
V vocabulary, P positions.

Each operation writes tensors that its caller allocated, and has a twin `*_reference` of the same signature in plain
PyTorch, which computes in float32 from the same packed weights and rounds once. Kernels: gemv_triton.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast.ops.gpu.launch import Launch, divide_up, is_native, power_of_two
from gpt_fast.ops.gpu.layer_cache import HeadWorkspace, LayerCache
from gpt_fast.ops.gpu.pack import GpuLinear, dequantize

MAX_TOKENS = 16
INTEGERS = ("int8", "int8g", "int4")


class Tile(NamedTuple):
    """What one program holds at a time: rows of the weight times bytes of each."""

    rows: int
    row_bytes: int
    warps: int
    stages: int = 1


# By how many rows the weight has at most. One token: a tile's bytes are the 16-byte loads in flight, of which a
# processor wants 32 KiB or more over its programs, so the fewer programs a weight makes, the more each holds. More rows
# a program where x is costly to prepare (int8, int4: two planes).
ANY = 1 << 30
ONE_TOKEN = {
    "bf16": {2048: Tile(4, 4096, 4), 8192: Tile(4, 2048, 4), ANY: Tile(8, 2048, 4)},
    "fp8": {2048: Tile(4, 2048, 4), 8192: Tile(4, 2048, 4), ANY: Tile(8, 1024, 4)},
    "int8": {8192: Tile(8, 2048, 8), ANY: Tile(16, 1024, 4)},
    "int8g": {8192: Tile(8, 2048, 8), ANY: Tile(16, 1024, 4)},
    "int4": {8192: Tile(16, 1024, 8), ANY: Tile(32, 512, 4)},
}
# Two to sixteen: tensor cores, each warp of a program with a share of K, tiles copied to shared memory ahead of use.
FEW_TOKENS = {
    "bf16": {8192: Tile(16, 512, 4, 4), ANY: Tile(32, 256, 4, 4)},
    "fp8": {8192: Tile(16, 256, 4, 4), ANY: Tile(32, 256, 4, 4)},
    "int8": {8192: Tile(16, 256, 4, 4), ANY: Tile(32, 256, 4, 4)},
    "int8g": {8192: Tile(16, 256, 4, 4), ANY: Tile(32, 256, 4, 4)},
    "int4": {8192: Tile(16, 256, 4, 4), ANY: Tile(32, 256, 4, 4)},
}


# --------------------------------------------------------------------------------- the operations


def norm_qkv_rope_write(
    x_MD: Tensor,
    norm_D: Tensor,
    qkv: GpuLinear,
    cos_sin_P2E: Tensor,
    positions_M: Tensor,
    slots_M: Tensor,
    cache: LayerCache,
    workspace: HeadWorkspace | None,
    out_q_MHD: Tensor,
    *,
    eps: float,
) -> None:
    """RMSNorm, the fused query/key/value projection, RoPE on neighbouring pairs; keys and values go to the cache.

    cos_sin_P2E: float32, of the rotated pairs (rope.rope_table). A token's keys and values land at
    [slots_M, :, positions_M]; no two tokens of one call may share a place. Head sizes a multiple of 16.
    workspace: needed by an int8 cache only.
    """
    qkv_launch(x_MD, norm_D, qkv, cos_sin_P2E, positions_M, slots_M, cache, workspace, out_q_MHD, eps=eps).run()


def linear_residual(x_MK: Tensor, w: GpuLinear, residual_MN: Tensor, out_MN: Tensor) -> None:
    """out = residual + x W^T: the output and down projections. out may be residual itself."""
    linear_launch(x_MK, None, w, residual_MN, out_MN, eps=0.0).run()


def norm_gate_up_silu(x_MD: Tensor, norm_D: Tensor, gate_up: GpuLinear, out_MI: Tensor, *, eps: float) -> None:
    """RMSNorm, then silu(gate) * up, of a weight whose rows alternate gate and up (pack.interleave)."""
    gate_up_launch(x_MD, norm_D, gate_up, out_MI, eps=eps).run()


def norm_head(x_MD: Tensor, norm_D: Tensor, head: GpuLinear, out_logits_MV: Tensor, *, eps: float) -> None:
    """RMSNorm, then the output head: float32 logits."""
    linear_launch(x_MD, norm_D, head, None, out_logits_MV, eps=eps).run()


# -------------------------------------------------------------------------------------- the twins


def norm_qkv_rope_write_reference(
    x_MD: Tensor,
    norm_D: Tensor,
    qkv: GpuLinear,
    cos_sin_P2E: Tensor,
    positions_M: Tensor,
    slots_M: Tensor,
    cache: LayerCache,
    workspace: HeadWorkspace | None,
    out_q_MHD: Tensor,
    *,
    eps: float,
) -> None:
    (_, q_heads, head_dim), kv_heads = out_q_MHD.shape, cache.k_NHTD.shape[1]
    qkv_MHD = (rms_norm(x_MD, norm_D, eps) @ dequantize(qkv).T).unflatten(1, (-1, head_dim))
    q_MHD, k_MHD, v_MHD = qkv_MHD.split((q_heads, kv_heads, kv_heads), dim=1)
    cos_sin_M2E = cos_sin_P2E[positions_M]
    out_q_MHD.copy_(rotate(q_MHD, cos_sin_M2E))
    cache.write(slots_M, positions_M, rotate(k_MHD, cos_sin_M2E), v_MHD)


def linear_residual_reference(x_MK: Tensor, w: GpuLinear, residual_MN: Tensor, out_MN: Tensor) -> None:
    out_MN.copy_(residual_MN.float() + x_MK.float() @ dequantize(w).T)


def norm_gate_up_silu_reference(
    x_MD: Tensor, norm_D: Tensor, gate_up: GpuLinear, out_MI: Tensor, *, eps: float
) -> None:
    gate_up_MI2 = (rms_norm(x_MD, norm_D, eps) @ dequantize(gate_up).T).unflatten(1, (-1, 2))
    out_MI.copy_(F.silu(gate_up_MI2[..., 0]) * gate_up_MI2[..., 1])


def norm_head_reference(x_MD: Tensor, norm_D: Tensor, head: GpuLinear, out_logits_MV: Tensor, *, eps: float) -> None:
    out_logits_MV.copy_(rms_norm(x_MD, norm_D, eps) @ dequantize(head).T)


def rms_norm(x_MD: Tensor, norm_D: Tensor, eps: float) -> Tensor:
    x_MD = x_MD.float()
    return x_MD * torch.rsqrt(x_MD.square().mean(-1, keepdim=True) + eps) * norm_D.float()


def rotate(x_MHD: Tensor, cos_sin_M2E: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864) on neighbouring pairs of the first elements of each head, as rope.apply_rope."""
    cos_M1E, sin_M1E = cos_sin_M2E[:, None, 0], cos_sin_M2E[:, None, 1]
    rotary = 2 * cos_M1E.shape[-1]
    even, odd = x_MHD[..., 0:rotary:2], x_MHD[..., 1:rotary:2]
    rotated = torch.stack((even * cos_M1E - odd * sin_M1E, odd * cos_M1E + even * sin_M1E), dim=-1).flatten(-2)
    return torch.cat((rotated, x_MHD[..., rotary:]), dim=-1)


# ------------------------------------------------------------------------------------- the launches


def linear_launch(
    x_MK: Tensor, norm_K: Tensor | None, w: GpuLinear, residual_MN: Tensor | None, out_MN: Tensor, *, eps: float
) -> Launch:
    from gpt_fast.ops.gpu.gemv_triton import linear_residual_kernel

    extra = {"residual": out_MN if residual_MN is None else residual_MN, "out": out_MN, "n": w.n}
    constants = {"RESIDUAL": residual_MN is not None}
    return launch(linear_residual_kernel, x_MK, norm_K, w, extra, constants, eps)


def gate_up_launch(x_MD: Tensor, norm_D: Tensor, gate_up: GpuLinear, out_MI: Tensor, *, eps: float) -> Launch:
    from gpt_fast.ops.gpu.gemv_triton import norm_gate_up_silu_kernel

    return launch(norm_gate_up_silu_kernel, x_MD, norm_D, gate_up, {"out": out_MI, "n": gate_up.n}, {}, eps)


def qkv_launch(
    x_MD: Tensor,
    norm_D: Tensor,
    qkv: GpuLinear,
    cos_sin_P2E: Tensor,
    positions_M: Tensor,
    slots_M: Tensor,
    cache: LayerCache,
    workspace: HeadWorkspace | None,
    out_q_MHD: Tensor,
    *,
    eps: float,
) -> Launch:
    from gpt_fast.ops.gpu.gemv_triton import norm_qkv_rope_write_kernel

    _, kv_heads, _, head_dim = cache.k_NHTD.shape
    if head_dim % 16:
        raise ValueError(f"head_dim: the QKV kernel's programs hold rows of one head (got {head_dim}, allowed n * 16)")
    scaled = cache.k_scale_NHT is not None
    if scaled and workspace is None:
        raise ValueError("workspace: an int8 cache needs one")
    between = workspace._asdict() if scaled and workspace else {"heads": out_q_MHD, "arrived": out_q_MHD}
    extra = {
        "cos_sin": cos_sin_P2E,
        "positions": positions_M,
        "slots": slots_M,
        **cache.arguments(),
        **between,
        "out_q": out_q_MHD,
        "q_heads": out_q_MHD.shape[1],
        "kv_heads": kv_heads,
    }
    constants = {
        "HEAD_DIM": head_dim,
        "WIDTH": power_of_two(head_dim),
        "ROTARY": 2 * cos_sin_P2E.shape[-1],
        "SCALED": scaled,
    }
    return launch(norm_qkv_rope_write_kernel, x_MD, norm_D, qkv, extra, constants, eps, row_unit=head_dim)


def launch(
    kernel: Any,
    x_MK: Tensor,
    norm_K: Tensor | None,
    w: GpuLinear,
    extra: dict[str, Any],
    constants: dict[str, Any],
    eps: float,
    *,
    row_unit: int = ANY,
) -> Launch:
    """What every kernel of the family shares. row_unit: no program's rows may lie on both sides of a multiple of it.

    ValueError for more tokens than MAX_TOKENS.
    """
    if not 1 <= len(x_MK) <= MAX_TOKENS:
        raise ValueError(f"tokens: what the small-M kernels hold (got {len(x_MK)}, allowed 1..{MAX_TOKENS})")
    one = len(x_MK) == 1
    weight = w.weight.view(torch.int32) if one and w.kind in INTEGERS else w.weight
    tile = tile_for(w, one=one)
    rows = min(tile.rows, row_unit & -row_unit)  # the largest power of two that divides it
    columns = min(tile.row_bytes // weight.element_size(), power_of_two(weight.shape[1]))
    columns = max(columns, 16 * tile.warps)  # a share of K feeds at least one tensor-core instruction
    unused, most = x_MK, 1 if one else 8 if len(x_MK) <= 8 else 16
    group_bytes = w.group // (2 if w.kind == "int4" else 1)
    in_groups = w.kind == "int8g" or (w.kind == "int4" and most == 8)  # where a share must be of one group
    shares = max(tile.warps, columns // group_bytes) if in_groups else tile.warps
    arguments = {
        "x": x_MK,
        "norm": unused if norm_K is None else norm_K,
        "weight": weight,
        "scale": unused if w.scale is None else w.scale,
        "zero": unused if w.zero is None else w.zero,
        "tokens": len(x_MK),
        "k": w.k,
        "eps": eps,
        **extra,
    }
    shared = {
        "KIND": w.kind,
        "NORM": norm_K is not None,
        "GROUP": w.group,
        "TOKENS": most,
        "ROWS": rows,
        "COLUMNS": columns,
        "SHARES": shares,
        "EVEN": weight.shape[1] % columns == 0,
        "NATIVE": is_native(x_MK),
    }
    return Launch(kernel, (divide_up(w.n, rows),), arguments, shared | constants, tile.warps, tile.stages)


def tile_for(w: GpuLinear, *, one: bool) -> Tile:
    table = (ONE_TOKEN if one else FEW_TOKENS)[w.kind]
    return next(tile for limit, tile in table.items() if w.n <= limit)
