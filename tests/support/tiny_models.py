"""Tiny random models of every family, made by transformers: what conversion is held against."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor

from gpt_fast.load.checkpoint import Loaded
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch

logging.getLogger("transformers").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()

SIZES: Mapping[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MHA, MQA = {"num_key_value_heads": 6}, {"num_key_value_heads": 1}
TIED = {"tie_word_embeddings": True}


def rope(kind: str, theta: float = 10000.0, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **values}}


LLAMA3 = rope(
    "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
YARN = rope("yarn", factor=8.0, original_max_position_embeddings=128)


def longrope(dims: int, original: int) -> dict[str, Any]:
    """Phi-3's rope over `dims` frequencies: short factors near 1, long ones up to 8."""
    short = [1.0 + 0.02 * i for i in range(dims)]
    long = [1.0 + 7.0 * i / dims for i in range(dims)]
    return {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
        },
        "original_max_position_embeddings": original,
    }


# name -> (transformers' model class, settings beyond SIZES)
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-gqa": ("LlamaForCausalLM", {}),
    "llama-mha-tied": ("LlamaForCausalLM", {**MHA, **TIED}),
    "llama-mqa": ("LlamaForCausalLM", MQA),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head_dim": ("LlamaForCausalLM", {"head_dim": 16}),
    "llama3": ("LlamaForCausalLM", LLAMA3),
    "llama3-tied": ("LlamaForCausalLM", {**LLAMA3, **TIED}),
    "llama-linear": ("LlamaForCausalLM", rope("linear", factor=4.0)),
    "llama-yarn": ("LlamaForCausalLM", YARN),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 33}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": None}),
    "mixtral-window-tied": ("MixtralForCausalLM", {"num_local_experts": 3, "sliding_window": 40, **TIED}),
    "qwen2-tied": ("Qwen2ForCausalLM", TIED),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 29, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {**YARN, **MHA}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": False}),
    "qwen3-tied-biases": ("Qwen3ForCausalLM", {"head_dim": 12, "attention_bias": True, **TIED, **MQA}),
    "smollm2": ("LlamaForCausalLM", {**TIED, "num_attention_heads": 6, **rope("default", 100000.0)}),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 50}),
    "phi3-long": ("Phi3ForCausalLM", longrope(4, 128)),
    "phi3-short": ("Phi3ForCausalLM", longrope(4, 1024)),
    "phi4-partial": ("Phi3ForCausalLM", {"head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 3,
                                         **rope("default", partial_rotary_factor=0.75)}),
}  # fmt: skip


def make(name: str, *, seed: int = 0, **more: Any) -> torch.nn.Module:
    """A float32 model of a family; more: settings besides the family's own."""
    kind, settings = FAMILIES[name]
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**{**SIZES, **settings, **more}, attn_implementation="eager")
    return decided(model_class(config), seed=seed)


def decided(model: torch.nn.Module, *, seed: int = 0) -> torch.nn.Module:
    """The model with weights large enough that argmax is decided and biases and norms matter."""
    torch.manual_seed(seed)
    model.eval().requires_grad_(False)
    for tensor_name, tensor in model.named_parameters():
        if tensor.dim() > 1:
            tensor.normal_(std=0.08 if "embed" not in tensor_name else 0.8)
        else:
            tensor.normal_(mean=1.0 if "norm" in tensor_name else 0.0, std=0.2)
    return model


def save(name: str, directory: Path, *, seed: int = 0, **options: Any) -> torch.nn.Module:
    """Save a family's model as transformers does; options are save_pretrained's."""
    model = make(name, seed=seed)
    model.save_pretrained(directory, **options)
    return model


def tokenizer_json(tokens: int = 160, *, special: tuple[str, ...] = ("<a>", "<s>", "</s>")) -> bytes:
    """A byte-level BPE tokenizer.json without merges: special tokens, then as many letters as make `tokens`."""
    letters = [chr(0x4E00 + i) for i in range(tokens - len(special))]
    vocab = {token: i for i, token in enumerate((*special, *letters))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str().encode()


def logits(loaded: Loaded, tokens_BS: Tensor, *, steps: int = 0, max_positions: int | None = None) -> Tensor:
    """Our logits [B, S, V]: all but the last `steps` tokens as one prefill, then one token a step."""
    batch, length = tokens_BS.shape
    served = max_positions or length
    loaded.model.setup_rope(served, torch.device("cpu"))
    cache = KVCache(loaded.config, slots=batch, max_seq_len=served, dtype=torch.float32, device=torch.device("cpu"))
    positions_BS = torch.arange(length).expand(batch, length)
    spans = [(0, length - steps), *((i, i + 1) for i in range(length - steps, length))]
    with torch.no_grad():
        parts = [
            loaded.model(Batch(tokens_BS[:, a:b], positions_BS[:, a:b], cache, length=served))
            for a, b in spans
            if a < b
        ]
    return torch.cat(parts, dim=1)
