"""Tensor parallelism: a built model cut down to the share of one of several ranks that compute every step together.

The cut is Megatron-LM's (Shoeybi et al., arXiv:1909.08053), as in gpt-fast's tp.py (BSD-3). Query, key, value, gate
and up projections keep the outputs of this rank's heads and features; output and down projections the inputs that
those are, so that every rank has a part of the sum, which one all-reduce after attention and one after feed-forward
completes. Embedding and head are cut by vocabulary. Norms and a mixture's router are whole on every rank.

Shapes: B rows, S tokens of a row, D model dim, V vocabulary (of all ranks), H query heads, K KV heads, E head_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt_fast.config import ConfigError, ModelConfig
from gpt_fast.model.transformer import MoE, Transformer


class Ranks(NamedTuple):
    """This process's place among `size` ranks, 0..size-1: those of torch.distributed's default group."""

    rank: int
    size: int

    def share(self, items: Tensor) -> Tensor:
        """This rank's run of the items along their first dim, which `size` divides."""
        return items.chunk(self.size)[self.rank]


def shard(model: Transformer, ranks: Ranks) -> None:
    """Turn a whole model into this rank's share, in place; all ranks must then call it with the same inputs.

    Its logits come whole, to every rank; its config, hence a KVCache made from it, has this rank's heads only. Linear
    layers and embeddings that are not torch's must have select_rows and select_columns, keep_rows (quantize.linear),
    and must not be packed yet.

    Raises:
        ConfigError: n_head, n_kv_head, intermediate_size or vocab_size is no multiple of the number of ranks.
    """
    model.config = local_config(model.config, ranks)
    block: Any
    for block in model.layers:
        shard_attention(block.attention, model.config, ranks)
        experts = block.feed_forward.experts if isinstance(block.feed_forward, MoE) else [block.feed_forward]
        for expert in experts:
            shard_feed_forward(expert, ranks)
        for branch in (block.attention, block.feed_forward):
            branch.register_forward_hook(lambda _module, _args, part_BSD: all_reduce(part_BSD))
    shard_vocabulary(model, ranks)


def is_sharded(model: Transformer) -> bool:
    return isinstance(model.tok_embeddings, VocabularyShard)


def local_config(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The config of one rank's share; dim and vocabulary are the whole model's."""
    for name in ("n_head", "n_kv_head", "intermediate_size", "vocab_size"):
        if (value := getattr(config, name)) % ranks.size:
            problem, allowed = f"cannot be divided among {ranks.size} ranks", f"a multiple of {ranks.size}"
            raise ConfigError(name, problem, got=value, allowed=allowed)
    names = ("n_head", "n_kv_head", "intermediate_size")
    return dataclasses.replace(config, **{name: getattr(config, name) // ranks.size for name in names})


def shard_attention(attention: Any, local: ModelConfig, ranks: Ranks) -> None:
    H, K, E = attention.n_head, attention.n_kv_head, attention.head_dim
    q_HE, k_KE, v_KE = torch.arange((H + 2 * K) * E).view(-1, E).split((H, K, K))
    rows = torch.cat([ranks.share(part) for part in (q_HE, k_KE, v_KE)]).flatten()
    attention.wqkv = select_rows(attention.wqkv, rows)
    attention.wo = select_columns(attention.wo, ranks)
    attention.n_head, attention.n_kv_head = local.n_head, local.n_kv_head


def shard_feed_forward(network: Any, ranks: Ranks) -> None:
    rows = ranks.share(torch.arange(network.w1.out_features))
    network.w1, network.w3 = select_rows(network.w1, rows), select_rows(network.w3, rows)
    network.w2 = select_columns(network.w2, ranks)


def shard_vocabulary(model: Any, ranks: Ranks) -> None:
    rows = ranks.share(torch.arange(model.config.vocab_size))
    embedding = model.tok_embeddings
    if isinstance(embedding, nn.Embedding):
        embedding.weight, embedding.num_embeddings = frozen(embedding.weight[rows]), len(rows)
    else:
        embedding.keep_rows(rows)
    if model.config.tie_embeddings:
        model.tie_output()
    else:
        model.output = select_rows(model.output, rows)
    model.output.register_forward_hook(lambda _module, _args, part_BSV: all_gather(part_BSV, ranks))
    model.tok_embeddings = VocabularyShard(embedding, first=int(rows[0]), count=len(rows))


class VocabularyShard(nn.Module):
    """An embedding of tokens first..first+count-1; the vectors of all others come from their ranks."""

    def __init__(self, embedding: nn.Module, *, first: int, count: int) -> None:
        super().__init__()
        self.embedding, self.first, self.count = embedding, first, count

    def forward(self, tokens_BS: Tensor) -> Tensor:
        own_BS = tokens_BS - self.first
        elsewhere_BS = (own_BS < 0) | (own_BS >= self.count)
        x_BSD = self.embedding(own_BS.masked_fill(elsewhere_BS, 0))
        return all_reduce(x_BSD.masked_fill(elsewhere_BS[..., None], 0))


def select_rows(linear: Any, rows: Tensor) -> Any:
    """The linear of these output features."""
    if not isinstance(linear, nn.Linear):
        return linear.select_rows(rows)
    linear.weight, linear.out_features = frozen(linear.weight[rows]), len(rows)
    linear.bias = None if linear.bias is None else frozen(linear.bias[rows])
    return linear


def select_columns(linear: Any, ranks: Ranks) -> Any:
    """The linear of this rank's inputs; the bias is added once in the sum over ranks, by rank 0."""
    width = linear.in_features // ranks.size
    start, stop = ranks.rank * width, (ranks.rank + 1) * width
    if isinstance(linear, nn.Linear):
        linear.weight, linear.in_features = frozen(linear.weight[:, start:stop].clone()), width
    else:
        linear = linear.select_columns(start, stop)
    if ranks.rank:
        linear.bias = None
    return linear


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def all_reduce(part: Tensor) -> Tensor:
    """The sum over all ranks, in the tensor itself; the same bytes on each."""
    dist.all_reduce(part)
    return part


def all_gather(part_BSV: Tensor, ranks: Ranks) -> Tensor:
    """Every rank's part, side by side along the last dim."""
    parts = [torch.empty_like(part_BSV) for _ in range(ranks.size)]
    dist.all_gather(parts, part_BSV.contiguous())
    return torch.cat(parts, dim=-1)
