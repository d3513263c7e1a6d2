"""Which rows of which source tensors make each of the model's tensors. Pure data, one function a naming scheme.

Every target is a concatenation, along its first dimension, of row ranges of source tensors. Rows of queries and
keys in Hugging Face's RoPE layout (rotated pairs half a head apart) are reordered to neighbours, as the model and
Meta's own files have them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
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
# What DistributedDataParallel, FSDP and torch.compile put into the names of what they wrap.
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))


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


class Names(NamedTuple):
    """What a naming scheme calls the model's parts; those of a layer stand behind `layer`, which names its number."""

    embeddings: str
    norm: str
    output: str
    layer: str
    attention_norm: str
    ffn_norm: str
    wq: str
    wk: str
    wv: str
    wqkv: str  # all three in one
    wo: str
    q_norm: str
    k_norm: str
    w1: str
    w2: str
    w3: str
    w1_w3: str  # both in one; "" where no file has that


MakeLayer = Callable[[ModelConfig, str, Names], dict[str, tuple[Recipe, ...]]]  # of (config, target prefix, names)

HF = Names(
    *("model.embed_tokens", "model.norm", "lm_head", "model.layers.{}."),
    *("input_layernorm", "post_attention_layernorm"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
    *("self_attn.q_norm", "self_attn.k_norm"),
    *("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj", "mlp.gate_up_proj"),
)
GGUF = Names(
    *("token_embd", "output_norm", "output", "blk.{}."),
    *("attn_norm", "ffn_norm"),
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("attn_q_norm", "attn_k_norm"),
    *("ffn_gate", "ffn_down", "ffn_up", "ffn_up"),  # Phi-3's ffn_up has twice the rows
)
META = Names(
    *("tok_embeddings", "norm", "output", "layers.{}."),
    *("attention_norm", "ffn_norm"),
    *("attention.wq", "attention.wk", "attention.wv", "attention.wqkv", "attention.wo"),
    *("attention.q_norm", "attention.k_norm"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", ""),
)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name as the schemes here have it: without wrappers, without what stands before all of them, and with the
    `model.` that a model saved without its head lacks."""
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    ends = [short for short in plain.values() if re.fullmatch(r"(.*\.)?(embed_tokens|tok_embeddings)\.weight", short)]
    if len(ends) != 1:
        return plain
    outer = re.sub(r"((?<![^.])model\.)?(embed_tokens|tok_embeddings)\.weight$", "", ends[0])
    if not all(short.startswith(outer) for short in plain.values()):
        return plain
    headless = ends[0] == outer + "embed_tokens.weight"
    return {name: with_model(short.removeprefix(outer), headless) for name, short in plain.items()}


def with_model(name: str, headless: bool) -> str:
    return f"model.{name}" if headless and not name.startswith("lm_head.") else name


def hf_candidates(config: ModelConfig) -> Candidates:
    """transformers' names, with Phi-3's fused projections and both of Mixtral's expert layouts."""
    return candidates(config, HF, half_split=True, experts=hf_experts)


def gguf_candidates(config: ModelConfig, *, half_split: bool) -> Candidates:
    """llama.cpp's names. half_split: the architecture keeps Hugging Face's RoPE order (qwen2, qwen3, phi3)."""
    return candidates(config, GGUF, half_split=half_split, experts=gguf_experts)


def meta_candidates(config: ModelConfig) -> Candidates:
    """Meta's consolidated names, which are the model's but for the separate wq, wk, wv. It has no experts."""
    return candidates(config, META, half_split=False, experts=feed_forward)


def candidates(config: ModelConfig, names: Names, *, half_split: bool, experts: MakeLayer) -> Candidates:
    """experts: makes a mixture's feed-forward, for which every scheme has layouts of its own."""
    out = whole_model(config, names)
    for index in range(config.n_layer):
        mine, layer = f"layers.{index}.", in_layer(names, index)
        out |= attention_candidates(config, mine, layer, half_split=half_split)
        out |= vectors(config, mine, layer)
        out |= experts(config, mine, layer) if config.n_expert else feed_forward(config, mine, layer)
    return out


def in_layer(names: Names, index: int) -> Names:
    """The names of one layer's parts in full."""
    prefix = names.layer.format(index)
    whole = ("embeddings", "norm", "output", "layer")
    parts = {key: prefix + value for key, value in names._asdict().items() if key not in whole and value}
    return names._replace(layer=prefix, **parts)


def whole_model(config: ModelConfig, names: Names) -> dict[str, tuple[Recipe, ...]]:
    vocab: Shape = (config.vocab_size, config.dim)
    out: dict[str, tuple[Recipe, ...]] = {
        "tok_embeddings.weight": ((Piece(names.embeddings + ".weight", vocab),),),
        "norm.weight": ((Piece(names.norm + ".weight", (config.dim,)),),),
    }
    if not config.tie_embeddings:
        out["output.weight"] = ((Piece(names.output + ".weight", vocab),),)
    return out


def vectors(config: ModelConfig, mine: str, names: Names) -> dict[str, tuple[Recipe, ...]]:
    shape = (config.dim,)
    return {
        mine + "attention_norm.weight": ((Piece(names.attention_norm + ".weight", shape),),),
        mine + "ffn_norm.weight": ((Piece(names.ffn_norm + ".weight", shape),),),
    }


def attention_candidates(
    config: ModelConfig, mine: str, names: Names, *, half_split: bool
) -> dict[str, tuple[Recipe, ...]]:
    size = Sizes.of(config)
    heads = (config.n_head, config.n_kv_head, 0) if half_split else (0, 0, 0)
    out: dict[str, tuple[Recipe, ...]] = {}
    for suffix in ("weight", "bias") if config.qkv_bias else ("weight",):
        tail: Shape = (size.dim,) if suffix == "weight" else ()
        counts = (size.q, size.kv, size.kv)
        three = tuple(
            Piece(f"{name}.{suffix}", (rows, *tail), None, rope)
            for name, rows, rope in zip((names.wq, names.wk, names.wv), counts, heads, strict=True)
        )
        whole: Shape = (sum(counts), *tail)
        ends = (0, size.q, size.q + size.kv, whole[0])
        one = tuple(Piece(f"{names.wqkv}.{suffix}", whole, (ends[i], ends[i + 1]), heads[i]) for i in range(3))
        out[f"{mine}attention.wqkv.{suffix}"] = (three, one)
    out |= {f"{mine}attention.wo.weight": ((Piece(names.wo + ".weight", (size.dim, size.q)),),)}
    if config.attention_out_bias:
        out[f"{mine}attention.wo.bias"] = ((Piece(names.wo + ".bias", (size.dim,)),),)
    if config.qk_norm:
        for target, name in (("q_norm", names.q_norm), ("k_norm", names.k_norm)):
            piece = Piece(name + ".weight", (config.head_dim,), None, int(half_split))
            out[f"{mine}attention.{target}.weight"] = ((piece,),)
    return out


def linears(config: ModelConfig, mine: str, names: Mapping[str, str]) -> dict[str, tuple[Recipe, ...]]:
    """w1, w2, w3 of one feed-forward from three source linears."""
    size = Sizes.of(config)
    shapes = {"w1": (size.ffn, size.dim), "w3": (size.ffn, size.dim), "w2": (size.dim, size.ffn)}
    out: dict[str, tuple[Recipe, ...]] = {}
    for target, shape in shapes.items():
        out[f"{mine}{target}.weight"] = ((Piece(names[target] + ".weight", shape),),)
        if config.mlp_bias:
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


def feed_forward(config: ModelConfig, mine: str, names: Names) -> dict[str, tuple[Recipe, ...]]:
    mine += "feed_forward."
    out = linears(config, mine, {"w1": names.w1, "w2": names.w2, "w3": names.w3})
    if names.w1_w3:
        add_alternatives(out, fused_gate_up(config, mine, names.w1_w3 + ".weight"))
    return out


def hf_experts(config: ModelConfig, mine: str, names: Names) -> dict[str, tuple[Recipe, ...]]:
    """Mixtral: one linear an expert (published files), or all experts stacked (transformers 5's modules)."""
    size, count, theirs = Sizes.of(config), config.n_expert, names.layer
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


def gguf_experts(config: ModelConfig, mine: str, names: Names) -> dict[str, tuple[Recipe, ...]]:
    """llama.cpp: stacked experts, or (old files) one tensor an expert."""
    size, count, theirs = Sizes.of(config), config.n_expert, names.layer
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
