"""Models of known shapes with random weights, made where they are used; quantized ones directly in their format."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from gpt_fast.config import ModelConfig
from gpt_fast.model.shares import share_out
from gpt_fast.model.transformer import Transformer
from gpt_fast.quantize.linear import Quantized
from gpt_fast.quantize.structure import apply_schemes, plan

MAX_POSITION = 1 << 16  # of the longest context measured; a shape's own limit does not change its speed
GROUP = 32
FORMATS = ("bf16", "int8", "int4", "fp8")


def shape(vocab: int, layers: int, heads: int, kv_heads: int, dim: int, hidden: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        n_layer=layers,
        n_head=heads,
        n_kv_head=kv_heads,
        dim=dim,
        head_dim=dim // heads,
        intermediate_size=hidden,
        max_position=MAX_POSITION,
        tie_embeddings=tied,
    )


SHAPES = {
    "llama-2-7b": shape(32000, 32, 32, 32, 4096, 11008, tied=False),
    "llama-3.1-8b": shape(128256, 32, 32, 8, 4096, 14336, tied=False),
    "llama-3.2-1b": shape(128256, 16, 32, 8, 2048, 8192, tied=True),
    "smollm2-135m": shape(49152, 30, 9, 3, 576, 1536, tied=True),
    "llama-2-70b": shape(32000, 80, 64, 8, 8192, 28672, tied=False),
}
TINY = {"tiny": shape(512, 2, 4, 2, 256, 512, tied=False)}  # of a dry run


def rank_config(config: ModelConfig, form: str, rank: int, size: int) -> ModelConfig:
    """The share of one of `size` ranks as a model of its own, which runs without the others: every sum is left out."""
    share = share_out(config, rank, size, group=GROUP if form == "int4" else 0)
    return dataclasses.replace(share.config(config), vocab_size=len(share.vocabulary[rank]))


@torch.no_grad()
def random_model(config: ModelConfig, form: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model in "bf16" (i.e. `dtype`), "int8" or "int4"; weights of about unit gain, so that nothing overflows."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
        if form in ("int8", "int4"):
            apply_schemes(model, plan(model, mode=form, groupsize=GROUP))
    model.to_empty(device=device).requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Quantized):
            fill_quantized(module)
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0, module.weight.shape[-1] ** -0.5)
        elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() == 1:
            weight.fill_(1)
    if config.tie_embeddings and form in ("bf16", "fp8"):
        model.tie_output()
    return model.eval()


def fill_quantized(module: Quantized) -> None:
    """Uniform codes, with scales that give the weights a standard deviation of K**-0.5."""
    deviation, weight = module.columns**-0.5, module.weight
    if weight.dtype == torch.int8:
        weight.random_(-127, 128)
        module.scale.fill_(deviation / 73.6)  # of the codes: 255 / sqrt(12)
        return
    weight.random_(0, 256)
    module.scale.fill_(deviation / 4.61)  # 16 / sqrt(12)
    module.get_buffer("min").fill_(-7.5 * deviation / 4.61)
