"""From a converted checkpoint to a quantized file beside it, one tensor in memory at a time.

Shapes: N output features, K input features.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_fast.checkpoint.directory import FORMAT, find_weights, list_shards, read_quantization
from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.checkpoint.manifest import add_to_manifest, hash_file, read_manifest, staging, verify_manifest
from gpt_fast.checkpoint.safetensors_file import SafetensorsFile, TensorSpec, write_weights
from gpt_fast.config import ModelConfig
from gpt_fast.convert.gguf import GgufSource
from gpt_fast.convert.gguf_repack import GgufBlocks, check_same_weight
from gpt_fast.model.empty import empty_model
from gpt_fast.model.transformer import Transformer
from gpt_fast.quantize.gptq_model import GPTQOptions, gptq_model
from gpt_fast.quantize.rtn import quantize_in_bands
from gpt_fast.quantize.scheme import QuantizationError, Scheme
from gpt_fast.quantize.structure import MODES, VERSION, plan, stored_tensors

Parts = dict[str, Tensor]
Progress = Callable[[int, int], object]  # told the bytes written and the total
MakeParts = Callable[[str, Scheme], Parts]  # the stored tensors of one module


def no_progress(done: int, total: int) -> None:
    """For callers who show none."""


@dataclass(frozen=True)
class Calibration:
    """Token windows for GPTQ [C, S], and where they came from (recorded in the file)."""

    tokens_CS: Tensor
    source: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A converted, unquantized checkpoint: its tensors by name, each mapped when asked for and then let go."""

    config: ModelConfig
    weights: Path
    files: Mapping[str, SafetensorsFile]  # by tensor
    sha256: Mapping[str, str]  # by file

    def read(self, name: str) -> Tensor:
        file = self.files[name]
        tensor = file.tensor(name)
        file.close()
        return tensor


def open_source(path: Path, *, wanted: str) -> Source:
    """The checkpoint to quantize, after its files were verified; `wanted` is for the error on a quantized one."""
    weights = find_weights(path)
    shards = list_shards(weights)
    names = [shard.name for shard in shards]
    verify_manifest(weights.parent, names)
    files = [SafetensorsFile(shard) for shard in shards]
    quantization = read_quantization(files)
    if quantization is not None:
        raise QuantizationError(
            f"{weights}: is already quantized ({quantization.get('mode')}), cannot be made {wanted}: "
            "quantize the checkpoint it was made from"
        )
    records = read_manifest(weights.parent)
    by_tensor = {name: file for file in files for name in file.entries}
    return Source(load_model_config(weights.parent), weights, by_tensor, {name: records[name].sha256 for name in names})


