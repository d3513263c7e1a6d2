"""Which weights file a directory means where a model is served: the smallest that its quality report allows.

Measuring commands and Engine.load take a directory for its model.safetensors; they are about one file, and say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gpt_fast.checkpoint.directory import WEIGHTS, converted_files, find_weights, list_shards, read_quantization
from gpt_fast.checkpoint.quality_gate import check_quality, report_path
from gpt_fast.checkpoint.safetensors_file import SafetensorsFile
from gpt_fast.config import ConfigError

# What a report must say of a file that nobody asked for by its name. Of SmolLM2-135M, int8 and an int4 that is the
# source's own pass with much room, GPTQ at 64 does not (docs/quantization.md).
THRESHOLDS = {"max_perplexity_ratio": 1.03, "max_mean_kl": 0.03}
UNREPORTED = "int8"  # rounds far below what a report could object to; any other mode needs one


class Choice(NamedTuple):
    weights: Path
    told: str  # in one line: which file, why, and which smaller ones were passed over


def choose_weights(
    path: Path, thresholds: Mapping[str, float] | None = None, *, kv_cache: str = "auto", dtype: str = "auto"
) -> Choice:
    """The file to serve of a converted directory; a file is taken as it is.

    thresholds: EngineConfig.quality, to which every report is then held; else THRESHOLDS. kv_cache, dtype:
    EngineConfig's. Where no quantized file is allowed it is model.safetensors, as find_weights finds it, or says why it
    does not. Who names float32 wants nothing rounded; the other two are what quantized weights are computed in as well.
    """
    if not path.is_dir():
        return Choice(find_weights(path), "")
    unrounded = dtype == "float32" and exists(path / WEIGHTS)
    passed_over: list[str] = []
    for weights in [] if unrounded else smaller_files(path):
        allowed, why = verdict(weights, thresholds or {}, kv_cache)
        if allowed:
            return Choice(weights, line(weights, why, passed_over))
        passed_over.append(f"{weights.name} ({why})")
    weights = find_weights(path)
    why = "dtype float32 asks for weights without rounding" if unrounded else ""
    return Choice(weights, line(weights, why, passed_over))


def line(weights: Path, why: str, passed_over: list[str]) -> str:
    taken = f"{weights.parent}: takes {weights.name}" + (f" ({why})" if why else "")
    return taken + (f", passes over {', '.join(passed_over)}" if passed_over else "")


def smaller_files(directory: Path) -> list[Path]:
    """Quantized files, smallest first; those that are no smaller than model.safetensors have no use."""
    files = [directory / name for name in converted_files(directory)]
    sizes = {file: sum(shard.stat().st_size for shard in list_shards(file)) for file in files if exists(file)}
    most = sizes.pop(directory / WEIGHTS, None)
    return sorted((file for file in sizes if most is None or sizes[file] < most), key=lambda file: (sizes[file], file))


def exists(weights: Path) -> bool:
    """With all its shards; a manifest may list what somebody deleted."""
    try:
        return all(shard.is_file() for shard in list_shards(find_weights(weights)))
    except ValueError:
        return False


def verdict(weights: Path, thresholds: Mapping[str, float], kv_cache: str) -> tuple[bool, str]:
    """Whether the file may be served in its source's place, and why."""
    quantization = read_quantization([SafetensorsFile(shard) for shard in list_shards(weights)]) or {}
    if not thresholds and "repacked" in quantization:
        return True, "its GGUF's own values"
    if not thresholds and not report_path(weights, kv_cache=kv_cache).exists():
        mode = str(quantization.get("mode"))
        if mode == UNREPORTED:
            return True, "int8, no quality report"
        return False, f"no quality report: gpt-fast eval --quality {weights} makes one"
    try:
        check_quality(weights, thresholds or THRESHOLDS, kv_cache=kv_cache)
    except ConfigError as error:
        return False, str(error)
    return True, "its quality report allows it"
