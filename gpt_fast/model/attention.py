"""Attention of a step's tokens over their slots' caches, in plain PyTorch.

Shapes: B rows, S tokens of a row, H query heads, K KV heads, G = H/K query heads a KV head, T cached positions
read (a bucket, not the allocation), D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(positions_BS: Tensor, length: int, *, group: int, window: int | None = None) -> Tensor:
    """Which cached position each query may read: bool [B, 1, G*S, T], True = may.

    A query at position p reads 0..p (the last `window` of them where the family slides). Queries of one KV
    head's group are stacked on the query axis, group outermost, as `attend` folds them.
    """
    keys_T = torch.arange(length, device=positions_BS.device)
    allowed_BST = keys_T <= positions_BS[:, :, None]
    if window is not None:
        allowed_BST = allowed_BST & (keys_T > positions_BS[:, :, None] - window)
    return allowed_BST.repeat(1, group, 1)[:, None]


def attend(q_BSHD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for grouped-query attention: [B, S, H, D].

    The G query heads that share a KV head are folded into the query axis, so the cache is read once and never
    expanded.
    """
    B, S, H, D = q_BSHD.shape
    K = k_BKTD.shape[1]
    q_BKQD = q_BSHD.view(B, S, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * S, D)
    out_BKQD = F.scaled_dot_product_attention(q_BKQD, k_BKTD, v_BKTD, attn_mask=mask)
    return out_BKQD.view(B, K, H // K, S, D).permute(0, 3, 1, 2, 4).reshape(B, S, H, D)
