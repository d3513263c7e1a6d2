"""The Transformer: one forward for prefill, decode and verification.

Shapes: B rows, S tokens of a row, D model dim, H query heads, K KV heads, E head_dim, F feed-forward dim,
V vocabulary, R rows whose logits are asked for, X experts.

Weights and names are gpt-fast's (github.com/pytorch-labs/gpt-fast, BSD-3): fused wqkv, and query/key rows in the
interleaved RoPE layout, i.e. rotated pairs are neighbours (2i, 2i+1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt_fast.config import ModelConfig
from gpt_fast.model.attention import attend, causal_mask
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.model.rope import apply_rope, rope_table


class Transformer(nn.Module):
    """Llama-family decoder. Build it on the meta device and load weights with `assign=True`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.tie_output()
        self.windows = {attention_window(config, index) for index in range(config.n_layer)}
        self.rope_cos_sin_PE: Tensor | None = None

    def tie_output(self) -> None:
        """Let the output head use the embedding's weight (again after a load that assigned new tensors)."""
        self.output.weight = self.tok_embeddings.weight

    def setup_rope(self, max_positions: int, device: torch.device) -> None:
        """Tabulate rotations for positions 0..max_positions (one more than usable: the cache's scratch)."""
        self.rope_cos_sin_PE = rope_table(self.config, max_positions + 1).to(device)

    def forward(self, batch: Batch) -> Tensor:
        """float32 logits of the batch's tokens: [B, S, V] or, with select_B, [B, V]."""
        x_BSD = self.tok_embeddings(batch.tokens_BS)
        rope_BS2E = self.rope_cos_sin_PE[batch.positions_BS]  # type: ignore[index]
        group = self.config.n_head // self.config.n_kv_head
        masks = {w: causal_mask(batch.positions_BS, batch.length, group=group, window=w) for w in self.windows}
        step = LayerInput(batch.positions_BS, batch.slots_B, batch.length, rope_BS2E, masks)
        for layer in self.layers:
            x_BSD = layer(x_BSD, step, batch.cache)
        if batch.select_B is not None:
            x_BSD = x_BSD[torch.arange(len(batch.select_B), device=x_BSD.device), batch.select_B]
        logits_BRV: Tensor = self.output(self.norm(x_BSD))
        return logits_BRV.float()


def attention_window(config: ModelConfig, layer: int) -> int | None:
    """How many of the last positions the layer sees; None: all."""
    return config.sliding_window if layer in config.sliding_layers else None


class LayerInput(NamedTuple):
    """What every layer of one forward shares."""

    positions_BS: Tensor
    slots_B: Tensor | None
    length: int
    rope_BS2E: Tensor
    masks: dict[int | None, Tensor]  # by attention window; None: a layer that sees everything


class Block(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention = Attention(config, index)
        self.feed_forward = MoE(config) if config.n_expert else FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BSD: Tensor, step: LayerInput, cache: KVCache) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), step, cache)
        ffn_BSD: Tensor = self.feed_forward(self.ffn_norm(x_BSD))
        return x_BSD + ffn_BSD


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        q_dim = config.n_head * config.head_dim
        self.wqkv = nn.Linear(config.dim, q_dim + 2 * config.kv_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=config.attention_out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.window = attention_window(config, index)

    def forward(self, x_BSD: Tensor, step: LayerInput, cache: KVCache) -> Tensor:
        B, S, _ = x_BSD.shape
        heads = self.n_head + 2 * self.n_kv_head
        qkv_BSHE = self.wqkv(x_BSD).view(B, S, heads, self.head_dim)
        q, k, v = qkv_BSHE.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        q = apply_rope(self.q_norm(q), step.rope_BS2E)
        k = apply_rope(self.k_norm(k), step.rope_BS2E)
        slots_B = torch.arange(B, device=x_BSD.device) if step.slots_B is None else step.slots_B
        cache.write(self.index, slots_B, step.positions_BS, k, v)
        k_BKTE, v_BKTE = cache.read(self.index, step.slots_B, B, step.length)
        out_BSHE = attend(q, k_BKTE.to(q.dtype), v_BKTE.to(q.dtype), step.masks[self.window])
        out_BSD: Tensor = self.wo(out_BSHE.reshape(B, S, self.n_head * self.head_dim))
        return out_BSD


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.intermediate_size, bias=config.mlp_bias)
        self.w3 = nn.Linear(config.dim, config.intermediate_size, bias=config.mlp_bias)
        self.w2 = nn.Linear(config.intermediate_size, config.dim, bias=config.mlp_bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        out_BSD: Tensor = self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return out_BSD


class MoE(nn.Module):
    """Mixtral's sparse feed-forward (arXiv:2401.04088): softmax over the chosen experts' router logits.

    Tokens are grouped by expert, so a prefill reads each expert once and never gathers weights per token.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.per_token = config.n_expert_per_token
        self.gate = nn.Linear(config.dim, config.n_expert, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_expert))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        scores_NX = self.gate(x_ND).float().softmax(-1)
        weight_NA, choice_NA = scores_NX.topk(self.per_token, dim=-1)
        weight_NA = (weight_NA / weight_NA.sum(-1, keepdim=True)).to(x_ND.dtype)
        out_ND = torch.zeros_like(x_ND)
        for index, expert in enumerate(self.experts):
            rows, nth = (choice_NA == index).nonzero(as_tuple=True)
            if len(rows):
                out_ND.index_add_(0, rows, expert(x_ND[rows]) * weight_NA[rows, nth, None])
        return out_ND.view_as(x_BSD)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight
