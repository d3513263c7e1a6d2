"""Load a converted checkpoint directory: config.json, manifest.json and gpt-fast-named safetensors.

Weights are mapped from the files, checked one by one and assigned: no second copy in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_fast.checkpoint.directory import (
    FLOATS,
    check_finite,
    find_weights,
    list_shards,
    read_quantization,
    shards_index,
)
from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.checkpoint.manifest import read_manifest, verify_manifest
from gpt_fast.checkpoint.safetensors_file import CheckpointError, SafetensorsFile
from gpt_fast.config import ModelConfig
from gpt_fast.model.empty import empty_model
from gpt_fast.model.transformer import Transformer


class Loaded(NamedTuple):
    config: ModelConfig
    model: Transformer
    directory: Path
    weights_file: Path  # as asked for; with shards, the name their index is called after
    quantization: Mapping[str, Any] | None


def load_checkpoint(
    path: Path, *, device: torch.device | str, dtype: torch.dtype | None = None, verify: bool = True
) -> Loaded:
    """Build the model of a converted directory, or of one weights file in it, in eval mode and without gradients.

    Args:
        path: the directory (its model.safetensors is meant), or e.g. DIR/model_int8.safetensors. Where only
            DIR/NAME.safetensors.index.json exists, its shards are read.
        dtype: what to compute in; None keeps the file's. Quantized weights stay as they are.
        verify: hash the weights against manifest.json. False checks their sizes only: for weights of tens of
            gigabytes on a disk you trust. Every other file is always hashed.
    Raises:
        CheckpointError, ConfigError: naming the file and, where there is one, the tensor.
    """
    weights = find_weights(Path(path))
    directory = weights.parent
    shards = list_shards(weights)
    names = [shard.name for shard in shards]
    others = [name for name in read_manifest(directory) if not name.endswith(".safetensors")]
    verify_manifest(directory, others)
    files = [SafetensorsFile(shard) for shard in shards]
    verify_manifest(directory, names, content=verify)
    config = load_model_config(directory)
    quantization = read_quantization(files)
    model = empty_model(config)
    where = collect(files, index=shards_index(weights))
    if quantization is not None:
        prepare_model(model, quantization, where)
    load_tensors(model, where, device=torch.device(device), dtype=dtype)
    return Loaded(config, model.eval(), directory, weights, quantization)


def prepare_model(model: Transformer, quantization: Mapping[str, Any], where: Mapping[str, SafetensorsFile]) -> None:
    """Give a model on the meta device the quantized modules that the files' metadata says and their tensors are."""
    from gpt_fast.quantize import apply_structure, check_stored

    apply_structure(model, quantization)
    check_stored(model, {name: (file.entries[name].dtype, file.entries[name].shape) for name, file in where.items()})


def collect(files: list[SafetensorsFile], *, index: Mapping[str, str] | None) -> dict[str, SafetensorsFile]:
    """Which file holds each tensor; with an index, exactly as it says."""
    where: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in where:
                raise CheckpointError(file.path, f"is in {where[name].path.name} too", tensor=name)
            if index is not None and index.get(name) != file.path.name:
                raise CheckpointError(file.path, f"is not where the index says ({index.get(name)})", tensor=name)
            where[name] = file
    for name in index or {}:
        if name not in where:
            raise CheckpointError(files[0].path.with_name(index[name]), "is missing", tensor=name)  # type: ignore[index]
    return where


def load_tensors(
    model: Transformer, where: Mapping[str, SafetensorsFile], *, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Assign every tensor of a model on the meta device, after checking name, shape, dtype and values."""
    expected = model.state_dict()
    if model.config.tie_embeddings:
        expected.pop("output.weight", None)
    first = next(iter(where.values())).path
    for name in expected.keys() - where.keys():
        raise CheckpointError(first, "is missing", tensor=name)
    for name in sorted(where.keys() - expected.keys()):
        raise CheckpointError(where[name].path, "is not part of this model", tensor=name)
    free = {name for name, _ in model.named_parameters()}  # a quantized module's buffers say their own dtype
    state, kept = {}, None
    for name, like in expected.items():
        file = where[name]
        check_entry(file, name, like, any_float=name in free)
        tensor = file.tensor(name)
        check_finite(file.path, name, tensor)
        if name in free:
            kept = kept or tensor.dtype
            if tensor.dtype != kept:
                raise CheckpointError(file.path, f"is {tensor.dtype}, others are {kept}", tensor=name)
        state[name] = tensor.to(device=device, dtype=dtype if name in free and dtype else tensor.dtype)
    model.requires_grad_(False)
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.tie_output()
    model.to(dtype or kept)  # copies nothing: tells quantized modules what to compute in


def check_entry(file: SafetensorsFile, name: str, like: Tensor, *, any_float: bool) -> None:
    entry = file.entries[name]
    if entry.shape != tuple(like.shape):
        problem = f"has the wrong shape (got {list(entry.shape)}, config.json says {list(like.shape)})"
        raise CheckpointError(file.path, problem, tensor=name)
    allowed = FLOATS if any_float else (like.dtype,)
    if entry.dtype not in allowed:
        problem = f"has the wrong dtype (got {entry.dtype}, allowed {', '.join(map(str, allowed))})"
        raise CheckpointError(file.path, problem, tensor=name)
