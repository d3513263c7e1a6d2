"""The rows of the table: each function measures one kind and gives a row's figures."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpt_fast import sampling
from gpt_fast.bench.gpu.timing import Timing, synchronize, timed, timed_graph
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.gpu.decoder import GpuDecoder, ops_for, weight_bytes
from gpt_fast.ops.gpu.graph import DecodeLoop
from gpt_fast.ops.gpu.sampler import sampler_workspace
from gpt_fast.ops.gpu.state import Row
from gpt_fast.quantize.linear import pack

Figures = dict[str, Any]
TEMPERATURE, TOP_K = 0.8, 200  # gpt-fast's own defaults


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured: tries of each figure, tokens of each decode, tokens of a replay."""

    repeat: int
    new_tokens: int
    steps: int


class Subject:
    """One model in one format on one device, and what rows need of it.

    kv_dtype: of the caches it is measured with; the model's own unless changed.
    """

    def __init__(self, model: Transformer, *, fp8: bool = False) -> None:
        self.model, self.config = model, model.config
        self.device, self.kv_dtype = model.norm.weight.device, model.norm.weight.dtype
        model.setup_rope(model.config.max_position, self.device)
        self.decoder = GpuDecoder(model, fp8=fp8)
        pack(model)  # for the path of many tokens

    @cached_property
    def weight_bytes(self) -> int:
        return weight_bytes(self.decoder)

    def kv_bytes(self, positions: int) -> int:
        """Of keys, values and their scales of so many positions."""
        elements = self.config.kv_bytes_per_token(1) * positions
        scales = elements // self.config.head_dim if self.kv_dtype == torch.int8 else 0
        return elements * self.kv_dtype.itemsize + 4 * scales

    def cache(self, rows: int, positions: int) -> KVCache:
        """Full of numbers that a model might have left there."""
        cache = KVCache(self.config, slots=rows, max_seq_len=positions, dtype=self.kv_dtype, device=self.device)
        for buffer in cache.buffers():
            buffer.normal_() if buffer.is_floating_point() else buffer.random_(-127, 128)
        return cache


