"""Decode attention: a few tokens over what their slots have cached, split over positions, and nothing else read.

Shapes: M tokens, H query heads, D head_dim, K KV heads, G query heads of one, T positions.

Flash-decoding (Dao et al., 2023): each program takes one share of the positions of one KV head, for all query heads
that share it, and keeps a running softmax; the last program of a KV head to finish combines the shares.
Kernel: attention_triton.py; twin: decode_attention_reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.ops.gpu.launch import Launch, is_native, power_of_two
from gpt_fast.ops.gpu.layer_cache import LayerCache

POSITIONS = 64  # of a step of the loop: 32 KiB of keys and values at head_dim 128


class AttentionWorkspace(NamedTuple):
    """What the shares of one call leave for the program that combines them."""

    partial: Tensor  # float32 [splits * M * H * D]
    best: Tensor  # float32 [splits * M * H]
    total: Tensor
    arrived: Tensor  # int32 [M * KV heads], 0 between calls


def attention_workspace(
    tokens: int, q_heads: int, head_dim: int, *, splits: int, device: torch.device
) -> AttentionWorkspace:
    """Enough for up to `tokens` tokens in up to `splits` shares."""
    size = splits * tokens * q_heads
    partial, best, total = torch.empty(size * (head_dim + 2), dtype=torch.float32, device=device).split(
        (size * head_dim, size, size)
    )
    return AttentionWorkspace(partial, best, total, torch.zeros(tokens * q_heads, dtype=torch.int32, device=device))


def decode_attention(
    q_MHD: Tensor,
    cache: LayerCache,
    slots_M: Tensor,
    lengths_M: Tensor,
    workspace: AttentionWorkspace,
    out_MHD: Tensor,
    *,
    scale: float,
    splits: int,
    rows_per_slot: int = 1,
) -> None:
    """softmax(scale * q k^T) v of each token over positions 0..length-1 of its slot.

    lengths_M: at least 1. Each token has its own, so the tokens that a verification adds to one slot see each other as
    they must. splits: shares of the positions, any number from 1; a share is a multiple of 64 positions.
    rows_per_slot: that many neighbouring tokens are of one slot, whose cache is then read once for all of them.
    ValueError where M is no multiple of it.
    """
    attention_launch(
        q_MHD,
        cache,
        slots_M,
        lengths_M,
        workspace,
        out_MHD,
        scale=scale,
        splits=splits,
        rows_per_slot=rows_per_slot,
    ).run()


def decode_attention_reference(
    q_MHD: Tensor,
    cache: LayerCache,
    slots_M: Tensor,
    lengths_M: Tensor,
    workspace: AttentionWorkspace | None,
    out_MHD: Tensor,
    *,
    scale: float,
    splits: int,
    rows_per_slot: int = 1,
) -> None:
    """In float32, a token at a time; workspace, splits and rows_per_slot change nothing."""
    kv_heads = cache.k_NHTD.shape[1]
    for row, (slot, length) in enumerate(zip(slots_M.tolist(), lengths_M.tolist(), strict=True)):
        q_KGD = q_MHD[row].float().unflatten(0, (kv_heads, -1))
        k_KTD, v_KTD = (x_KTD.float() for x_KTD in cache.read(slot, length))
        weight_KGT = (scale * q_KGD @ k_KTD.transpose(1, 2)).softmax(-1)
        out_MHD[row] = (weight_KGT @ v_KTD).flatten(0, 1)


def attention_launch(
    q_MHD: Tensor,
    cache: LayerCache,
    slots_M: Tensor,
    lengths_M: Tensor,
    workspace: AttentionWorkspace,
    out_MHD: Tensor,
    *,
    scale: float,
    splits: int,
    rows_per_slot: int = 1,
) -> Launch:
    from gpt_fast.ops.gpu.attention_triton import decode_attention_kernel

    tokens, q_heads, head_dim = q_MHD.shape
    kv_heads = cache.k_NHTD.shape[1]
    group = q_heads // kv_heads
    if tokens % rows_per_slot:
        raise ValueError(f"rows_per_slot: must divide the tokens (got {rows_per_slot}, {tokens} tokens)")
    arguments = {
        "q": q_MHD,
        **cache.arguments(),
        "slots": slots_M,
        "lengths": lengths_M,
        **workspace._asdict(),
        "out": out_MHD,
        "scale": scale,
        "splits": splits,
        "rows": tokens,
        "q_heads": q_heads,
        "kv_heads": kv_heads,
    }
    constants = {
        "ROWS": rows_per_slot,
        "GROUP": group,
        "QUERIES": max(power_of_two(rows_per_slot * group), 16),
        "HEAD_DIM": head_dim,
        "WIDTH": power_of_two(head_dim),
        "POSITIONS": POSITIONS,
        "SCALED": cache.k_scale_NHT is not None,
        "NATIVE": is_native(q_MHD),
    }
    grid = (tokens // rows_per_slot * kv_heads, splits)
    return Launch(decode_attention_kernel, grid, arguments, constants, num_warps=4, num_stages=3)
