"""A quality report: made from two checkpoints, shown as a table and a plot, recorded beside the first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gpt_fast.checkpoint.quality_gate import weights_sha256
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.engine.lead import Leader, follow
from gpt_fast.engine.ranks import Group
from gpt_fast.eval.divergence import Side, TokenFigures, compare, weight_sqnrs_db
from gpt_fast.eval.score import Scorer
from gpt_fast.load.checkpoint import Loaded
from gpt_fast.load.engine import load_model
from gpt_fast.load.path import Refused, fused_path
from gpt_fast.load.sizes import cache_dtype, choose_device, cores_of
from gpt_fast.measure.picture import picture
from gpt_fast.measure.texts import Text, windows
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Forward
from gpt_fast.text.load_tokenizer import load_tokenizer

ROWS = 8  # prompts continued together


@dataclass(frozen=True)
class Passage:
    """What to compare on: `count` windows of `length` tokens of the text."""

    text: Text
    count: int
    length: int


class Run(NamedTuple):
    """A checkpoint on the fused path where its EngineConfig allows one, else on the plain one; its modules unpacked."""

    config: EngineConfig
    loaded: Loaded
    forward: Forward
    path: str


def make_report(
    ours: EngineConfig, against: EngineConfig, passage: Passage, group: Group | None = None
) -> tuple[Path, dict[str, Any], TokenFigures] | None:
    """(the weights file of `ours`, the report, the figures of every token); None on the ranks that follow rank 0."""
    if group is not None:
        torch.set_num_threads(cores_of(group))
    runs = a, b = [load_run(config, passage.length, group) for config in (ours, against)]
    if a.loaded.config != b.loaded.config:
        problem, allowed = "is another model", f"the source of {ours.checkpoint_path}"
        raise ConfigError("against", problem, got=against.checkpoint_path, allowed=allowed)
    weights_db = weight_sqnrs_db(a.loaded.model, b.loaded.model)
    forwards = [forward for run in runs for forward in (run.forward, run.loaded.model)]
    caches = [run_cache(run, passage.length) for run in runs]
    if group is not None and not group.leads:
        follow(group.plans, forwards, caches)
        return None
    leader = Leader(group.plans) if group is not None else None
    if leader is not None:
        forwards, caches = [*map(leader.forward, forwards)], [*map(leader.cache, caches)]
    side_a = Side(a.loaded.model, Scorer(forwards[0], caches[0]), Scorer(forwards[1], caches[0]))
    side_b = Side(b.loaded.model, Scorer(forwards[2], caches[1]), Scorer(forwards[3], caches[1]))
    tokenizer = load_tokenizer(a.loaded.directory)
    chosen = windows(
        tokenizer.encode(passage.text.content, add_bos=False),
        length=passage.length,
        limit=passage.count,
        prefix=tokenizer.encode("", add_bos=True),
    )
    figures, tokens = compare(side_a, side_b, chosen, weights_db)
    return a.loaded.weights_file, describe(a, b, passage, len(chosen)) | figures, tokens


def load_run(config: EngineConfig, length: int, group: Group | None) -> Run:
    device = choose_device(config.device, group)
    loaded = load_model(config.checkpoint_path, device=device, dtype=config.dtype, group=group)
    if length > loaded.config.max_position:
        problem = "is beyond the model's positions"
        raise ConfigError("seq_length", problem, got=length, allowed=f"at most {loaded.config.max_position}")
    loaded.model.setup_rope(length, device)
    try:
        fused = fused_path(config, loaded, torch.get_num_threads(), group=group)
    except Refused as why:
        return Run(config, loaded, loaded.model, f"plain ({why})")
    return Run(config, loaded, fused.prefill, fused.name)


def run_cache(run: Run, length: int) -> KVCache:
    device = run.loaded.model.norm.weight.device
    return KVCache(run.loaded.config, slots=ROWS, max_seq_len=length, dtype=cache_of(run), device=device)


def cache_of(run: Run) -> torch.dtype:
    """As served; but where weights alone are judged (kernels: plain) in the dtype computed in, unless one is named."""
    if (run.config.kernels, run.config.kv_cache) == ("plain", "auto"):
        return run.loaded.model.norm.weight.dtype
    return cache_dtype(run.config, run.loaded)


def describe(a: Run, b: Run, passage: Passage, count: int) -> dict[str, Any]:
    reference = describe_run(b)
    return {
        "version": 1,
        **describe_run(a),
        "against": reference.pop("checkpoint"),
        **{f"against_{key}": value for key, value in reference.items()},
        "text": passage.text.source,
        "text_sha256": passage.text.sha256,
        "windows": count,
        "length": passage.length,
    }


def describe_run(run: Run) -> dict[str, Any]:
    weights = run.loaded.weights_file
    return {
        "checkpoint": weights.name,
        "sha256": weights_sha256(weights),
        "bytes": weights_bytes(weights),
        "dtype": str(run.loaded.model.norm.weight.dtype).removeprefix("torch."),
        "kv_cache": str(cache_of(run)).removeprefix("torch."),
        "path": run.path,
    }


def weights_bytes(weights: Path) -> int:
    """Of the file, or of all its shards."""
    return sum(p.stat().st_size for p in weights.parent.glob(f"{weights.stem}*.safetensors") if is_part(p, weights))


def is_part(path: Path, weights: Path) -> bool:
    rest = path.stem.removeprefix(weights.stem)
    return rest == "" or (rest.startswith("-") and "-of-" in rest)


def table(report: Mapping[str, Any]) -> str:
    """The report for people, figures first, then a line a layer."""
    divergence, greedy = report["greedy_divergence_median"], report["greedy_tokens"]
    lines = [
        f"{report['checkpoint']} against {report['against']}, {report['tokens']} tokens of {report['text']}",
        f"  size                 {report['bytes'] / 1e6:10.1f} MB   (against {report['against_bytes'] / 1e6:.1f} MB)",
        f"  perplexity           {report['perplexity']:10.4f}      (against {report['perplexity_against']:.4f}, "
        f"ratio {report['perplexity_ratio']:.4f} +- {report['perplexity_ratio_error']:.4f})",
        f"  KL, mean             {report['mean_kl']:10.5f} nats",
        f"  KL, 99th percentile  {report['p99_kl']:10.5f} nats",
        f"  top-1 agreement      {report['top1_agreement']:10.2%}",
        f"  greedy text diverges after {divergence:g} of {greedy} tokens (median of {report['greedy_divergence']})",
        "  layer   weights SQNR   hidden state SQNR (dB; exact: no difference)",
    ]
    lines += [
        f"  {layer['layer']:5d}   {decibels(layer['weight_sqnr_db'])}        {decibels(layer['hidden_sqnr_db'])}"
        for layer in report["layers"]
    ]
    return "\n".join(lines)


def decibels(value: float | None) -> str:
    return "   exact" if value is None else f"{value:8.1f}"


def plot(report: Mapping[str, Any], tokens: TokenFigures, path: Path) -> None:
    """SQNR by layer, and the share of tokens whose KL exceeds a value."""
    with picture(path, inches=(10, 4)) as figure:
        left, right = figure.subplots(1, 2)
        plot_layers(left, report)
        plot_tokens(right, report, tokens)


def plot_layers(axes: Any, report: Mapping[str, Any]) -> None:
    numbers = [layer["layer"] for layer in report["layers"]]
    for key, label in (("weight_sqnr_db", "weights"), ("hidden_sqnr_db", "hidden states")):
        values = [math.nan if layer[key] is None else layer[key] for layer in report["layers"]]
        axes.plot(numbers, values, marker=".", label=label)
    axes.set(xlabel="layer", ylabel="SQNR (dB)", title=report["checkpoint"])
    axes.legend()


def plot_tokens(axes: Any, report: Mapping[str, Any], tokens: TokenFigures) -> None:
    kl = tokens.kl.sort().values
    share = 1 - torch.arange(len(kl)) / len(kl)
    axes.plot(kl.clamp(min=1e-8).tolist(), share.tolist())
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KL (nats)",
        ylabel="share of tokens above",
        title=f"mean {report['mean_kl']:.4f}, 99th percentile {report['p99_kl']:.4f}",
    )