def decode(subject: Subject, rows: int, context: int, effort: Effort, *, allocated: int = 0) -> Figures:
    """Tokens one after the other in every row, after `context` cached ones; `allocated`: positions of a slot."""
    end = context + 1 + effort.new_tokens
    cache = subject.cache(rows, max(end, allocated))
    loop = DecodeLoop(subject.decoder, cache, rows=rows, steps=effort.steps, eos_ids=[])
    start = [Row(slot, 1 + slot, context, end, TEMPERATURE, TOP_K, seed=slot) for slot in range(rows)]
    loop.warm_up()
    seconds, host = [], []
    for _ in range(effort.repeat + 1):
        synchronize(subject.device)
        started = time.perf_counter()
        produced = [sum(map(len, tokens)) for tokens in loop.run(start)]
        synchronize(subject.device)
        seconds.append((time.perf_counter() - started) / effort.new_tokens)
        host.append(loop.host_seconds / effort.new_tokens)
        if sum(produced) != rows * effort.new_tokens:
            raise RuntimeError(f"{sum(produced)} tokens came of {rows * effort.new_tokens}: the logits are not numbers")
    nbytes = subject.weight_bytes + rows * subject.kv_bytes(context + effort.new_tokens // 2)
    return per_step(Timing.of(seconds[1:]), rows, nbytes) | {
        "host_us_per_token": statistics.median(host[1:]) * 1e6 / rows,
        "host_us_per_step": statistics.median(host[1:]) * 1e6,
        "kernels_per_step": kernels(loop, context + 1),
        "allocated": cache.max_seq_len,
    }


def allocated(subject: Subject, context: int, most: int, effort: Effort) -> Figures:
    """What a slot of `most` positions costs while it holds few: against one that is just large enough."""
    short = decode(subject, 1, context, effort)
    figures = decode(subject, 1, context, effort, allocated=most)
    return figures | {"over_short": figures["us_per_step"] / short["us_per_step"]}


def per_step(timing: Timing, rows: int, nbytes: int) -> Figures:
    return {
        "us_per_step": timing.median * 1e6,
        "us_least": timing.least * 1e6,
        "us_most": timing.most * 1e6,
        "tokens_per_s": rows / timing.median,
        "gb_per_step": nbytes / 1e9,
        "gb_s": nbytes / timing.median / 1e9,
    }


def kernels(loop: DecodeLoop, length: int) -> float | None:
    """Kernels and copies of a step, counted while it runs without its graph; None where there are no kernels."""
    if loop.decoder.device.type != "cuda":
        return None
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loop.replay(loop.decoder.reach(len(loop.sampled_B), 1, length), greedy=False)
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return len(on_device) / loop.steps


def verify(subject: Subject, context: int, widths: list[int], effort: Effort) -> list[Figures]:
    """One forward of M tokens of one row, as speculation asks for; its ratio to a forward of one."""
    cache = subject.cache(1, context + max(widths))
    timings = {width: forward(subject, cache, context, width, effort) for width in widths}
    subject.decoder.graphs.clear()  # they keep the cache
    nbytes = subject.weight_bytes + subject.kv_bytes(context)
    one = timings[min(widths)].median
    return [
        {"width": width} | per_step(timing, width, nbytes) | {"over_one": timing.median / one}
        for width, timing in timings.items()
    ]


@torch.inference_mode()
def forward(subject: Subject, cache: KVCache, context: int, width: int, effort: Effort) -> Timing:
    tokens_BS = torch.arange(1, width + 1, device=subject.device)[None]
    positions_BS = context + torch.arange(width, device=subject.device)[None]

    def run() -> Tensor:
        return subject.decoder(Batch(tokens_BS, positions_BS, cache, context + width))

    return timed(run, subject.device, repeat=effort.repeat, inner=effort.new_tokens)


@torch.inference_mode()
def prefill(subject: Subject, prompt: int, chunk: int, effort: Effort) -> Figures:
    """A prompt in chunks through the decoder's path for many tokens, to the last token's logits."""
    cache = subject.cache(1, prompt)
    starts = range(0, prompt, chunk)

    def run() -> None:
        for start in starts:
            positions_S = torch.arange(start, min(start + chunk, prompt), device=subject.device)
            last = torch.tensor([len(positions_S) - 1], device=subject.device)
            tokens_BS = (positions_S % subject.config.vocab_size)[None]
            subject.decoder(Batch(tokens_BS, positions_S[None], cache, int(start + len(positions_S)), select_B=last))

    timing = timed(run, subject.device, repeat=effort.repeat)
    return {"ms": timing.median * 1e3, "tokens_per_s": prompt / timing.median, "chunk": chunk}


@torch.inference_mode()
def sampler(device: torch.device, vocabulary: int, rows: int, effort: Effort) -> Figures:
    """Logits to tokens: the fused kernel in a graph, and the plain sampler from the host."""
    logits_BV = torch.randn(rows, vocabulary, device=device) * 4
    ones_B = torch.ones(rows, device=device)
    columns = (ones_B * TEMPERATURE, (ones_B * TOP_K).long(), ones_B, ones_B * 0)
    params = sampling.SamplingTensors(*columns, most_k=TOP_K, by_p=False)
    uniform_B = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
    out_B = torch.empty(rows, dtype=torch.int64, device=device)
    workspace, ops = sampler_workspace(rows, vocabulary, device), ops_for(device)
    fused = timed_graph(
        lambda: ops.sample(logits_BV, *params[:3], uniform_B, workspace, out_B),
        device,
        repeat=effort.repeat,
        inner=effort.new_tokens,
    )
    plain = timed(lambda: sampling.sample(logits_BV, params, uniform_B), device, repeat=effort.repeat, inner=8)
    return {"us_per_step": fused.median * 1e6, "us_plain": plain.median * 1e6}
