"""From an EngineConfig to a warm engine: read the checkpoint, size the cache, choose the fast path, warm up."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from gpt_fast.checkpoint.directory import find_weights
from gpt_fast.checkpoint.quality_gate import check_quality, weights_sha256
from gpt_fast.config import ConfigError, EngineConfig, ModelConfig
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.lead import Leader, follow
from gpt_fast.engine.overlap_runner import OverlapRunner
from gpt_fast.engine.ranks import Group
from gpt_fast.engine.runner import Runner, buckets, chunk_sizes
from gpt_fast.load import cores
from gpt_fast.load.checkpoint import Loaded, load_checkpoint
from gpt_fast.load.description import EngineDescription
from gpt_fast.load.path import ModelPath, choose_path
from gpt_fast.load.sizes import (
    build_cache,
    cache_dtype,
    choose_device,
    choose_max_seq_len,
    cores_of,
    torch_dtype,
    weight_bytes_per_step,
)
from gpt_fast.model import huge_pages
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Forward
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.proposer import Proposer
from gpt_fast.speculative.speculator import Speculator
from gpt_fast.text.chat import ChatTemplate, load_chat_template
from gpt_fast.text.load_tokenizer import load_tokenizer
from gpt_fast.text.tokenizer import Tokenizer


class Parts(NamedTuple):
    """What an llm.Engine is made of."""

    core: EngineCore
    tokenizer: Tokenizer
    model_config: ModelConfig
    chat_template: ChatTemplate | None
    description: EngineDescription


class Share(NamedTuple):
    """What one process holds of the model, alone or as a rank: weights, KV cache, and the forwards that run them."""

    loaded: Loaded
    cache: KVCache
    path: ModelPath
    threads: int
    weight_bytes: int


def load_parts(config: EngineConfig, group: Group | None = None) -> Parts:
    """Build everything once; when this returns, no request compiles or allocates.

    With a group, this is its rank 0, and the other ranks `follow` with the same config.
    """
    started = time.perf_counter()
    weights = find_weights(Path(config.checkpoint_path))
    directory = weights.parent
    if config.quality:
        check_quality(weights, config.quality, kv_cache=config.kv_cache)
    with ThreadPoolExecutor(1) as beside:  # while the weights are hashed
        text = beside.submit(lambda: (load_tokenizer(directory), load_chat_template(directory)))
        share = load_share(config, group)
    tokenizer, chat_template = text.result()
    loaded, cache, path = share.loaded, share.cache, share.path
    check_vocabulary(tokenizer.vocab_size, loaded.config)
    prefill_chunk = min(config.prefill_chunk, cache.max_seq_len)
    decode, prefill, whole_cache = lead(share, group)
    runner = path.runner(
        decode=decode,
        prefill=prefill,
        cache=whole_cache,
        eos_ids={*loaded.config.eos_ids, *tokenizer.eos_ids},
        prefill_chunk=prefill_chunk,
        budget=path.budget and path.budget(chunk_sizes(prefill_chunk)),
        speculator=build_speculator(config, cache, path, share.threads),
    )
    if path.warm_up:
        runner.warm_up()
    torch.set_num_threads(path.torch_threads)
    huge_pages.populate(cache.buffers())
    description = EngineDescription(
        checkpoint=str(loaded.weights_file),
        quantization=(loaded.quantization or {}).get("mode", "none"),
        path=path.name,
        tuning=path.tuning,
        device=str(runner.device),
        threads=share.threads,
        torch_threads=path.torch_threads,
        dtype=name_of(loaded.model.norm.weight.dtype),
        kv_cache=name_of(cache.k_LNHTD.dtype),
        kv_cache_gib=round(cache.nbytes / 2**30, 3),
        max_seq_len=cache.max_seq_len,
        max_num_seqs=cache.slots,
        speculate="+".join(config.proposers) or "none",
        weight_bytes_per_step=share.weight_bytes,
        greedy_bytes_per_step=share.weight_bytes - path.greedy_saves,
        load_seconds=round(time.perf_counter() - started, 2),
    )
    return Parts(EngineCore(runner), tokenizer, loaded.config, chat_template, description)


def load_share(config: EngineConfig, group: Group | None) -> Share:
    """The model, or this rank's share of it, with its cache, ready to run.

    ValueError where ranks differ. ConfigError for compile on ranks: with torch 2.13 shares compiled for several rows
    gave other tokens than the same shares as they are, or waited for one another for ever.
    """
    if group is not None and (config.compile or config.compile_prefill):
        raise ConfigError("compile", "compiled shares of a model gave wrong tokens on ranks", got=True, allowed="false")
    device = choose_device(config.device, group)
    threads = config.threads or cores_of(group)
    if group is not None and device.type == "cpu":
        cores.settle(group)
    torch.set_num_threads(threads)
    loaded = load_model(config.checkpoint_path, device=device, dtype=config.dtype, group=group)
    max_seq_len = choose_max_seq_len(config, loaded.config)
    dtype = cache_dtype(config, loaded)
    cache = build_cache(config, loaded.config, max_seq_len, dtype, device, largest=loaded.largest)
    weight_bytes = weight_bytes_per_step(loaded.model)  # before a path packs them
    loaded.model.setup_rope(max_seq_len, device)
    path = choose_path(config, loaded, threads, group=group)
    if group is not None:
        dtypes = (name_of(t.dtype) for t in (loaded.model.norm.weight, cache.k_LNHTD))
        shape = f"{cache.slots} slots of {max_seq_len} positions"
        group.agree(f"{weights_sha256(loaded.weights_file)[:16]}, {'/'.join(dtypes)}, {shape}, {path.name}")
        group.plans.through(path.link)
    return Share(loaded, cache, path, threads, weight_bytes)


def lead(share: Share, group: Group | None) -> tuple[Forward, Forward, KVCache]:
    """Decode, prefill and cache for a runner: this process's own, or those that take the other ranks along."""
    path, cache = share.path, share.cache
    if group is None:
        return path.decode, path.prefill, cache
    leader = Leader(group.plans)
    return leader.forward(path.decode), leader.forward(path.prefill), leader.cache(cache)


