"""From an EngineConfig to a warm engine: read the checkpoint, size the cache, choose the fast path, warm up."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt_fast.checkpoint.quality_gate import check_quality
from gpt_fast.config import ConfigError, EngineConfig, ModelConfig
from gpt_fast.engine.core import EngineCore, Forward, Runner, buckets
from gpt_fast.engine.overlap_runner import AheadRunner
from gpt_fast.engine.ranks import Group, LockstepRunner
from gpt_fast.load.checkpoint import Loaded, find_weights, load_checkpoint
from gpt_fast.model import huge_pages
from gpt_fast.model.cache import KVCache
from gpt_fast.model.parallel import is_sharded, shard
from gpt_fast.model.transformer import Transformer
from gpt_fast.ops.linear_compiled import for_one_token
from gpt_fast.quantize.linear import Quantized
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.draft_model import DraftProposer, NGramProposer
from gpt_fast.speculative.speculator import Proposer, Speculator
from gpt_fast.text.chat import ChatTemplate, load_chat_template
from gpt_fast.text.tokenizer import Tokenizer, load_tokenizer

DEFAULT_MAX_SEQ_LEN = 8192  # what a slot holds unless max_seq_len asks for more
SHARDED = "tensor parallel: a fused kernel runs whole layers, inside which it cannot sum over ranks"


class Parts(NamedTuple):
    """What an llm.Engine is made of."""

    core: EngineCore
    tokenizer: Tokenizer
    model_config: ModelConfig
    chat_template: ChatTemplate | None
    description: dict[str, Any]  # what was chosen, for the log and the user


def load_parts(config: EngineConfig, group: Group | None = None) -> Parts:
    """Build everything once; when this returns, no request compiles or allocates.

    With a group, the model is its ranks' together: each must be asked the same, in the same order.
    """
    started = time.perf_counter()
    if group is not None and config.proposers:
        raise ConfigError("speculate", "is not there under tensor parallelism", got=config.speculate, allowed="none")
    if config.quality:
        check_quality(find_weights(Path(config.checkpoint_path)), config.quality, kv_cache=config.kv_cache)
    device = choose_device(config.device, group)
    threads = config.threads or cores_of(group)
    torch.set_num_threads(threads)
    loaded, tokenizer, chat_template = read_checkpoint(config, device, group)
    model = loaded.model
    check_vocabulary(tokenizer.vocab_size, loaded.config)
    max_seq_len = choose_max_seq_len(config, loaded.config)
    compute_dtype = model.norm.weight.dtype
    cache = build_cache(config, loaded.config, max_seq_len, cache_dtype(config, loaded), device)
    weight_bytes = weight_bytes_per_step(model)
    model.setup_rope(max_seq_len, device)
    path = choose_path(config, loaded, threads)
    runner = path.runner(
        decode=path.decode,
        prefill=path.prefill,
        cache=cache,
        eos_ids={*loaded.config.eos_ids, *tokenizer.eos_ids},
        prefill_chunk=min(config.prefill_chunk, max_seq_len),
        speculator=build_speculator(config, cache, path, threads),
    )
    if path.warm_up:
        runner.warm_up()
    torch.set_num_threads(path.torch_threads)
    huge_pages.populate(cache.buffers())
    return Parts(
        EngineCore(runner),
        tokenizer,
        loaded.config,
        chat_template,
        {
            "checkpoint": str(loaded.weights_file),
            "quantization": (loaded.quantization or {}).get("mode", "none"),
            "path": path.name,
            "tuning": path.tuning,
            "device": str(device),
            "threads": threads,
            "torch_threads": path.torch_threads,
            "dtype": str(compute_dtype).removeprefix("torch."),
            "kv_cache": str(cache.k_LNHTD.dtype).removeprefix("torch."),
            "kv_cache_gib": round(cache.nbytes / 2**30, 3),
            "max_seq_len": max_seq_len,
            "max_num_seqs": cache.slots,
            "speculate": "+".join(config.proposers) or "none",
            "weight_bytes_per_step": weight_bytes,
            "greedy_bytes_per_step": weight_bytes - path.greedy_saves,
            "load_seconds": round(time.perf_counter() - started, 2),
        },
    )


def read_checkpoint(
    config: EngineConfig, device: torch.device, group: Group | None
) -> tuple[Loaded, Tokenizer, ChatTemplate | None]:
    """The model and, read by another thread while this one hashes the weights, what makes its tokens of text."""
    directory = find_weights(Path(config.checkpoint_path)).parent
    with ThreadPoolExecutor(1) as beside:
        text = beside.submit(lambda: (load_tokenizer(directory), load_chat_template(directory)))
        loaded = load_model(config.checkpoint_path, device=device, dtype=config.dtype, group=group)
    return loaded, *text.result()


def build_speculator(config: EngineConfig, cache: KVCache, target: ModelPath, threads: int) -> Speculator | None:
    """Who proposes to the target that `cache` belongs to, as configured; None for plain decode."""
    device = cache.k_LNHTD.device
    proposers: dict[str, Proposer] = {}
    if "draft" in config.proposers:
        draft = load_draft(config, cache, target, threads)
        proposers["draft"] = DraftProposer(draft, start=draft.decode.start if isinstance(draft, AheadRunner) else None)
    if "ngram" in config.proposers:
        proposers["ngram"] = NGramProposer(device)
    controller = Controller(buckets(config.speculate_k, 1))
    return Speculator(proposers, controller, max_seq_len=cache.max_seq_len) if proposers else None


def load_draft(config: EngineConfig, cache: KVCache, target: ModelPath, threads: int) -> Runner:
    """The draft model, warm, with a cache of the target's slots."""
    device = cache.k_LNHTD.device
    loaded = load_model(str(config.draft_checkpoint_path), device=device, dtype=config.dtype)
    vocabulary = cache.config.vocab_size
    if loaded.config.vocab_size != vocabulary:
        raise ConfigError("draft_checkpoint_path", "the draft's vocabulary is not the target's",
                          got=loaded.config.vocab_size, allowed=f"{vocabulary}, as the target's")  # fmt: skip
    max_seq_len = min(cache.max_seq_len, loaded.config.max_position)
    dtype = cache_dtype(config, loaded)
    draft_cache = build_cache(config, loaded.config, max_seq_len, dtype, device, beside=cache)
    loaded.model.setup_rope(max_seq_len, device)
    path = choose_path(config, loaded, threads, beside=target)
    runner = path.runner(
        decode=path.decode, prefill=path.prefill, cache=draft_cache, eos_ids=loaded.config.eos_ids,
        prefill_chunk=min(config.prefill_chunk, max_seq_len),
    )  # fmt: skip
    if path.warm_up:
        runner.warm_up()
    huge_pages.populate(draft_cache.buffers())
    return runner


