"""Convert whatever holds published weights: a Hugging Face or Meta directory, a GGUF, gpt-fast's own .pth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_fast.convert.gguf import GgufSource, gguf_job
from gpt_fast.convert.gguf_repack import SCHEMES
from gpt_fast.convert.hf import is_gpt_fast_int8, open_job
from gpt_fast.convert.quantized import Progress, no_progress, repack_gguf
from gpt_fast.convert.run import convert
from gpt_fast.convert.upstream_int8 import convert_int8
from gpt_fast.text.gguf_tokenizer import tokenizer_json_from_gguf


def convert_published(
    source: Path,
    out_dir: Path,
    *,
    dtype: str = "keep",
    origin: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
) -> None:
    """Write `source` as a checkpoint; a GGUF's own Q4_0, Q4_1 and Q8_0 blocks too, as they are, beside its weights.

    Args:
        dtype: of the weights; "keep" the source's, of a GGUF float32, which keeps its values exactly.
        origin: what the manifest is to say of the source, instead of what the source says itself.
        progress: told of the GGUF's blocks.
    Raises:
        CheckpointError, ConfigError, QuantizationError: naming file and tensor; `out_dir` is then as it was.
    """
    if source.suffix != ".gguf":
        job = open_job(source)
        job = job if origin is None else dataclasses.replace(job, origin=origin)
        return convert_int8(job, out_dir) if is_gpt_fast_int8(source) else convert(job, out_dir, dtype=dtype)
    job = gguf_job(source, make_tokenizer=tokenizer_json_from_gguf)
    job = job if origin is None else dataclasses.replace(job, origin=origin)
    convert(job, out_dir, dtype="float32" if dtype == "keep" else dtype)
    if can_repack(source):
        repack_gguf(out_dir, source, progress=progress)


def can_repack(gguf: Path) -> bool:
    """Whether its matrices are all of block formats that move without loss, or floats, and some are blocks."""
    kinds = {tensor.block for tensor in GgufSource(gguf).tensors.values() if len(tensor.shape) > 1}
    blocks = {kind.name for kind in kinds if kind.plain is None}
    return bool(blocks) and blocks <= SCHEMES.keys()
