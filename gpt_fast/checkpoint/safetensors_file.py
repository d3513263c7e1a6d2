"""Read and write safetensors files: bounds-checked, mapped instead of read, written tensor by tensor.

The format (github.com/huggingface/safetensors): 8 bytes of little-endian header length, a JSON header with each
tensor's dtype, shape and byte range, then the bytes without gaps. Unlike the library's reader this one names the
tensor that a truncated or corrupt file cuts, and its writer never holds more than one tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the library's own limit
DATA_ALIGNMENT = 64  # of the first tensor, so that vector loads from the mapping are aligned


class CheckpointError(ValueError):
    """A checkpoint that is refused: one line naming the file, the tensor where there is one, got and allowed."""

    def __init__(self, file: Path | str, problem: str, *, tensor: str | None = None) -> None:
        self.file, self.tensor = str(file), tensor
        super().__init__(printable(f"{file}: " + (f"tensor {tensor}: " if tensor else "") + problem))


def printable(text: str) -> str:
    """One line that moves no cursor, though files choose their own names: others' characters are spelled."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # byte range from the start of the file
    end: int


class SafetensorsFile:
    """One file's header, checked, and its tensors as views of a private mapping (no copy, pages read when used).

    Raises:
        CheckpointError: naming the file, and the tensor whose entry is wrong or cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                header, self.data_start = read_header(path, file.read(8), file.read, self.size)
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror}") from None
        self.metadata = check_metadata(path, header.pop("__metadata__", {}))
        self.entries = {name: self._entry(name, value) for name, value in header.items()}
        self._check_cover()
        self._mapping: mmap.mmap | None = None

    def tensor(self, name: str) -> Tensor:
        """The tensor over the mapped file; writing to it changes memory only."""
        dtype, shape, begin, end = self.entries[name]
        if end == begin:
            return torch.empty(shape, dtype=dtype)
        if self._mapping is None:
            with open(self.path, "rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            if len(self._mapping) != self.size:
                raise CheckpointError(self.path, "changed while it was read")
        return torch.frombuffer(self._mapping, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)

    def release(self, name: str) -> None:
        """Let go of the memory that reading the tensor took; where it is still used, its pages are read again."""
        begin, end = self.entries[name][2:]
        if self._mapping is not None and end > begin:
            start = begin - begin % mmap.PAGESIZE
            self._mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def close(self) -> None:
        """Drop the mapping; tensors already handed out keep theirs."""
        self._mapping = None

    def _entry(self, name: str, value: object) -> Entry:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(self.path, "header entry must be dtype, shape, data_offsets", tensor=name)
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(self.path, f"unknown dtype (got {dtype!r}, allowed {', '.join(DTYPES)})", tensor=name)
        if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(self.path, f"bad shape or data_offsets (got {shape}, {offsets})", tensor=name)
        begin, end = (self.data_start + offset for offset in offsets)
        if end > self.size:
            problem = f"is cut off: it ends at byte {end}, the file has {self.size}"
            raise CheckpointError(self.path, problem, tensor=name)
        if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            problem = f"has {end - begin} bytes, {dtype} {shape} needs {math.prod(shape) * DTYPES[dtype].itemsize}"
            raise CheckpointError(self.path, problem, tensor=name)
        return Entry(DTYPES[dtype], tuple(shape), begin, end)

    def _check_cover(self) -> None:
        position = self.data_start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != position:
                raise CheckpointError(self.path, f"overlaps or leaves a gap at byte {position}", tensor=name)
            position = entry.end
        if position != self.size:
            raise CheckpointError(self.path, f"has {self.size - position} bytes after the last tensor")


def is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def read_header(path: Path, head: bytes, read: Callable[[int], bytes], size: int) -> tuple[dict[str, Any], int]:
    """The JSON header and where the data starts."""
    length = int.from_bytes(head, "little")
    if len(head) == 8 and 2 <= length <= min(MAX_HEADER, size - 8):
        pass
    elif head[:2] in (b"PK", b"\x80\x02"):
        raise CheckpointError(path, "is a pickled PyTorch file, not a safetensors file")
    elif len(head) == 8 and size - 8 < length <= MAX_HEADER:
        raise CheckpointError(path, f"is truncated: a header of {length} bytes in a file of {size}")
    else:
        raise CheckpointError(path, "is no safetensors file: it does not begin with the length of a header")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        header = json.loads(read(length).decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(path, "header is not a JSON object")
    return header, 8 + length


def check_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(path, "__metadata__ must map names to strings")
    return metadata


# ---------------------------------------------------------------------------------------------- writing


class TensorSpec(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FileRecord(NamedTuple):
    """What the manifest keeps of a file."""

    size: int
    sha256: str


def write_weights(
    directory: Path,
    stem: str,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Tensor],
    *,
    metadata: Mapping[str, str],
    shard_bytes: int = 5_000_000_000,
    written: Callable[[int], object] = lambda nbytes: None,
) -> dict[str, FileRecord]:
    """Write `stem`.safetensors, or shards and an index when the tensors exceed `shard_bytes`, one tensor at a time.

    Args:
        directory: a temporary directory; the caller renames what was written.
        produce: makes the tensor of a spec; called once each, in order. CheckpointError when it does not fit.
        written: told the bytes of each tensor when they are in the file.
    Returns:
        size and sha256 of every file, by name.
    """
    shards = split_shards(specs, shard_bytes)
    if len(shards) == 1:
        name = f"{stem}.safetensors"
        return {name: write_file(directory / name, specs, produce, metadata=metadata, written=written)}
    records: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        records[name] = write_file(directory / name, shard, produce, metadata=metadata, written=written)
        weight_map |= {spec.name: name for spec in shard}
    total = sum(spec.nbytes for spec in specs)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n"
    records[f"{stem}.safetensors.index.json"] = write_bytes(
        directory / f"{stem}.safetensors.index.json", index.encode()
    )
    return records


def split_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Consecutive runs of at most `shard_bytes`, each with at least one tensor."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    return shards


def write_file(
    path: Path,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Tensor],
    *,
    metadata: Mapping[str, str],
    written: Callable[[int], object] = lambda nbytes: None,
) -> FileRecord:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for spec in specs:
        offsets = [position, position + spec.nbytes]
        header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % DATA_ALIGNMENT)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        put(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            tensor = produce(spec)
            if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                problem = f"is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.shape)}"
                raise CheckpointError(path, problem, tensor=spec.name)
            put_tensor(put, tensor)
            written(spec.nbytes)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(text) + 8 + position, digest.hexdigest())


def put_tensor(put: Callable[[memoryview], None], tensor: Tensor) -> None:
    """The tensor's bytes, without a copy where it is contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.nbytes:
        put(memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B"))


def write_bytes(path: Path, data: bytes) -> FileRecord:
    """Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())
