"""Plan a conversion, check it against the source, stream it to disk and install it under its final names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from gpt_fast.checkpoint.directory import FORMAT, check_finite
from gpt_fast.checkpoint.hf_config import model_config_from_hf
from gpt_fast.checkpoint.manifest import install, staging
from gpt_fast.checkpoint.safetensors_file import CheckpointError, TensorSpec, write_bytes, write_weights
from gpt_fast.config import ModelConfig
from gpt_fast.convert.names import Candidates, Piece, Recipe, half_to_interleaved
from gpt_fast.convert.side_files import check_tokenizer
from gpt_fast.convert.source import Source, check_float
from gpt_fast.model.empty import empty_model

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a conversion needs besides the place it writes to.

    config: in config.json's form; it is written as it is. side_files: what to write beside it, by name.
    ignored: source tensors that the model computes itself (rotary tables).
    """

    source: Source
    config: Mapping[str, Any]
    candidates: Candidates
    ignored: re.Pattern[str]
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_config(self) -> ModelConfig:
        generation = json.loads(self.side_files.get("generation_config.json", b"{}"))
        return model_config_from_hf(self.config, generation=generation)


def convert(
    job: Job, out_dir: Path, *, dtype: str = "keep", shard_bytes: int = SHARD_BYTES, progress: bool = True
) -> None:
    """Write config, tokenizer files, weights and manifest into `out_dir`; nothing appears there before all is checked.

    Args:
        dtype: "keep" the source's (which must be one), or a name in DTYPES.
    Raises:
        CheckpointError, ConfigError: naming file and tensor; `out_dir` is then as it was.
    """
    config = job.model_config
    recipes = choose_recipes(job, config)
    specs = plan_specs(job, config, recipes, dtype)
    check_ties(job, config)
    write_checkpoint(
        out_dir,
        job,
        specs,
        lambda spec: build(job.source, recipes[spec.name], config, spec.dtype),
        shard_bytes=shard_bytes,
        progress=progress,
    )


def write_checkpoint(
    out_dir: Path,
    job: Job,
    specs: Sequence[TensorSpec],
    produce: Callable[[TensorSpec], Tensor],
    *,
    stem: str = "model",
    metadata: Mapping[str, str] = FORMAT,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Stage config, side files and weights, then install them: all of it or nothing."""
    total = sum(spec.nbytes for spec in specs)
    with staging(out_dir) as stage:
        files = {"config.json": json_bytes(job.config), **job.side_files}
        records = {name: write_bytes(stage / name, data) for name, data in files.items()}
        vocab_size, origin = job.model_config.vocab_size, job.source.path.parent
        check_tokenizer(stage, job.side_files, vocab_size=vocab_size, origin=origin)
        with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
            records |= write_weights(
                stage, stem, specs, produce, metadata=metadata, shard_bytes=shard_bytes, written=bar.update
            )
        install(stage, out_dir, records, job.origin)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def choose_recipes(job: Job, config: ModelConfig) -> dict[str, Recipe]:
    """One way to make each tensor of the model, in its order. A source tensor that is neither used nor ignorable is
    refused."""
    infos = job.source.infos
    recipes = {target: choose(job.source, target, job.candidates[target]) for target in model_tensors(config)}
    used = {piece.name for recipe in recipes.values() for piece in recipe}
    tied = tied_head(job, config)
    for name in sorted(infos.keys() - used):
        if name != tied and not job.ignored.fullmatch(name):
            raise CheckpointError(infos[name].file, "is not part of this model", tensor=name)
    return recipes


def model_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    tensors = empty_model(config).state_dict()
    if config.tie_embeddings:
        tensors.pop("output.weight", None)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def choose(source: Source, target: str, ways: Sequence[Recipe]) -> Recipe:
    """The first way whose source tensors are all there in the right shape."""
    present = [recipe for recipe in ways if all(piece.name in source.infos for piece in recipe)]
    for recipe in present:
        if all(source.infos[piece.name].shape == piece.shape for piece in recipe):
            return recipe
    raise misfit(source, target, (present or ways)[0])


def misfit(source: Source, target: str, recipe: Recipe) -> CheckpointError:
    for piece in recipe:
        info = source.infos.get(piece.name)
        if info is not None and info.shape != piece.shape:
            problem = f"has the wrong shape (got {list(info.shape)}, config.json says {list(piece.shape)})"
            return CheckpointError(info.file, problem, tensor=piece.name)
    missing = next(piece.name for piece in recipe if piece.name not in source.infos)
    there = sorted(source.infos)
    listed = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "") if there else "no tensors"
    return CheckpointError(source.path, f"is missing ({target} needs it, the file has {listed})", tensor=missing)


def plan_specs(job: Job, config: ModelConfig, recipes: Mapping[str, Recipe], dtype: str) -> list[TensorSpec]:
    """dtype and shape of every tensor to write. "keep" needs one dtype throughout, as decoding does."""
    sources = {piece.name: job.source.infos[piece.name] for recipe in recipes.values() for piece in recipe}
    first, kept = next((name, info.dtype) for name, info in sources.items())
    for name, info in sources.items():
        check_float(name, info)
        if dtype == "keep" and info.dtype != kept:
            raise CheckpointError(
                info.file, f"is {info.dtype}, {first} is {kept}: choose one with --dtype", tensor=name
            )
    shapes = model_tensors(config)
    return [TensorSpec(name, DTYPES.get(dtype, kept), shapes[name]) for name in recipes]


def tied_head(job: Job, config: ModelConfig) -> str | None:
    """The source's output head, when the config says that the embedding serves as one."""
    if not config.tie_embeddings:
        return None
    return next((name for name in ("lm_head.weight", "output.weight") if name in job.source.infos), None)


def check_ties(job: Job, config: ModelConfig) -> None:
    """A tied checkpoint may hold its head twice, but not two different ones."""
    name = tied_head(job, config)
    if name is None:
        return
    embedding = job.candidates["tok_embeddings.weight"][0][0].name
    if not torch.equal(job.source.read(name), job.source.read(embedding)):
        problem = f"differs from {embedding}, but tie_word_embeddings is true"
        raise CheckpointError(job.source.infos[name].file, problem, tensor=name)


def build(source: Source, recipe: Recipe, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """Make one target: read its pieces, check and reorder them, join, cast."""
    parts = [read_piece(source, piece, config) for piece in recipe]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if tensor.dtype == dtype:
        return tensor
    first = recipe[0].name
    return check_finite(source.infos[first].file, first, tensor.to(dtype))  # float16 reaches only 65504


def read_piece(source: Source, piece: Piece, config: ModelConfig) -> Tensor:
    tensor = source.read(piece.name, piece.rows)
    check_finite(source.infos[piece.name].file, piece.name, tensor)
    return half_to_interleaved(tensor, piece.rope_heads, config.rotary_dim) if piece.rope_heads else tensor
