"""Load a converted checkpoint directory: config.json, manifest.json and gpt-fast-named safetensors.

Weights are mapped from the files, checked and assigned: no second copy in memory. A rank copies its share out of them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpt_fast.checkpoint.directory import (
    FLOATS,
    check_finite,
    find_weights,
    index_of,
    list_shards,
    read_quantization,
    shards_index,
)
from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.checkpoint.manifest import MANIFEST, read_manifest, verify_manifest
from gpt_fast.checkpoint.safetensors_file import CheckpointError, SafetensorsFile
from gpt_fast.checkpoint.side_names import side_files_in
from gpt_fast.config import ModelConfig
from gpt_fast.model.empty import empty_model
from gpt_fast.model.parallel import Ranks, shard_block, shard_ends, share_of
from gpt_fast.model.shares import share_out
from gpt_fast.model.transformer import Transformer


class Loaded(NamedTuple):
    config: ModelConfig  # of a rank's share: its heads and features
    largest: ModelConfig  # of the rank that has the most KV heads
    model: Transformer
    directory: Path
    weights_file: Path  # as asked for; with shards, the name their index is called after
    quantization: Mapping[str, Any] | None


def load_checkpoint(
    path: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    ranks: Ranks | None = None,
) -> Loaded:
    """Build the model of a converted directory, or of one weights file in it, in eval mode and without gradients.

    Args:
        path: the directory (its model.safetensors is meant), or e.g. DIR/model_int8.safetensors. Where only
            DIR/NAME.safetensors.index.json exists, its shards are read.
        dtype: what to compute in; None keeps the file's. Quantized weights stay as they are.
        verify: hash the weights against manifest.json. False checks their sizes only: for weights of tens of
            gigabytes on a disk you trust. Every other file is always hashed.
        ranks: build this rank's share of the model (model.parallel), and read no more than that needs.
    Raises:
        CheckpointError, ConfigError: naming the file and, where there is one, the tensor.
    """
    weights = find_weights(Path(path))
    directory = weights.parent
    shards = list_shards(weights)
    names = [shard.name for shard in shards]
    listed = read_manifest(directory)
    check_listed(directory, weights, listed)
    others = [name for name in listed if not name.endswith(".safetensors")]
    verify_manifest(directory, others)
    files = [SafetensorsFile(shard) for shard in shards]
    with verified_meanwhile(directory, names, content=verify):
        quantization = read_quantization(files)
        config = load_model_config(directory)
        largest = config if ranks is None else share_out(config, 0, ranks.size).config(config)
        model = empty_model(config)
        where = collect(files, index=shards_index(weights))
        if quantization is not None:
            prepare_model(model, quantization, where)
        load_tensors(model, where, device=torch.device(device), dtype=dtype, ranks=ranks)
    return Loaded(model.config, largest, model.eval(), directory, weights, quantization)


def check_listed(directory: Path, weights: Path, listed: Container[str]) -> None:
    """Nothing is read that the manifest does not list, and therefore nobody verifies: CheckpointError names it."""
    read = ["config.json", *side_files_in(directory)]
    if not weights.is_file():
        read.append(index_of(weights).name)
    for name in read:
        if name not in listed:
            way_out = "take it away, or convert again with it beside the weights that you convert"
            raise CheckpointError(directory / name, f"is not in {MANIFEST}: {way_out}")


@contextmanager
def verified_meanwhile(directory: Path, names: list[str], *, content: bool) -> Iterator[None]:
    """Verify files beside what the block does with them; the block's results are not to be used before its end.

    CheckpointError, also in place of the block's own: a damaged file is the reason, whatever else came of it.
    """
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(verify_manifest, directory, names, content=content)
        try:
            yield
        finally:
            verified.result()


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
    model: Transformer,
    where: Mapping[str, SafetensorsFile],
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    ranks: Ranks | None = None,
) -> None:
    """Assign every tensor of a model on the meta device, after checking name, shape, dtype and values.

    With ranks, this rank's share of it: cut layer by layer, so that no more of the file than that is held at a time.
    """
    dtype = dtype or check_entries(model, where)
    model.requires_grad_(False)
    share = None if ranks is None else share_of(model, ranks)

    def settle(name: str, module: nn.Module) -> None:
        check_values(name, module, where)
        module.to(device=device, dtype=dtype)  # a quantized module's weights keep their own

    for index, block in enumerate(model.layers):
        with mapped({f"layers.{index}": block}, where, release=ranks is not None):
            if share is not None and ranks is not None:
                shard_block(block, share, ranks)
            settle(f"layers.{index}", block)
    ends = {name: module for name, module in model.named_children() if name != "layers"}
    with mapped(ends, where, release=ranks is not None):
        if model.config.tie_embeddings:
            model.tie_output()
        if share is not None and ranks is not None:
            shard_ends(model, share, ranks)
        for name, module in ends.items():
            settle(name, module)


def check_entries(model: Transformer, where: Mapping[str, SafetensorsFile]) -> torch.dtype:
    """The dtype of the files' plain weights; CheckpointError where a tensor is none of the model's, or another."""
    expected = model.state_dict()
    if model.config.tie_embeddings:
        expected.pop("output.weight", None)
    first = next(iter(where.values())).path
    for name in expected.keys() - where.keys():
        raise CheckpointError(first, "is missing", tensor=name)
    for name in sorted(where.keys() - expected.keys()):
        raise CheckpointError(where[name].path, "is not part of this model", tensor=name)
    free = {name for name, _ in model.named_parameters()}  # a quantized module's buffers say their own dtype
    kept = None
    for name, like in expected.items():
        file = where[name]
        check_entry(file, name, like, any_float=name in free)
        if name in free:
            kept = kept or file.entries[name].dtype
            if file.entries[name].dtype != kept:
                raise CheckpointError(file.path, f"is {file.entries[name].dtype}, others are {kept}", tensor=name)
    assert kept is not None  # norms are never quantized
    return kept


def check_entry(file: SafetensorsFile, name: str, like: Tensor, *, any_float: bool) -> None:
    entry = file.entries[name]
    if entry.shape != tuple(like.shape):
        problem = f"has the wrong shape (got {list(entry.shape)}, config.json says {list(like.shape)})"
        raise CheckpointError(file.path, problem, tensor=name)
    allowed = FLOATS if any_float else (like.dtype,)
    if entry.dtype not in allowed:
        problem = f"has the wrong dtype (got {entry.dtype}, allowed {', '.join(map(str, allowed))})"
        raise CheckpointError(file.path, problem, tensor=name)


@contextmanager
def mapped(modules: Mapping[str, nn.Module], where: Mapping[str, SafetensorsFile], *, release: bool) -> Iterator[None]:
    """The modules with the files' tensors in them; if asked, let go of what was read of the files at the end."""
    taken: list[str] = []
    for prefix, module in modules.items():
        names = {name: f"{prefix}.{name}" for name in module.state_dict() if f"{prefix}.{name}" in where}
        state = {name: where[full].tensor(full) for name, full in names.items()}
        module.load_state_dict(state, strict=False, assign=True)  # a tied head has none of its own
        taken += names.values()
    yield
    for full in taken:
        if release:
            where[full].release(full)


def check_values(prefix: str, module: nn.Module, where: Mapping[str, SafetensorsFile]) -> None:
    """Hold what is kept of the files' tensors, whole or cut, to be finite."""
    for name, tensor in module.state_dict().items():
        if (full := f"{prefix}.{name}") in where:
            check_finite(where[full].path, full, tensor)