def quantize_checkpoint(
    path: Path,
    *,
    mode: str,
    groupsize: int = 32,
    embedding: str = "auto",
    label: str = "_",
    device: torch.device | str = "cpu",
    calibration: Calibration | None = None,
    gptq: GPTQOptions | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write e.g. model_int4.g32.safetensors beside the checkpoint's weights, list it in the manifest, return its path.

    The same source and options give the same bytes; for int4-gptq on the same device with the same number of threads.
    Peak memory is one tensor of the source and its quantized form; for int4-gptq one quantized layer and half of the
    largest Hessian (see quantize/gptq_model.py).

    Args:
        path: the converted checkpoint's directory, or its weights file.
        mode: int8 (a scale per row), int4 (rounded to nearest), int4-gptq (needs `calibration`).
        embedding: auto, int8 or keep; see structure.plan.
    Raises:
        QuantizationError, CheckpointError, ConfigError: one line; nothing is left under the final name.
    """
    name = describe(mode, groupsize)
    source = open_source(path, wanted=name)
    model = empty_model(source.config)
    schemes = plan(model, mode=mode, groupsize=groupsize, embedding=embedding)
    make = rounding(source, torch.device(device))
    metadata = describe_file(source, schemes, mode=mode, groupsize=None if mode == "int8" else groupsize)
    if mode == "int4-gptq":
        if calibration is None:
            raise QuantizationError("mode: int4-gptq needs a calibration text")
        options = gptq or GPTQOptions()
        make = with_gptq(make, gptq_of(source, schemes, calibration, options, torch.device(device)))
        metadata["calibration"] = describe_calibration(calibration, options)
    return write_quantized(source, model, schemes, make, metadata, stem_suffix=f"{label}{name}", progress=progress)


def repack_gguf(path: Path, gguf: Path, *, label: str = "_", progress: Progress = no_progress) -> Path:
    """Like quantize_checkpoint, with the GGUF file's own Q4_0, Q4_1 and Q8_0 blocks instead of rounding again.

    `path` is the checkpoint that was converted from that file: every repacked weight is compared with it, and equal.
    """
    source = open_source(path, wanted=f"what {gguf.name} holds")
    model = empty_model(source.config)
    blocks = GgufBlocks(GgufSource(gguf), source.config)
    schemes = blocks.schemes(list(plan(model, mode="int8", groupsize=0, embedding="int8")))
    if not schemes:
        raise QuantizationError(f"{gguf}: holds no quantized weights, nothing to repack")

    def make(module: str, scheme: Scheme) -> Parts:
        parts = blocks.parts(module)
        check_same_weight(parts, scheme, source.read(f"{module}.weight"), name=module, gguf=gguf.name)
        return parts

    mode = "int4" if any(scheme.bits == 4 for scheme in schemes.values()) else "int8"
    metadata = describe_file(source, schemes, mode=mode, groupsize=32)
    metadata["repacked"] = {gguf.name: hash_file(gguf).sha256}
    return write_quantized(source, model, schemes, make, metadata, stem_suffix=f"{label}{mode}.g32", progress=progress)


def describe_file(source: Source, schemes: Mapping[str, Scheme], *, mode: str, groupsize: int | None) -> dict[str, Any]:
    """The file's metadata: what it holds and from which bytes it was made."""
    return {
        "version": VERSION,
        "mode": mode,
        "groupsize": groupsize,
        "source": dict(source.sha256),
        "modules": {module: str(scheme) for module, scheme in schemes.items()},
    }


def describe(mode: str, groupsize: int) -> str:
    """int8, int4.g32, int4-gptq.g32: the file name's last part. QuantizationError on an unknown mode or groupsize."""
    if mode not in MODES:
        raise QuantizationError(f"mode: unknown (got {mode!r}, allowed {', '.join(MODES)})")
    if mode == "int8":
        return mode
    return f"{mode}.g{Scheme(4, groupsize).groupsize}"


def describe_calibration(calibration: Calibration, gptq: GPTQOptions) -> dict[str, Any]:
    windows, length = calibration.tokens_CS.shape
    text = {"text": calibration.source, "text_sha256": calibration.sha256, "windows": windows, "length": length}
    return text | asdict(gptq)


# ------------------------------------------------------------------------------------- making the parts


def rounding(source: Source, device: torch.device) -> MakeParts:
    """Round to nearest, a band of rows at a time."""

    def make(module: str, scheme: Scheme) -> Parts:
        return quantize_in_bands(source.read(f"{module}.weight"), scheme, device=device, name=f"{module}.weight")

    return make


def gptq_of(
    source: Source, schemes: Mapping[str, Scheme], calibration: Calibration, options: GPTQOptions, device: torch.device
) -> Iterator[tuple[str, Parts]]:
    int4 = {name: scheme for name, scheme in schemes.items() if scheme.bits == 4}
    tokens_CS = calibration.tokens_CS.to(device)
    scratch = source.weights.parent
    return gptq_model(source.config, source.read, int4, tokens_CS, options=options, scratch=scratch)


def with_gptq(otherwise: MakeParts, results: Iterator[tuple[str, Parts]]) -> MakeParts:
    """int4 modules from GPTQ, which runs ahead as far as the module that is asked for; the rest as before."""
    ready: dict[str, Parts] = {}

    def make(module: str, scheme: Scheme) -> Parts:
        if scheme.bits != 4:
            return otherwise(module, scheme)
        while module not in ready:
            name, parts = next(results)
            ready[name] = parts
        return ready.pop(module)

    return make


# ------------------------------------------------------------------------------------------- the file


def write_quantized(
    source: Source,
    model: Transformer,
    schemes: Mapping[str, Scheme],
    make: MakeParts,
    metadata: Mapping[str, Any],
    *,
    stem_suffix: str,
    progress: Progress,
) -> Path:
    specs = [
        TensorSpec(name, dtype or source.files[name].entries[name].dtype, shape)
        for name, (dtype, shape) in stored_tensors(model, schemes).items()
    ]
    total, done = sum(spec.nbytes for spec in specs), 0

    def written(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    directory, stem = source.weights.parent, source.weights.stem + stem_suffix
    with staging(directory) as stage:
        text = json.dumps(metadata, sort_keys=True)
        producer = Producer(source, schemes, make)
        records = write_weights(
            stage, stem, specs, producer, metadata={**FORMAT, "quantization": text}, written=written
        )
        for name in records:
            os.replace(stage / name, directory / name)
    add_to_manifest(directory, records)
    return directory / f"{stem}.safetensors"


class Producer:
    """Hands the writer its tensors one by one; a module's parts are made together, for its first one."""

    def __init__(self, source: Source, schemes: Mapping[str, Scheme], make: MakeParts) -> None:
        self.source, self.schemes, self.make = source, schemes, make
        self.parts: dict[str, Tensor] = {}

    def __call__(self, spec: TensorSpec) -> Tensor:
        module, _, part = spec.name.rpartition(".")
        if module not in self.schemes or part == "bias":
            return self.source.read(spec.name)
        if spec.name not in self.parts:
            parts = self.make(module, self.schemes[module])
            self.parts = {f"{module}.{name}": tensor for name, tensor in parts.items()}
        return self.parts.pop(spec.name)
