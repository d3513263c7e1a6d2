"""Which rows of which source tensors make each of the model's tensors. Pure data, one function a naming scheme.

Every target is a concatenation, along its first dimension, of row ranges of source tensors. Rows of queries and
keys in Hugging Face's RoPE layout (rotated pairs half a head apart) are reordered to neighbours, as the model and
Meta's own files have them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.config import ModelConfig

Shape = tuple[int, ...]


class Piece(NamedTuple):
    """Rows of one source tensor: all of them, or start..stop-1 with its leading dimensions flattened."""

    name: str
    shape: Shape  # of the whole source tensor
    rows: tuple[int, int] | None = None
    rope_heads: int = 0  # heads whose rows are in half-split RoPE order; 0: leave the order


Recipe = tuple[Piece, ...]
Candidates = Mapping[str, tuple[Recipe, ...]]  # target -> ways to make it; the first whose sources exist is taken

HF_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
META_IGNORED = re.compile(r"rope\.freqs")
GGUF_IGNORED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight")


def half_to_interleaved(tensor: Tensor, heads: int, rotary_dim: int) -> Tensor:
    """Reorder rows of `heads` heads so that rotated elements (i, i + rotary_dim/2) become (2i, 2i+1)."""
    head_dim = tensor.shape[0] // heads
    order = torch.arange(head_dim)
    order[:rotary_dim] = order[:rotary_dim].view(2, -1).T.flatten()
    heads_HEK: Tensor = tensor.unflatten(0, (heads, head_dim))
    return heads_HEK[:, order].flatten(0, 1)


class Sizes(NamedTuple):
    """The shapes that names share."""

    q: int
    kv: int
    dim: int
    ffn: int

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        return cls(config.n_head * config.head_dim, config.kv_dim, config.dim, config.intermediate_size)


def hf_candidates(config: ModelConfig) -> Candidates:
    """transformers' names, with Phi-3's fused projections and both of Mixtral's expert layouts."""
    out: dict[str, tuple[Recipe, ...]] = whole_model(
        config, {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    )
    for layer in range(config.n_layer):
        mine, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        out |= attention_candidates(
            config,
            mine,
            separate=(attention + "q_proj", attention + "k_proj", attention + "v_proj"),
            fused=attention + "qkv_proj",
            wo=attention + "o_proj",
            norms=(attention + "q_norm.weight", attention + "k_norm.weight"),
            half_split=True,
        )
        out |= vectors(config, mine, theirs + "input_layernorm", theirs + "post_attention_layernorm")
        out |= hf_experts(config, mine, theirs) if config.n_expert else hf_feed_forward(config, mine, theirs + "mlp.")
    return out


def gguf_candidates(config: ModelConfig, *, half_split: bool) -> Candidates:
    """llama.cpp's names. half_split: the architecture keeps Hugging Face's RoPE order (qwen2, qwen3, phi3)."""
    out: dict[str, tuple[Recipe, ...]] = whole_model(
        config, {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    )
    for layer in range(config.n_layer):
        mine, theirs = f"layers.{layer}.", f"blk.{layer}."
        out |= attention_candidates(
            config,
            mine,
            separate=(theirs + "attn_q", theirs + "attn_k", theirs + "attn_v"),
            fused=theirs + "attn_qkv",
            wo=theirs + "attn_output",
            norms=(theirs + "attn_q_norm.weight", theirs + "attn_k_norm.weight"),
            half_split=half_split,
        )
        out |= vectors(config, mine, theirs + "attn_norm", theirs + "ffn_norm")
        out |= gguf_experts(config, mine, theirs) if config.n_expert else gguf_feed_forward(config, mine, theirs)
    return out


def meta_candidates(config: ModelConfig) -> Candidates:
    """Meta's consolidated names, which are the model's but for the separate wq, wk, wv."""
    out: dict[str, tuple[Recipe, ...]] = whole_model(
        config, {"tok_embeddings": "tok_embeddings", "norm": "norm", "output": "output"}
    )
    for layer in range(config.n_layer):
        prefix = f"layers.{layer}."
        attention = prefix + "attention."
        out |= attention_candidates(
            config,
            prefix,
            separate=(attention + "wq", attention + "wk", attention + "wv"),
            fused=attention + "wqkv",
            wo=attention + "wo",
            norms=(attention + "q_norm.weight", attention + "k_norm.weight"),
            half_split=False,
        )
        out |= vectors(config, prefix, prefix + "attention_norm", prefix + "ffn_norm")
        out |= linears(config, prefix + "feed_forward.", {w: prefix + "feed_forward." + w for w in ("w1", "w2", "w3")})
    return out


def whole_model(config: ModelConfig, names: Mapping[str, str]) -> dict[str, tuple[Recipe, ...]]:
    vocab: Shape = (config.vocab_size, config.dim)
    out: dict[str, tuple[Recipe, ...]] = {
        "tok_embeddings.weight": ((Piece(names["tok_embeddings"] + ".weight", vocab),),),
        "norm.weight": ((Piece(names["norm"] + ".weight", (config.dim,)),),),
    }
    if not config.tie_embeddings:
        out["output.weight"] = ((Piece(names["output"] + ".weight", vocab),),)
    return out


def vectors(config: ModelConfig, mine: str, attention_norm: str, ffn_norm: str) -> dict[str, tuple[Recipe, ...]]:
    shape = (config.dim,)
    return {
        mine + "attention_norm.weight": ((Piece(attention_norm + ".weight", shape),),),
        mine + "ffn_norm.weight": ((Piece(ffn_norm + ".weight", shape),),),
    }


def attention_candidates(
    config: ModelConfig,
    mine: str,
    *,
    separate: tuple[str, str, str],
    fused: str,
    wo: str,
    norms: tuple[str, str],
    half_split: bool,
) -> dict[str, tuple[Recipe, ...]]:
    size = Sizes.of(config)
    heads = (config.n_head, config.n_kv_head, 0) if half_split else (0, 0, 0)
    out: dict[str, tuple[Recipe, ...]] = {}
    for suffix in ("weight", "bias") if config.qkv_bias else ("weight",):
        tail: Shape = (size.dim,) if suffix == "weight" else ()
        counts = (size.q, size.kv, size.kv)
        three = tuple(
            Piece(f"{name}.{suffix}", (rows, *tail), None, rope)
            for name, rows, rope in zip(separate, counts, heads, strict=True)
        )
        whole: Shape = (sum(counts), *tail)
        ends = (0, size.q, size.q + size.kv, whole[0])
        one = tuple(Piece(f"{fused}.{suffix}", whole, (ends[i], ends[i + 1]), heads[i]) for i in range(3))
        out[f"{mine}attention.wqkv.{suffix}"] = (three, one)
    out |= {f"{mine}attention.wo.weight": ((Piece(wo + ".weight", (size.dim, size.q)),),)}
    if config.attention_out_bias:
        out[f"{mine}attention.wo.bias"] = ((Piece(wo + ".bias", (size.dim,)),),)
    if config.qk_norm:
        for target, name in zip(("q_norm", "k_norm"), norms, strict=True):
            piece = Piece(name, (config.head_dim,), None, int(half_split))
            out[f"{mine}attention.{target}.weight"] = ((piece,),)
    return out


def linears(
    config: ModelConfig, mine: str, names: Mapping[str, str], *, bias: bool | None = None
) -> dict[str, tuple[Recipe, ...]]:
    """w1, w2, w3 of one feed-forward from three source linears."""
    size = Sizes.of(config)
    shapes = {"w1": (size.ffn, size.dim), "w3": (size.ffn, size.dim), "w2": (size.dim, size.ffn)}
    out: dict[str, tuple[Recipe, ...]] = {}
    for target, shape in shapes.items():
        out[f"{mine}{target}.weight"] = ((Piece(names[target] + ".weight", shape),),)
        if config.mlp_bias if bias is None else bias:
            out[f"{mine}{target}.bias"] = ((Piece(names[target] + ".bias", shape[:1]),),)
    return out


def fused_gate_up(config: ModelConfig, mine: str, name: str) -> dict[str, Recipe]:
    """w1 and w3 as the two halves of one source linear."""
    size = Sizes.of(config)
    whole = (2 * size.ffn, size.dim)
    return {
        f"{mine}w1.weight": (Piece(name, whole, (0, size.ffn)),),
        f"{mine}w3.weight": (Piece(name, whole, (size.ffn, 2 * size.ffn)),),
    }


def add_alternatives(out: dict[str, tuple[Recipe, ...]], more: Mapping[str, Recipe]) -> None:
    for target, recipe in more.items():
        out[target] = (*out[target], recipe)


def hf_feed_forward(config: ModelConfig, mine: str, theirs: str) -> dict[str, tuple[Recipe, ...]]:
    mine += "feed_forward."
    names = {"w1": theirs + "gate_proj", "w2": theirs + "down_proj", "w3": theirs + "up_proj"}
    out = linears(config, mine, names)
    add_alternatives(out, fused_gate_up(config, mine, theirs + "gate_up_proj.weight"))
    return out


def gguf_feed_forward(config: ModelConfig, mine: str, theirs: str) -> dict[str, tuple[Recipe, ...]]:
    mine += "feed_forward."
    names = {"w1": theirs + "ffn_gate", "w2": theirs + "ffn_down", "w3": theirs + "ffn_up"}
    out = linears(config, mine, names)
    add_alternatives(out, fused_gate_up(config, mine, theirs + "ffn_up.weight"))
    return out


def hf_experts(config: ModelConfig, mine: str, theirs: str) -> dict[str, tuple[Recipe, ...]]:
    """Mixtral: one linear an expert (published files), or all experts stacked (transformers 5's modules)."""
    size, count = Sizes.of(config), config.n_expert
    mine += "feed_forward."
    gate_shape = (count, size.dim)
    out: dict[str, tuple[Recipe, ...]] = {
        mine + "gate.weight": (
            (Piece(theirs + "block_sparse_moe.gate.weight", gate_shape),),
            (Piece(theirs + "mlp.gate.weight", gate_shape),),
        )
    }
    for expert in range(count):
        prefix = f"{mine}experts.{expert}."
        source = f"{theirs}block_sparse_moe.experts.{expert}."
        out |= linears(config, prefix, {w: source + w for w in ("w1", "w2", "w3")})
        up, down = (count, 2 * size.ffn, size.dim), (count, size.dim, size.ffn)
        first = expert * 2 * size.ffn
        name = theirs + "mlp.experts.gate_up_proj"
        stacked: dict[str, Recipe] = {
            prefix + "w1.weight": (Piece(name, up, (first, first + size.ffn)),),
            prefix + "w3.weight": (Piece(name, up, (first + size.ffn, first + 2 * size.ffn)),),
            prefix + "w2.weight": (stack_piece(theirs + "mlp.experts.down_proj", down, expert),),
        }
        add_alternatives(out, stacked)
    return out


def gguf_experts(config: ModelConfig, mine: str, theirs: str) -> dict[str, tuple[Recipe, ...]]:
    """llama.cpp: stacked experts, or (old files) one tensor an expert."""
    size, count = Sizes.of(config), config.n_expert
    mine += "feed_forward."
    out: dict[str, tuple[Recipe, ...]] = {
        mine + "gate.weight": ((Piece(theirs + "ffn_gate_inp.weight", (count, size.dim)),),)
    }
    wide, tall = (count, size.ffn, size.dim), (count, size.dim, size.ffn)
    kinds = {"w1": ("ffn_gate", wide), "w2": ("ffn_down", tall), "w3": ("ffn_up", wide)}
    for expert in range(count):
        for target, (name, shape) in kinds.items():
            stacked: Recipe = (stack_piece(f"{theirs}{name}_exps.weight", shape, expert),)
            single: Recipe = (Piece(f"{theirs}{name}.{expert}.weight", shape[1:]),)
            out[f"{mine}experts.{expert}.{target}.weight"] = (stacked, single)
    return out


def stack_piece(name: str, shape: Shape, index: int) -> Piece:
    """Matrix `index` of a stack of matrices."""
    rows = math.prod(shape[1:-1])
    return Piece(name, shape, (index * rows, (index + 1) * rows))
