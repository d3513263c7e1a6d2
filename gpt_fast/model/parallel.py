"""Tensor parallelism: a built model cut down to the share of one of several ranks that compute every step together.

The cut is Megatron-LM's (Shoeybi et al., arXiv:1909.08053), as in gpt-fast's tp.py (BSD-3). Query, key, value, gate
and up projections keep the outputs of this rank's heads and features; output and down projections the inputs that
those are, so that every rank has a part of the sum, which one all-reduce after attention and one after feed-forward
completes. Embedding and head are cut by vocabulary. Norms and a mixture's router are whole on every rank. Who has
which heads, features and tokens, `shares` says.

Shapes: B rows, S tokens of a row, D model dim, V vocabulary (of all ranks), H query heads, K KV heads, E head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_fast.model.shares import Share, share_out
from gpt_fast.model.transformer import MoE, Transformer


class Ranks(NamedTuple):
    """This process's place among `size` ranks, 0..size-1: those of torch.distributed's default group."""

    rank: int
    size: int


def shard(model: Transformer, ranks: Ranks) -> None:
    """Turn a whole model into this rank's share, in place; all ranks must then call it with the same inputs.

    Its logits come whole, to every rank; its config, hence a KVCache made from it, has this rank's heads only. Linear
    layers and embeddings that are not torch's must have select_rows and select_columns, keep_rows (quantize.linear),
    and must not be packed yet.

    Raises:
        ConfigError: there are more ranks than query heads, features or tokens.
    """
    share = share_of(model, ranks)
    for block in model.layers:
        shard_block(block, share, ranks)
    shard_ends(model, share, ranks)


def share_of(model: Transformer, ranks: Ranks) -> Share:
    """What this rank will hold of a model that is still whole; its weights may be missing (meta)."""
    schemes = [getattr(module, "scheme", None) for module in model.layers.modules()]
    group = max((scheme.groupsize for scheme in schemes if scheme is not None), default=0)
    return share_out(model.config, *ranks, group=group)


def is_sharded(model: Transformer) -> bool:
    return isinstance(model.tok_embeddings, VocabularyShard)


def shard_block(block: Any, share: Share, ranks: Ranks) -> None:
    """One layer of the model."""
    shard_attention(block.attention, share, ranks)
    network = block.feed_forward
    for expert in network.experts if isinstance(network, MoE) else [network]:
        rows = indices(share.features)
        expert.w1, expert.w3 = select_rows(expert.w1, rows), select_rows(expert.w3, rows)
        expert.w2 = select_columns(expert.w2, share.features, ranks)
    for branch in (block.attention, network):
        branch.register_forward_hook(lambda _module, _args, part_BSD: all_reduce(part_BSD))


def shard_attention(attention: Any, share: Share, ranks: Ranks) -> None:
    H, K, E = attention.n_head, attention.n_kv_head, attention.head_dim
    q_HE, k_KE, v_KE = torch.arange((H + 2 * K) * E).view(-1, E).split((H, K, K))
    rows = [heads_E[indices(own)] for heads_E, own in ((q_HE, share.query), (k_KE, share.kv), (v_KE, share.kv))]
    attention.wqkv = select_rows(attention.wqkv, torch.cat(rows).flatten())
    # How many of its last rows are an earlier rank's too, for who counts weights.
    attention.wqkv.repeated = 0 if share.query.start == share.kv.start * (H // K) else 2 * E
    attention.wo = select_columns(attention.wo, range(share.query.start * E, share.query.stop * E), ranks)
    attention.n_head, attention.n_kv_head = len(share.query), len(share.kv)


def shard_ends(model: Any, share: Share, ranks: Ranks) -> None:
    """All but the layers: the embedding, the head, and the config."""
    own, embedding = share.vocabulary[ranks.rank], model.tok_embeddings
    rows = indices(own)
    if isinstance(embedding, nn.Embedding):
        embedding.weight, embedding.num_embeddings = frozen(embedding.weight[rows]), len(rows)
    else:
        embedding.keep_rows(rows)
    if model.config.tie_embeddings:
        model.tie_output()
    else:
        model.output = select_rows(model.output, rows)
    widths = [len(tokens) for tokens in share.vocabulary]
    model.output.register_forward_hook(lambda _module, _args, part_BSV: all_gather(part_BSV, widths))
    model.tok_embeddings = VocabularyShard(embedding, own)
    model.config = share.config(model.config)


class VocabularyShard(nn.Module):
    """An embedding of some tokens; the vectors of all others come from their ranks."""

    def __init__(self, embedding: nn.Module, tokens: range) -> None:
        super().__init__()
        self.embedding, self.first, self.count = embedding, tokens.start, len(tokens)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        own_BS = tokens_BS - self.first
        elsewhere_BS = (own_BS < 0) | (own_BS >= self.count)
        x_BSD = self.embedding(own_BS.masked_fill(elsewhere_BS, 0))
        return all_reduce(x_BSD.masked_fill(elsewhere_BS[..., None], 0))


def indices(run: range) -> Tensor:
    return torch.arange(run.start, run.stop)


def select_rows(linear: Any, rows: Tensor) -> Any:
    """The linear of these output features."""
    if not isinstance(linear, nn.Linear):
        return linear.select_rows(rows)
    linear.weight, linear.out_features = frozen(linear.weight[rows]), len(rows)
    linear.bias = None if linear.bias is None else frozen(linear.bias[rows])
    return linear


def select_columns(linear: Any, columns: range, ranks: Ranks) -> Any:
    """The linear of these inputs; the bias is added once in the sum over ranks, by rank 0."""
    if ranks.rank:
        linear.bias = None
    if not isinstance(linear, nn.Linear):
        return linear.select_columns(columns.start, columns.stop)
    linear.weight, linear.in_features = frozen(linear.weight[:, columns.start : columns.stop].clone()), len(columns)
    return linear


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def all_reduce(part: Tensor) -> Tensor:
    """The sum over all ranks, in the tensor itself; the same bytes on each."""
    dist.all_reduce(part)
    return part


def all_gather(part_BSV: Tensor, widths: list[int]) -> Tensor:
    """Every rank's part, side by side along the last dim; widths: of each. Those that are narrow travel padded."""
    padded_BSV = F.pad(part_BSV, (0, max(widths) - part_BSV.shape[-1])).contiguous()
    parts = [torch.empty_like(padded_BSV) for _ in widths]
    dist.all_gather(parts, padded_BSV)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)
