"""How a loaded model is run: on fused kernels, compiled or on plain operators, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.engine.chunk_budget import ChunkBudget, JoinedBudget
from gpt_fast.engine.overlap_runner import OverlapRunner
from gpt_fast.engine.ranks import Group
from gpt_fast.engine.runner import Budget, Runner
from gpt_fast.load.checkpoint import Loaded
from gpt_fast.load.sizes import cache_dtype, torch_dtype
from gpt_fast.model.forward import Forward
from gpt_fast.model.parallel import is_sharded
from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.linear_compiled import for_one_token
from gpt_fast.quantize.linear import pack

if TYPE_CHECKING:
    from gpt_fast.ops.cpu.link import Link

SHARDED = "a fused kernel runs whole layers, inside which it cannot sum over ranks"
MANY_MACHINES = "the fused CPU kernels sum over the ranks of one machine"


class Refused(Exception):
    """The fused kernels do not compute what was asked for; the message says why, for the path's name."""


class ModelPath(NamedTuple):
    """How the model is run: its decode and prefill forwards, and their name for the log.

    torch_threads: for PyTorch's own operators beside it. Fused kernels have threads of their own, and PyTorch's
    would spin for milliseconds after each operator on the same cores: one is enough for the sampler.
    warm_up: whether a shape's first run costs more than its next ones; not so for plain operators, where running
    every shape would only take minutes.
    runner: makes the Runner that suits it. budget: makes its chunk budget from the chunks' sizes; None: it has none.
    greedy_saves: bytes of weights that a greedy step of few rows leaves out.
    tuning: what was chosen for this processor, and how; "" where there is no choice.
    link: where it meets the other ranks of this machine, if it does.
    """

    name: str
    decode: Forward
    prefill: Forward
    torch_threads: int
    warm_up: bool = True
    runner: Callable[..., Runner] = Runner
    budget: Callable[[list[int]], Budget] | None = ChunkBudget
    greedy_saves: int = 0
    tuning: str = ""
    link: Link | None = None


def choose_path(
    config: EngineConfig,
    loaded: Loaded,
    threads: int,
    *,
    beside: ModelPath | None = None,
    group: Group | None = None,
) -> ModelPath:
    """The fastest path that computes what was asked for; its name says why where it is not the fused one.

    compile, compile_prefill: on a GPU they are about what the fused kernels leave to PyTorch's operators, on a CPU they
    take the fused path's place. A GPU that has no fused kernels decodes compiled, asked for or not. A draft runs
    `beside` its target, on the same threads. group: of the ranks that share the model; all must choose together.
    """
    model = loaded.model
    device, asked = model.norm.weight.device, config.compile or config.compile_prefill
    if is_sharded(model):
        return sharded_path(config, loaded, threads, group)
    if asked and device.type == "cpu":
        return compiled_path(config, model, threads)
    try:
        return fused_path(config, loaded, threads, beside=beside)
    except Refused as why:
        return path_without_kernels(config, model, threads, why=str(why))


def path_without_kernels(config: EngineConfig, model: Transformer, threads: int, *, why: str) -> ModelPath:
    """Compiled where that was asked for or stands in for the kernels, else PyTorch's operators as they are."""
    if config.compile or config.compile_prefill:
        compiled = compiled_path(config, model, threads)
    elif config.kernels == "auto" and compiles_unasked(model):
        compiled = compiled_path(dataclasses.replace(config, compile=True), model, threads)
    else:
        pack(model)
        return ModelPath(f"plain ({why})", model, model, threads, warm_up=False)
    return compiled._replace(name=f"{compiled.name} ({why})")


def sharded_path(config: EngineConfig, loaded: Loaded, threads: int, group: Group | None) -> ModelPath:
    """A rank's share of a model."""
    try:
        return fused_path(config, loaded, threads, group=group)
    except Refused as why:
        pack(loaded.model)
        return ModelPath(f"plain (tensor parallel: {why})", loaded.model, loaded.model, threads, warm_up=False)


def compiles_unasked(model: Transformer) -> bool:
    """Whether torch.compile can stand in for the fused kernels: on CUDA and ROCm, where it needs Triton."""
    return model.norm.weight.device.type == "cuda" and find_spec("triton") is not None and not model.config.n_expert