def load_model(path: str, *, device: torch.device, dtype: str, group: Group | None = None) -> Loaded:
    """The checkpoint's model in eval mode, not packed yet; with a group, this rank's share of it.

    dtype is EngineConfig's. A share is cut from the file's pages before it goes to the device, which never holds more.
    """
    if group is None:
        return load_checkpoint(Path(path), device=device, dtype=torch_dtype(dtype))
    loaded = load_checkpoint(Path(path), device="cpu")
    shard(loaded.model, group.ranks)
    loaded.model.to(device=device, dtype=torch_dtype(dtype))
    return loaded._replace(config=loaded.model.config)


def cores_of(group: Group | None) -> int:
    """Threads of this process: the machine's cores, shared with the ranks beside it."""
    return max(1, (os.cpu_count() or 1) // (group.local.size if group is not None else 1))


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a configured name; None for "auto"."""
    return None if name == "auto" else getattr(torch, name)


def cache_dtype(config: EngineConfig, loaded: Loaded) -> torch.dtype:
    """The KV cache's element type."""
    own = loaded.model.norm.weight
    coarse = loaded.quantization is not None and own.device.type == "cpu"
    return torch_dtype(config.kv_cache) or (torch.bfloat16 if coarse else own.dtype)


def choose_device(name: str, group: Group | None = None) -> torch.device:
    """"auto" is CUDA where there is one, else the CPU. Of a group's ranks on one machine each has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and group is not None:
        name = f"cuda:{group.local.rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError("device", "unknown device", got=name, allowed="auto, cpu, cuda, cuda:N, mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError("device", "not on this machine", got=name, allowed=f"{count} CUDA devices")
    return device


def check_vocabulary(tokens: int, config: ModelConfig) -> None:
    if tokens > config.vocab_size:
        raise ConfigError("tokenizer", "has more tokens than the model's embedding", got=tokens,
                          allowed=f"at most {config.vocab_size}")  # fmt: skip


def choose_max_seq_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_seq_len or min(model.max_position, DEFAULT_MAX_SEQ_LEN)
    if wanted > model.max_position:
        limit = f"at most {model.max_position}"
        raise ConfigError("max_seq_len", "is past the model's context", got=wanted, allowed=limit)
    return wanted


def build_cache(
    config: EngineConfig, model: ModelConfig, max_seq_len: int, dtype: torch.dtype, device: torch.device, *,
    beside: KVCache | None = None,
) -> KVCache:  # fmt: skip
    """Allocate the KV cache of as many slots as are configured, after checking that the machine has room.

    beside: a target's cache, whose draft gets as many slots. On a CPU it takes its memory only when it is written.
    """
    slot = KVCache(model, slots=1, max_seq_len=max_seq_len, dtype=dtype, device=torch.device("meta")).nbytes
    slots = beside.slots if beside else affordable_slots(config, slot, max_seq_len)
    free = free_memory(device)
    if free is not None and beside and device.type == "cpu":
        free -= beside.nbytes
    if free is not None and slots * slot > free:
        raise ConfigError(
            "max_num_seqs",
            f"{slots} slots of {max_seq_len} positions need {slots * slot / 2**30:.2f} GiB of KV cache",
            allowed=f"{free / 2**30:.2f} GiB free on {device}; lower max_num_seqs, max_seq_len or kv_cache_gib",
        )
    return KVCache(model, slots=slots, max_seq_len=max_seq_len, dtype=dtype, device=device)


def affordable_slots(config: EngineConfig, slot: int, max_seq_len: int) -> int:
    """As many slots of `slot` bytes as kv_cache_gib holds, at most max_num_seqs."""
    if not config.kv_cache_gib:
        return config.max_num_seqs
    slots = int(config.kv_cache_gib * 2**30 / slot)
    if not slots:
        problem = f"holds no slot of {max_seq_len} positions; lower max_seq_len"
        raise ConfigError("kv_cache_gib", problem, got=config.kv_cache_gib, allowed=f"at least {slot / 2**30:.3f}")
    return min(slots, config.max_num_seqs)


def weight_bytes_per_step(model: Transformer) -> int:
    """Bytes of weights one decode step reads: all of them, but only a row of an embedding that is not the head's."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    untied = 0 if model.config.tie_embeddings else sum(t.nbytes for t in model.tok_embeddings.parameters())
    return total - untied


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


class ModelPath(NamedTuple):
    """How the model is run: its decode and prefill forwards, and their name for the log.

    torch_threads: for PyTorch's own operators beside it. Fused kernels have threads of their own, and PyTorch's
    would spin for milliseconds after each operator on the same cores: one is enough for the sampler.
    warm_up: whether a shape's first run costs more than its next ones; not so for plain operators, where running
    every shape would only take minutes.
    runner: makes the Runner that suits it.
    greedy_saves: bytes of weights that a greedy step of few rows leaves out.
    tuning: what was chosen for this processor, and how; "" where there is no choice.
    """

    name: str
    decode: Forward
    prefill: Forward
    torch_threads: int
    warm_up: bool = True
    runner: Callable[..., Runner] = Runner
    greedy_saves: int = 0
    tuning: str = ""


def choose_path(
    config: EngineConfig, loaded: Loaded, threads: int, *, beside: ModelPath | None = None
) -> ModelPath:
    """The fastest path that computes what was asked for; its name says why where it is not the fused one.

    compile, compile_prefill: on a GPU they are about what the fused kernels leave to PyTorch's operators, on a CPU they
    take the fused path's place. A GPU that has no fused kernels decodes compiled, asked for or not. A draft runs
    `beside` its target, on the same threads.
    """
    model = loaded.model
    device, asked = model.norm.weight.device, config.compile or config.compile_prefill
    if is_sharded(model):
        return sharded_path(config, model, threads)
    if asked and device.type == "cpu":
        return compiled_path(config, model, threads)
    path = fused_path(config, loaded, threads, beside=beside)
    if isinstance(path, ModelPath):
        return path
    if asked or (config.kernels == "auto" and compiles_unasked(model, device)):
        path_config = config if asked else dataclasses.replace(config, compile=True)
        compiled = compiled_path(path_config, model, threads)
        return compiled._replace(name=f"{compiled.name} ({path})")
    prepare_modules(model)
    return ModelPath(f"plain ({path})", model, model, threads, warm_up=False)


def sharded_path(config: EngineConfig, model: Transformer, threads: int) -> ModelPath:
    if config.compile or config.compile_prefill:
        raise ConfigError("compile", "is not there under tensor parallelism", got=True, allowed="false")
    prepare_modules(model)
    return ModelPath(f"plain ({SHARDED})", model, model, threads, warm_up=False, runner=LockstepRunner)


def compiles_unasked(model: Transformer, device: torch.device) -> bool:
    """Whether torch.compile can stand in for the fused kernels: on CUDA and ROCm, where it needs Triton."""
    return device.type == "cuda" and find_spec("triton") is not None and not model.config.n_expert


def fused_path(
    config: EngineConfig, loaded: Loaded, threads: int, *, beside: ModelPath | None
) -> ModelPath | str:
    """The model on its device's fused kernels, or why it stays on the plain path.

    float32 stays plain: it is the reference, and the fused kernels round activations.
    """
    if is_sharded(loaded.model):
        return SHARDED
    if config.kernels == "plain":
        return "kernels: plain"
    if loaded.quantization is None and loaded.model.norm.weight.dtype != torch.bfloat16:
        return "float32 and float16 have no fused path"
    if cache_dtype(config, loaded) == torch.float16:
        return "a float16 KV cache has no fused path"
    if loaded.model.norm.weight.device.type != "cpu":
        return gpu_path(config, loaded.model, threads)
    from gpt_fast.ops.cpu import BuildError, CpuDecoder, unsupported

    if reason := unsupported(loaded.model):
        return reason
    weights = "bfloat16" if loaded.quantization is None else loaded.quantization["mode"].removesuffix("-gptq")
    pool = beside.decode.pool if beside is not None and isinstance(beside.decode, CpuDecoder) else None
    try:
        fused = CpuDecoder(loaded.model, weights=weights, threads=threads, pool=pool)
    except BuildError as error:
        return str(error)
    return ModelPath(
        "fused CPU decoder", fused, fused, torch_threads=1, runner=AheadRunner, greedy_saves=fused.greedy_saves,
        tuning=str(fused.tuned),
    )


def gpu_path(config: EngineConfig, model: Transformer, threads: int) -> ModelPath | str:
    """Decode on the fused GPU kernels, longer prompts on PyTorch's operators, compiled if so asked; or why not."""
    from gpt_fast.engine.graph_runner import BurstRunner
    from gpt_fast.ops.gpu.decoder import GpuDecoder, unavailable, unsupported

    if reason := unavailable(model.norm.weight.device) or unsupported(model):
        return reason
    if torch_dtype(config.kv_cache) not in (None, model.norm.weight.dtype, torch.int8):
        return f"kv_cache={config.kv_cache}: the fused GPU kernels read the model's own type and int8"
    try:
        fused = GpuDecoder(model)
    except ValueError as error:
        return str(error)
    name = "fused GPU decoder"
    if config.compile_prefill:
        fused.prefill, name = compiled_path(config, model, threads).prefill, f"{name}, compiled prefill"
    prepare_modules(model)
    runner = Runner if config.proposers else partial(BurstRunner, decoder=fused)
    return ModelPath(name, fused, fused, threads, runner=runner)


def compiled_path(config: EngineConfig, model: Transformer, threads: int) -> ModelPath:
    if model.config.n_expert:
        raise ConfigError("compile", "a mixture of experts is not compiled: which experts run depends on the token")
    prepare_modules(model)
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


def prepare_modules(model: Transformer) -> None:
    """Let quantized modules choose their op for this device."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.pack()
