"""Where a conversion's tensors come from: one interface over every file format, one tensor in memory at a time."""

from __future__ import annotations

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt_fast.checkpoint.directory import FLOATS, read_weight_map
from gpt_fast.checkpoint.safetensors_file import CheckpointError, SafetensorsFile

ROWS = tuple[int, int]


class TensorInfo(NamedTuple):
    file: Path
    dtype: torch.dtype  # as `read` returns it
    shape: tuple[int, ...]


class Source(ABC):
    """Named tensors of a checkpoint. `infos` is known before anything is read."""

    infos: Mapping[str, TensorInfo]
    path: Path  # what an error about a missing tensor names

    @abstractmethod
    def read(self, name: str, rows: ROWS | None = None) -> Tensor:
        """The tensor, or rows start..stop-1 of it seen as a matrix (leading dimensions flattened)."""


def take_rows(tensor: Tensor, rows: ROWS | None) -> Tensor:
    if rows is None:
        return tensor
    return (tensor if tensor.dim() < 2 else tensor.flatten(0, -2))[rows[0] : rows[1]]


class SafetensorsSource(Source):
    """model.safetensors, or the shards of an index. A file is mapped for one tensor and let go."""

    def __init__(self, path: Path, shards: Mapping[str, Path]) -> None:
        self.path = path
        self.files = {file: SafetensorsFile(file) for file in sorted(set(shards.values()))}
        entries = {(file, name): entry for file, opened in self.files.items() for name, entry in opened.entries.items()}
        check_index(path, shards, entries)
        self.infos = {name: TensorInfo(file, entry.dtype, entry.shape) for (file, name), entry in entries.items()}

    def read(self, name: str, rows: ROWS | None = None) -> Tensor:
        file = self.files[self.infos[name].file]
        tensor = take_rows(file.tensor(name), rows)
        file.close()
        return tensor