def fused_path(
    config: EngineConfig,
    loaded: Loaded,
    threads: int,
    *,
    beside: ModelPath | None = None,
    group: Group | None = None,
) -> ModelPath:
    """The model on its device's fused kernels.

    Raises:
        Refused: why it cannot run there.
    """
    if reason := unfit(config, loaded):
        raise Refused(reason)
    if loaded.model.norm.weight.device.type == "cpu":
        return cpu_path(loaded, threads, beside=beside, group=group)
    return gpu_path(config, loaded.model, threads)


def unfit(config: EngineConfig, loaded: Loaded) -> str:
    """What keeps the model off any device's fused kernels; "" for nothing.

    float32 stays plain: it is the reference, and the fused kernels round activations.
    """
    dtype = loaded.model.norm.weight.dtype
    reasons = {
        SHARDED: is_sharded(loaded.model) and loaded.model.norm.weight.device.type != "cpu",
        "kernels: plain": config.kernels == "plain",
        "float32 and float16 have no fused path": loaded.quantization is None and dtype != torch.bfloat16,
        "a float16 KV cache has no fused path": cache_dtype(config, loaded) == torch.float16,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def cpu_path(loaded: Loaded, threads: int, *, beside: ModelPath | None, group: Group | None) -> ModelPath:
    """Decode and prompts on the fused CPU kernels; Refused where they do not fit or cannot be built."""
    from gpt_fast.ops.cpu import BuildError, CpuDecoder, unsupported

    reason, sharded = unsupported(loaded.model), is_sharded(loaded.model)
    if reason and not sharded:
        raise Refused(reason)
    weights = "bfloat16" if loaded.quantization is None else loaded.quantization["mode"].removesuffix("-gptq")
    pool = beside.decode.pool if beside is not None and isinstance(beside.decode, CpuDecoder) else None
    link = link_of(group, threads, reason) if sharded else None
    try:
        fused = CpuDecoder(loaded.model, weights=weights, threads=threads, pool=pool, link=link)
    except BuildError as error:
        raise Refused(str(error)) from None
    return ModelPath(
        "fused CPU decoder" if link is None else f"fused CPU decoder on {link.size} ranks",
        fused,
        fused,
        torch_threads=1,
        runner=OverlapRunner,
        budget=JoinedBudget,
        greedy_saves=fused.greedy_saves,
        tuning=str(fused.tuned),
        link=link,
    )


def link_of(group: Group | None, threads: int, refusal: str | None) -> Link:
    """Between the ranks of a model; Refused on all of them where one refuses."""
    from gpt_fast.ops.cpu.link import LinkRefused, join

    if group is None or group.local.size != group.ranks.size:
        raise Refused(MANY_MACHINES)
    try:
        return join(group.ranks, threads, refusal=refusal)
    except LinkRefused as error:
        raise Refused(str(error)) from None


def gpu_path(config: EngineConfig, model: Transformer, threads: int) -> ModelPath:
    """Decode on the fused GPU kernels, longer prompts on PyTorch's operators, compiled if so asked; or Refused."""
    from gpt_fast.engine.graph_runner import GraphRunner
    from gpt_fast.ops.gpu.decoder import GpuDecoder, unavailable, unsupported

    if reason := unavailable(model.norm.weight.device) or unsupported(model):
        raise Refused(reason)
    if torch_dtype(config.kv_cache) not in (None, model.norm.weight.dtype, torch.int8):
        raise Refused(f"kv_cache={config.kv_cache}: the fused GPU kernels read the model's own type and int8")
    try:
        fused = GpuDecoder(model)
    except ValueError as error:
        raise Refused(str(error)) from None
    name = "fused GPU decoder"
    if config.compile_prefill:
        fused.prefill, name = compiled_path(config, model, threads).prefill, f"{name}, compiled prefill"
    pack(model)
    runner = Runner if config.proposers else partial(GraphRunner, decoder=fused)
    return ModelPath(name, fused, fused, threads, runner=runner)


def compiled_path(config: EngineConfig, model: Transformer, threads: int) -> ModelPath:
    if model.config.n_expert:
        raise ConfigError("compile", "a mixture of experts is not compiled: which experts run depends on the token")
    pack(model)
    if config.compile and model.norm.weight.device.type == "cpu":
        for_one_token(model)
    # Decode and prefill share one code object; each takes a few graphs for its kinds of shapes.
    torch._dynamo.config.recompile_limit = 64
    compiled: Forward = torch.compile(model, fullgraph=True)
    return ModelPath(
        "compiled decode" + (" and prefill" if config.compile_prefill else ""),
        compiled if config.compile else model,
        compiled if config.compile_prefill else model,
        threads,
    )