def start_following(config: EngineConfig, group: Group) -> Callable[[], None]:
    """Load this rank's share of the engine that rank 0 loads; what is returned computes it until rank 0 ends."""
    share = load_share(config, group)
    huge_pages.populate(share.cache.buffers())

    def run() -> None:
        torch.set_num_threads(share.path.torch_threads)  # of the thread that runs this
        follow(group.plans, (share.path.decode, share.path.prefill), [share.cache])

    return run


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build_speculator(config: EngineConfig, cache: KVCache, target: ModelPath, threads: int) -> Speculator | None:
    """Who proposes to the target that `cache` belongs to, as configured; None for plain decode."""
    device = cache.k_LNHTD.device
    proposers: dict[str, Proposer] = {}
    if "draft" in config.proposers:
        draft = load_draft(config, cache, target, threads)
        proposers["draft"] = DraftProposer(draft, startable=draft.decode if isinstance(draft, OverlapRunner) else None)
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
        raise ConfigError(
            "draft_checkpoint_path",
            "the draft's vocabulary is not the target's",
            got=loaded.config.vocab_size,
            allowed=f"{vocabulary}, as the target's",
        )
    max_seq_len = min(cache.max_seq_len, loaded.config.max_position)
    dtype = cache_dtype(config, loaded)
    draft_cache = build_cache(config, loaded.config, max_seq_len, dtype, device, beside=cache)
    loaded.model.setup_rope(max_seq_len, device)
    path = choose_path(config, loaded, threads, beside=target)
    runner = path.runner(
        decode=path.decode,
        prefill=path.prefill,
        cache=draft_cache,
        eos_ids=loaded.config.eos_ids,
        prefill_chunk=min(config.prefill_chunk, max_seq_len),
    )
    if path.warm_up:
        runner.warm_up()
    huge_pages.populate(draft_cache.buffers())
    return runner


def load_model(path: str, *, device: torch.device, dtype: str, group: Group | None = None) -> Loaded:
    """The checkpoint's model in eval mode, not packed yet; with a group, this rank's share of it.

    dtype is EngineConfig's. The first rank of each machine hashes the weights for the others.
    """
    ranks, verify = (None, True) if group is None else (group.ranks, group.local.rank == 0)
    return load_checkpoint(Path(path), device=device, dtype=torch_dtype(dtype), ranks=ranks, verify=verify)


def check_vocabulary(tokens: int, config: ModelConfig) -> None:
    if tokens > config.vocab_size:
        raise ConfigError(
            "tokenizer",
            "has more tokens than the model's embedding",
            got=tokens,
            allowed=f"at most {config.vocab_size}",
        )
