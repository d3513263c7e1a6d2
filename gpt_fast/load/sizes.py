"""What a model gets of the machine: device, threads, element types, context and room for the KV cache."""

from __future__ import annotations

import os

import torch

from gpt_fast.config import ConfigError, EngineConfig, ModelConfig
from gpt_fast.engine.ranks import Group
from gpt_fast.load.checkpoint import Loaded
from gpt_fast.model.cache import KVCache
from gpt_fast.model.transformer import Transformer

DEFAULT_MAX_SEQ_LEN = 8192  # what a slot holds unless max_seq_len asks for more


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
    """ "auto" is CUDA where there is one, else the CPU. Of a group's ranks on one machine each has a GPU of its own."""
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


def choose_max_seq_len(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_seq_len or min(model.max_position, DEFAULT_MAX_SEQ_LEN)
    if wanted > model.max_position:
        limit = f"at most {model.max_position}"
        raise ConfigError("max_seq_len", "is past the model's context", got=wanted, allowed=limit)
    return wanted


def build_cache(
    config: EngineConfig,
    model: ModelConfig,
    max_seq_len: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    largest: ModelConfig | None = None,
    beside: KVCache | None = None,
) -> KVCache:
    """Allocate the KV cache of as many slots as are configured, after checking that the machine has room.

    largest: of the rank with the most KV heads (Loaded), by which all ranks count, for they must have as many slots.
    beside: a target's cache, whose draft gets as many slots. On a CPU it takes its memory only when it is written.
    """
    slot = KVCache(largest or model, slots=1, max_seq_len=max_seq_len, dtype=dtype, device=torch.device("meta")).nbytes
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
