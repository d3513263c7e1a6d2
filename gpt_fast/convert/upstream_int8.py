"""gpt-fast's model_int8.pth (per-row int8 weights and bfloat16 scales) as this package's int8 file, value for value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gpt_fast.checkpoint.directory import FLOATS, FORMAT, check_finite
from gpt_fast.checkpoint.safetensors_file import CheckpointError, TensorSpec
from gpt_fast.convert.run import SHARD_BYTES, Job, write_checkpoint
from gpt_fast.model.empty import empty_model
from gpt_fast.quantize.scheme import Scheme
from gpt_fast.quantize.structure import VERSION, stored_tensors

SUFFIX = ".scales"


def convert_int8(job: Job, out_dir: Path, *, progress: bool = True, shard_bytes: int = SHARD_BYTES) -> None:
    """Write model_int8.safetensors; scales widen to float32, other tensors keep their dtype.

    Raises:
        CheckpointError: a tensor missing, unexpected, or of another shape or dtype.
    """
    infos = job.source.infos
    schemes = {name.removesuffix(SUFFIX): Scheme(8, 0) for name in infos if name.endswith(SUFFIX)}
    stored = stored_tensors(empty_model(job.model_config), schemes)
    check_names(job, {source_name(name, schemes) for name in stored})
    specs = [plan(job, name, source_name(name, schemes), *wanted) for name, wanted in stored.items()]

    def produce(spec: TensorSpec) -> Tensor:
        name = source_name(spec.name, schemes)
        return check_finite(infos[name].file, name, job.source.read(name).to(spec.dtype))

    quantization = {
        "version": VERSION,
        "mode": "int8",
        "groupsize": 0,
        "source": dict(job.origin),
        "modules": {name: str(scheme) for name, scheme in schemes.items()},
    }
    write_checkpoint(
        out_dir,
        job,
        specs,
        produce,
        stem="model_int8",
        metadata={**FORMAT, "quantization": json.dumps(quantization)},
        shard_bytes=shard_bytes,
        progress=progress,
    )


def source_name(target: str, schemes: Mapping[str, Scheme]) -> str:
    module, _, last = target.rpartition(".")
    return module + SUFFIX if module in schemes and last == "scale" else target


def check_names(job: Job, wanted: set[str]) -> None:
    for name in sorted(wanted ^ job.source.infos.keys()):
        problem = "is missing" if name in wanted else "is not part of this model"
        raise CheckpointError(job.source.path, problem, tensor=name)


def plan(job: Job, target: str, name: str, dtype: torch.dtype | None, shape: tuple[int, ...]) -> TensorSpec:
    info = job.source.infos[name]
    allowed = (dtype,) if dtype == torch.int8 else FLOATS
    if info.shape != shape or info.dtype not in allowed:
        problem = f"is {info.dtype} {list(info.shape)}, not {' or '.join(map(str, allowed))} {list(shape)}"
        raise CheckpointError(info.file, problem, tensor=name)
    return TensorSpec(target, dtype or info.dtype, shape)
