"""Small random models, and their quantized twins, for the quantization and evaluation tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.cache import KVCache
from gpt_fast.config import ModelConfig
from gpt_fast.model import Transformer
from gpt_fast.quantize.rtn import dequantize_weight, quantize_weight
from gpt_fast.quantize.scheme import Scheme
from gpt_fast.quantize.structure import apply_schemes, plan

CPU = torch.device("cpu")


def small_config(**changes: object) -> ModelConfig:
    sizes: dict = {
        "vocab_size": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "dim": 96,
        "head_dim": 24,
        "intermediate_size": 160,
        "max_position": 64,
        "tie_embeddings": True,
    }
    return ModelConfig(**(sizes | changes))


def random_model(config: ModelConfig, *, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


def quantized_state(model: Transformer, schemes: dict[str, Scheme]) -> dict[str, Tensor]:
    """The state dict of the model's quantized file, rounded to nearest."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if module in schemes and last == "weight":
            parts = quantize_weight(tensor, schemes[module], name=name)
            state |= {f"{module}.{part}": value for part, value in parts.items()}
        elif not (name == "output.weight" and model.config.tie_embeddings):
            state[name] = tensor
    return state


def quantized_model(model: Transformer, *, mode: str, groupsize: int, embedding: str = "auto") -> Transformer:
    schemes = plan(model, mode=mode, groupsize=groupsize, embedding=embedding)
    with torch.device("meta"):
        twin = Transformer(model.config)
    apply_schemes(twin, schemes)
    twin.load_state_dict(quantized_state(model, schemes), assign=True)
    return twin.requires_grad_(False)


def dequantized_model(model: Transformer, *, mode: str, groupsize: int, embedding: str = "auto") -> Transformer:
    """The same numbers as quantized_model in ordinary float32 layers."""
    schemes = plan(model, mode=mode, groupsize=groupsize, embedding=embedding)
    state = model.state_dict()
    for name, scheme in schemes.items():
        weight = f"{name}.weight"
        state[weight] = dequantize_weight(quantize_weight(state[weight], scheme, name=name), scheme)
    twin = Transformer(model.config)
    twin.load_state_dict(state)
    twin.requires_grad_(False)
    if model.config.tie_embeddings:
        with torch.no_grad():
            twin.tok_embeddings.weight.copy_(state["tok_embeddings.weight"])
    return twin


def logits_of(model: Transformer, tokens_BS: Tensor) -> Tensor:
    rows, length = tokens_BS.shape
    model.setup_rope(length, CPU)
    dtype = model.norm.weight.dtype
    cache = KVCache(model.config, slots=rows, max_seq_len=length, dtype=dtype, device=CPU)
    with torch.inference_mode():
        return model(tokens_BS, torch.arange(length).repeat(rows, 1), cache, length=length)
