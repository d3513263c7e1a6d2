"""From logits to tokens on the GPU: temperature, top_k, top_p, a draw. Twin: gpt_fast.sampling.sample.

Shapes: M rows, V vocabulary.

Two kernels, the vocabulary cut into about 128 chunks. The largest logits of each chunk bound what top_k or a nucleus
of usual size can hold, so that the sort of gpt_fast.sampling becomes a bisection over a few hundred candidates.
Kernels: sampler_triton.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast import sampling
from gpt_fast.ops.gpu.launch import Launch, divide_up, power_of_two

CAPACITY = 2048  # candidates of a row
FAST_K = 512  # up to this top_k, and for nuclei of about that size, candidates suffice


class SamplerWorkspace(NamedTuple):
    """What the programs of a row pass to each other."""

    peak: Tensor  # float32 [M, chunks * 8]
    best: Tensor  # float32 [M, chunks]
    best_at: Tensor  # int32 [M, chunks]
    mass: Tensor  # int64 [M, chunks]
    candidate: Tensor  # float32 [M, CAPACITY]
    candidate_id: Tensor  # int32
    found: Tensor  # int32 [M], 0 between calls, as `arrived`
    arrived: Tensor


def sampler_workspace(rows: int, vocab: int, device: torch.device) -> SamplerWorkspace:
    """For up to `rows` rows of `vocab` logits."""
    chunks = divide_up(vocab, chunk_size(vocab))
    sizes = (chunks * 8, chunks, chunks, chunks, CAPACITY, CAPACITY)
    types = (torch.float32, torch.float32, torch.int32, torch.int64, torch.float32, torch.int32)
    between = [torch.empty(rows, size, dtype=dtype, device=device) for size, dtype in zip(sizes, types, strict=True)]
    return SamplerWorkspace(*between, *(torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2)))


def chunk_size(vocab: int) -> int:
    """Logits of a program: about a 128th of the vocabulary."""
    return max(power_of_two(divide_up(vocab, 128)), 128)


def sample(
    logits_MV: Tensor,
    temperature_M: Tensor,
    top_k_M: Tensor,
    top_p_M: Tensor,
    uniform_M: Tensor,
    workspace: SamplerWorkspace,
    out_tokens_M: Tensor,
) -> None:
    """One token a row, as gpt_fast.sampling.sample draws it with min_p 0; NO_TOKEN for a row without a finite best.

    logits float32, uniform float64 in [0, 1), top_k 0 or top_p 1: all; temperature 0: the best token.
    """
    for launch in sample_launches(logits_MV, temperature_M, top_k_M, top_p_M, uniform_M, workspace, out_tokens_M):
        launch.run()


def sample_reference(
    logits_MV: Tensor,
    temperature_M: Tensor,
    top_k_M: Tensor,
    top_p_M: Tensor,
    uniform_M: Tensor,
    workspace: SamplerWorkspace | None,
    out_tokens_M: Tensor,
) -> None:
    params = sampling.SamplingTensors(temperature_M, top_k_M, top_p_M, torch.zeros_like(top_p_M))
    out_tokens_M.copy_(sampling.sample(logits_MV, params, uniform_M))


def sample_launches(
    logits_MV: Tensor,
    temperature_M: Tensor,
    top_k_M: Tensor,
    top_p_M: Tensor,
    uniform_M: Tensor,
    workspace: SamplerWorkspace,
    out_tokens_M: Tensor,
) -> tuple[Launch, Launch]:
    from gpt_fast.ops.gpu.sampler_triton import peaks_kernel, sample_kernel

    rows, vocab = logits_MV.shape
    chunk = chunk_size(vocab)
    chunks = divide_up(vocab, chunk)
    w = workspace._asdict()
    shared = {"logits": logits_MV, "vocab": vocab, "chunks": chunks}
    peaks = {name: w[name] for name in ("peak", "best", "best_at")}
    choice = {
        "temperatures": temperature_M,
        "top_ks": top_k_M,
        "top_ps": top_p_M,
        "uniforms": uniform_M,
        **w,
        "out": out_tokens_M,
    }
    constants = {"CHUNK": chunk, "CHUNKS": power_of_two(chunks), "CAPACITY": CAPACITY, "FAST_K": FAST_K}
    return (
        Launch(peaks_kernel, (rows, chunks), shared | peaks, {"CHUNK": chunk}, num_warps=4),
        Launch(sample_kernel, (rows, chunks), shared | choice, constants, num_warps=8),
    )
