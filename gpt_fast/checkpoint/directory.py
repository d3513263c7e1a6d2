"""Which files a converted checkpoint is made of, and what they say of themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_fast.checkpoint.manifest import is_plain_name, read_manifest
from gpt_fast.checkpoint.safetensors_file import CheckpointError, SafetensorsFile
from gpt_fast.files import read_json_object

FORMAT = {"format": "gpt-fast", "format_version": "1"}
WEIGHTS = "model.safetensors"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def find_weights(path: Path) -> Path:
    """The safetensors name that `path` means."""
    if path.is_dir():
        path = path / WEIGHTS
    if path.suffix == ".safetensors" and (path.is_file() or index_of(path).is_file()):
        return path
    pickled = path.suffix in (".pth", ".pt", ".bin")
    problem = "is a pickled checkpoint" if pickled else "is no weights file of a converted checkpoint"
    beside = converted_files(path.parent)
    if not path.is_file():
        problem = "no such file"
    if beside:
        problem += f", give a file that {path.parent} has: {', '.join(beside)}"
    elif path.suffix == ".gguf":
        problem = "convert it with `python scripts/convert_gguf.py --gguf FILE --out_dir DIR`"
    elif pickled and path.is_file():
        convert = f"`python scripts/convert_hf_checkpoint.py --source {path} --checkpoint_dir DIR`"
        problem += f", and {WEIGHTS} is meant: convert it with {convert}"
    else:
        problem += " (a converted checkpoint directory, or a .safetensors file in one)"
    raise CheckpointError(path, problem)


def converted_files(directory: Path) -> list[str]:
    """The weights files of a converted checkpoint, shards by the name that they go by; none where it is not one."""
    try:
        listed = read_manifest(directory)
    except CheckpointError:
        return []
    names = {name.removesuffix(".index.json") for name in listed if not SHARD.search(name)}
    return sorted(name for name in names if name.endswith(".safetensors"))


def index_of(weights: Path) -> Path:
    return weights.with_name(weights.name + ".index.json")


def shards_index(weights: Path) -> dict[str, str] | None:
    """tensor -> file name of a sharded checkpoint; None for a single file. CheckpointError on a name with a path."""
    if weights.is_file():
        return None
    return read_weight_map(index_of(weights))


def read_weight_map(index: Path) -> dict[str, str]:
    """An index.json's weight_map, every file in it a plain name."""
    weight_map = read_json_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "weight_map must be a non-empty object")
    for tensor, name in weight_map.items():
        if not is_plain_name(name):
            raise CheckpointError(
                index, f"file must be a plain name in the same directory (got {name!r})", tensor=tensor
            )
    return weight_map


def list_shards(weights: Path) -> list[Path]:
    index = shards_index(weights)
    return [weights] if index is None else [weights.with_name(name) for name in sorted(set(index.values()))]


def read_quantization(files: list[SafetensorsFile]) -> Mapping[str, Any] | None:
    """The quantization object of the files' metadata; None for plain weights."""
    for file in files:
        if any(file.metadata.get(key) != value for key, value in FORMAT.items()):
            raise CheckpointError(file.path, "was not written by gpt-fast: convert it first")
        if file.metadata != files[0].metadata:
            raise CheckpointError(file.path, f"its metadata differs from {files[0].path.name}'s")
    text = files[0].metadata.get("quantization")
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(files[0].path, f"quantization metadata is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(files[0].path, "quantization metadata must be a JSON object")
    return values


def check_finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor, if it holds no NaN or infinity; makes no temporary of its size."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)  # both carry a NaN
        if not (torch.isfinite(low) and torch.isfinite(high)):
            problem = f"holds a value that is not finite (range {low.item()} to {high.item()} as {tensor.dtype})"
            raise CheckpointError(path, problem, tensor=name)
    return tensor
