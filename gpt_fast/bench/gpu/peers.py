"""Other engines on the same shapes and device, in this process: random weights, one row of tokens.

Each call makes its model anew and compiles it for one context; compiling is not timed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_fast.bench.gpu.models import GROUP
from gpt_fast.bench.gpu.rows import TEMPERATURE, TOP_K, Effort, Figures
from gpt_fast.bench.gpu.timing import Timing, synchronize, timed
from gpt_fast.config import ModelConfig

# Beside upstream's own settings, what is known to help it on a Hopper GPU; it runs both ways, the better one counts.
UPSTREAM_FLAGS: dict[str, dict[str, Any]] = {
    "its own": {},
    "tuned": {"realize_opcount_threshold": 8, "combo_kernels": True},
}


def figures(timing: Timing, **facts: Any) -> Figures:
    return {"us_per_step": timing.median * 1e6, "tokens_per_s": 1 / timing.median} | facts


# --------------------------------------------------------------------------------------- transformers


@torch.inference_mode()
def hf_transformers(
    config: ModelConfig, context: int, effort: Effort, device: torch.device, *, compiled: bool
) -> Figures:
    """Static cache, forward compiled with CUDA graphs, argmax; bfloat16."""
    import transformers

    c = config
    llama = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position,
        tie_word_embeddings=c.tie_embeddings,
    )
    with torch.device(device):
        model: Any = transformers.LlamaForCausalLM(llama)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    forward = model.forward
    if compiled:
        torch._dynamo.reset()
        forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    cache = static_cache(transformers, model, context + effort.new_tokens + 1, device)
    timing = hf_timing(model.forward, forward, cache, context, effort, device)
    return figures(timing.by(effort.new_tokens), compiled=compiled)


def static_cache(transformers: Any, model: Any, positions: int, device: torch.device) -> Any:
    """transformers.StaticCache, whose arguments differ from release to release."""
    known = inspect.signature(transformers.StaticCache.__init__).parameters
    wanted = {
        "config": model.config,
        "max_cache_len": positions,
        "max_batch_size": 1,
        "batch_size": 1,
        "device": device,
        "dtype": torch.bfloat16,
    }
    return transformers.StaticCache(**{name: value for name, value in wanted.items() if name in known})


def hf_timing(
    prefill: Callable[..., Any],
    forward: Callable[..., Any],
    cache: Any,
    context: int,
    effort: Effort,
    device: torch.device,
) -> Timing:
    """Of new_tokens decode steps after `context` tokens, which every try computes anew: the cache counts its tokens."""
    seconds = []
    for _ in range(effort.repeat + 1):
        cache.reset()
        hf_step(prefill, torch.ones(1, context, dtype=torch.int64, device=device), 0, cache)
        token = torch.ones(1, 1, dtype=torch.int64, device=device)
        synchronize(device)
        started = time.perf_counter()
        for position in range(context, context + effort.new_tokens):
            token = hf_step(forward, token, position, cache)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return Timing.of(seconds[1:])


def hf_step(forward: Callable[..., Any], tokens_1S: Tensor, start: int, cache: Any) -> Tensor:
    """The token after these."""
    positions_S = torch.arange(start, start + tokens_1S.shape[1], device=tokens_1S.device)
    out = forward(
        input_ids=tokens_1S,
        position_ids=positions_S[None],
        cache_position=positions_S,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    tokens_B1: Tensor = out.logits.argmax(-1).clone()  # the next step of a CUDA graph would overwrite it
    return tokens_B1


# ------------------------------------------------------------------------------------------- upstream


@torch.inference_mode()
def upstream(
    config: ModelConfig,
    context: int,
    effort: Effort,
    device: torch.device,
    *,
    compiled: bool,
    form: str,
    checkout: Path,
) -> Figures:
    """meta-pytorch/gpt-fast from a checkout: its decode loop and sampler, compiled as its generate.py does."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    generate: Any = importlib.import_module("generate")
    its_model: Any = importlib.import_module("model")
    plain, tries = generate.decode_one_token, {}
    try:
        for name, flags in (UPSTREAM_FLAGS if compiled else {"its own": {}}).items():
            with torch._inductor.config.patch(flags):
                torch._dynamo.reset()
                if compiled:
                    generate.decode_one_token = torch.compile(plain, mode="reduce-overhead", fullgraph=True)
                model = upstream_model(its_model, config, form, device)
                tries[name] = timed_upstream(generate, model, context, effort, device)
                del model
    finally:
        generate.decode_one_token = plain
    best = min(tries, key=lambda name: tries[name].median)
    us = {name: timing.median * 1e6 for name, timing in tries.items()}
    return figures(tries[best], compiled=compiled, flags=best, us_by_flags=us)


def timed_upstream(generate: Any, model: Any, context: int, effort: Effort, device: torch.device) -> Timing:
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=context + effort.new_tokens + 1)
    token = torch.ones(1, 1, dtype=torch.int, device=device)

    def run() -> None:
        place = torch.tensor([context], dtype=torch.int, device=device)
        generate.decode_n_tokens(model, token, place, effort.new_tokens, temperature=TEMPERATURE, top_k=TOP_K)

    return timed(run, device, repeat=effort.repeat).by(effort.new_tokens)


def upstream_model(its_model: Any, config: ModelConfig, form: str, device: torch.device) -> Any:
    """Its Transformer of our shape, quantized by its own modules, with random numbers."""
    c = config
    args = its_model.ModelArgs(
        block_size=c.max_position,
        vocab_size=c.vocab_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        dim=c.dim,
        intermediate_size=c.intermediate_size,
        n_local_heads=c.n_kv_head,
        rope_base=c.rope_base,
        norm_eps=c.norm_eps,
    )
    with torch.device("meta"):
        model = its_model.Transformer(args)
    if form != "bf16":
        quantize = importlib.import_module("quantize")
        handlers = {
            "int8": lambda: quantize.WeightOnlyInt8QuantHandler(model),
            "int4": lambda: quantize.WeightOnlyInt4QuantHandler(model, groupsize=GROUP),
        }
        with torch.device("meta"):
            model = handlers[form]().convert_for_runtime()
    model = model.to(torch.bfloat16).to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        randomize(tensor)
    return model.eval().requires_grad_(False)


def randomize(tensor: Tensor) -> None:
    """Small numbers, any codes."""
    if tensor.is_floating_point():
        tensor.normal_(0, 0.02)
    elif tensor.dtype != torch.bool:
        tensor.random_()