class TorchSource(Source):
    """torch.save files (.bin, .pth): weights_only, mapped, dense tensors only. One file is open at a time."""

    def __init__(self, path: Path, shards: Mapping[str, Path] | None) -> None:
        self.path = path
        self.opened: tuple[Path, Mapping[str, Tensor]] | None = None
        files = sorted(set(shards.values())) if shards is not None else [path]
        entries = {(file, name): tensor for file in files for name, tensor in self._meta(file).items()}
        if shards is not None:
            check_index(path, shards, entries)
        self.infos = {name: TensorInfo(file, info.dtype, info.shape) for (file, name), info in entries.items()}

    def read(self, name: str, rows: ROWS | None = None) -> Tensor:
        file = self.infos[name].file
        if self.opened is None or self.opened[0] != file:
            self.opened = None  # let the other file's pages go first
            self.opened = (file, load_torch_file(file))
        return take_rows(self.opened[1][name], rows)

    def _meta(self, file: Path) -> dict[str, TensorInfo]:
        tensors = load_torch_file(file)
        return {name: TensorInfo(file, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """A mapped torch.save file's dense tensors by name. Never unpickles anything but tensors.

    Raises:
        CheckpointError: a truncated file, a legacy (not zip) file, objects that are not dense tensors.
    """
    if not is_zip(path):
        problem = "is truncated, or was saved by torch before 1.6: save it again with a current torch"
        raise CheckpointError(path, problem)
    try:
        values: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise many kinds; each is a refusal
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(path, f"is not a plain file of tensors: {reason}") from None
    if not isinstance(values, dict):
        raise CheckpointError(path, f"must hold a dict of tensors (got {type(values).__name__})")
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(path, f"is not a tensor but {type(tensor).__name__}", tensor=str(name))
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(path, f"is not a dense tensor (got {tensor.layout} on {tensor.device})", tensor=name)
    return {name: tensor.detach() for name, tensor in values.items()}


def is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # some are known to be bad at the first look
        return False


def check_index(path: Path, shards: Mapping[str, Path], entries: Mapping[tuple[Path, str], object]) -> None:
    """Every tensor is in the file its index names, and in no other."""
    for name, file in shards.items():
        if (file, name) not in entries:
            raise CheckpointError(file, f"is missing, though {path.name} lists it there", tensor=name)
    for file, name in entries:
        if shards.get(name) != file:
            raise CheckpointError(file, f"is not listed in {path.name}", tensor=name)


class RenamedSource(Source):
    """Another source's tensors by the names that `names` gives for theirs."""

    def __init__(self, inner: Source, names: Mapping[str, str]) -> None:
        self.inner, self.path = inner, inner.path
        self.theirs: dict[str, str] = {}
        for theirs in inner.infos:
            other = self.theirs.setdefault(names[theirs], theirs)
            if other != theirs:
                raise CheckpointError(inner.infos[theirs].file, f"is the same tensor as {other}", tensor=theirs)
        self.infos = {name: inner.infos[theirs] for name, theirs in self.theirs.items()}

    def read(self, name: str, rows: ROWS | None = None) -> Tensor:
        return self.inner.read(self.theirs[name], rows)


def open_file(path: Path) -> Source:
    """One weights file, or the index of several."""
    if path.name.endswith(".index.json"):
        return open_index(path)
    if path.suffix == ".safetensors":
        return SafetensorsSource(path, {name: path for name in SafetensorsFile(path).entries})
    if path.suffix in (".bin", ".pth", ".pt"):
        return TorchSource(path, None)
    raise CheckpointError(path, "is no weights file (allowed .safetensors, .bin, .pth, .pt, .index.json of them)")


def open_hf(directory: Path) -> Source:
    """A Hugging Face snapshot: safetensors where there are any, else .bin; single, or sharded with or without index."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single, index = directory / (stem + suffix), directory / f"{stem}{suffix}.index.json"
        for file in (index, single):
            if file.is_file():
                return open_file(file)
        shards = find_shards(directory, stem, suffix)
        if shards:
            kind = SafetensorsSource if suffix == ".safetensors" else TorchSource
            return kind(index, shard_names(shards))
    looked = "has no model.safetensors, pytorch_model.bin, index or shards of one"
    raise CheckpointError(directory, f"{looked} (got {listing(directory)})")


def open_index(index: Path) -> Source:
    shards = {tensor: index.parent / file for tensor, file in read_weight_map(index).items()}
    suffix = ".safetensors" if ".safetensors." in index.name else ".bin"
    check_suffix(index, shards, suffix)
    return (SafetensorsSource if suffix == ".safetensors" else TorchSource)(index, shards)


def find_shards(directory: Path, stem: str, suffix: str) -> list[Path]:
    """stem-0000N-of-0000M files in order; none where there are none. CheckpointError when one of the M is absent."""
    files = {path.name: path for path in directory.glob(f"{stem}-*-of-*{suffix}")}
    counts = {name.removesuffix(suffix).rpartition("-of-")[2] for name in files}
    if not files:
        return []
    if len(counts) > 1 or not (count := min(counts)).isdigit():
        raise CheckpointError(directory, f"has shards of several sets and no index (got {', '.join(sorted(files))})")
    names = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    for name in names:
        if name not in files:
            raise CheckpointError(directory / name, f"no such file, but {min(files)} is there")
    return [files[name] for name in names]


def shard_names(files: Sequence[Path]) -> dict[str, Path]:
    """Which of the files holds each tensor."""
    where: dict[str, Path] = {}
    for file in files:
        for name in SafetensorsFile(file).entries if file.suffix == ".safetensors" else load_torch_file(file):
            if name in where:
                raise CheckpointError(file, f"is in {where[name].name} too", tensor=name)
            where[name] = file
    return where


def listing(directory: Path) -> str:
    """The first few files' names, for messages."""
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "an empty directory"


def check_suffix(index: Path, shards: Mapping[str, Path], suffix: str) -> None:
    for tensor, file in shards.items():
        if file.suffix != suffix or not file.is_file():
            raise CheckpointError(index, f"names {file.name}, which is no {suffix} file here", tensor=tensor)


def check_float(name: str, info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        allowed = ", ".join(map(str, FLOATS))
        raise CheckpointError(info.file, f"has the wrong dtype (got {info.dtype}, allowed {allowed})", tensor=name)


def row_count(shape: tuple[int, ...]) -> int:
    """Rows of a tensor seen as a matrix; elements of a vector."""
    return math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
