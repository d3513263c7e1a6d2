"""A quality report beside a checkpoint, and the gate that refuses to serve a checkpoint whose report is too bad.

`python -m gpt_fast.eval --quality` writes DIR/model_int4.g64.quality.json for DIR/model_int4.g64.safetensors, and
with `--kv_cache int8` DIR/model_int4.g64.kv_int8.quality.json: an int8 cache is a loss of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_fast.checkpoint.manifest import read_manifest
from gpt_fast.config import ConfigError, check_float
from gpt_fast.files import read_json_object

# Threshold -> the report's figure, and whether it may be at most or at least that.
THRESHOLDS = {
    "max_perplexity_ratio": ("perplexity_ratio", "at most"),
    "max_mean_kl": ("mean_kl", "at most"),
    "max_p99_kl": ("p99_kl", "at most"),
    "min_top1_agreement": ("top1_agreement", "at least"),
}


def report_path(weights: Path, *, kv_cache: str = "auto") -> Path:
    """Where the report on `weights` with this cache (EngineConfig.kv_cache) is; float caches share one."""
    cache = ".kv_int8" if kv_cache == "int8" else ""
    return weights.with_name(f"{weights.stem}{cache}.quality.json")


def weights_sha256(weights: Path) -> str:
    """The manifest's hash of a weights file, or of the index of its shards."""
    records = read_manifest(weights.parent)
    name = weights.name if weights.name in records else f"{weights.name}.index.json"
    if name not in records:
        raise ConfigError("quality", f"{weights.name} is not in its directory's manifest")
    return records[name].sha256


def check_quality(weights: Path, thresholds: Mapping[str, float], *, kv_cache: str = "auto") -> None:
    """Hold the report recorded for `weights`, served with this cache, to the thresholds (keys of THRESHOLDS).

    Raises:
        ConfigError: an unknown threshold, no report, a report of other weights, or a figure that is worse: one line.
    """
    check_thresholds(thresholds)
    path = report_path(weights, kv_cache=kv_cache)
    if not path.exists():
        flags = f"--quality {weights}" + (" --kv_cache int8" if kv_cache == "int8" else "")
        raise ConfigError("quality", f"no {path.name}: make it with `python -m gpt_fast.eval {flags}`")
    report = read_json_object(path, error=lambda file, problem: ConfigError("quality", f"{file} {problem}"))
    if report.get("sha256") != weights_sha256(weights):
        raise ConfigError("quality", f"{path.name} reports on other weights than {weights.name}: make it again")
    for name, limit in thresholds.items():
        check_figure(report, name, limit, where=path.name)


def check_thresholds(thresholds: Mapping[str, float]) -> None:
    for name, limit in thresholds.items():
        if name not in THRESHOLDS:
            raise ConfigError(f"quality.{name}", "unknown key", allowed=", ".join(THRESHOLDS))
        check_float(f"quality.{name}", limit, 0.0, 1e9)


def check_figure(report: Mapping[str, Any], name: str, limit: float, *, where: str) -> None:
    figure, sense = THRESHOLDS[name]
    value = report.get(figure)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"quality.{name}", f"{where} has no {figure}", got=value)
    passes = value <= limit if sense == "at most" else value >= limit
    if not passes:
        raise ConfigError(f"quality.{name}", f"{where}: {figure} is worse", got=value, allowed=f"{sense} {limit}")
