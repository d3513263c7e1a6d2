"""A quality report: made from two checkpoints, shown as a table and a plot, recorded beside the first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt_fast.checkpoint import Loaded, load_checkpoint
from gpt_fast.config import ConfigError
from gpt_fast.eval.quality import Side, TokenFigures, compare
from gpt_fast.eval.score import Scorer
from gpt_fast.quantize.gate import weights_sha256
from gpt_fast.quantize.text import Text, windows
from gpt_fast.tokenizer import load_tokenizer

ROWS = 8  # prompts continued together


@dataclass(frozen=True)
class Settings:
    """What to compare on: `count` windows of `length` tokens of the text, computed in `dtype` on `device`."""

    text: Text
    count: int
    length: int
    dtype: torch.dtype
    device: torch.device


def make_report(path: Path, against: Path, settings: Settings) -> tuple[Path, dict[str, Any], TokenFigures]:
    """(the weights file of `path`, the report, the figures of every token)."""
    a, b = (load_checkpoint(p, device=settings.device, dtype=settings.dtype) for p in (path, against))
    if a.config != b.config:
        raise ConfigError("against", "is another model", got=str(against), allowed=f"the source of {path}")
    tokenizer = load_tokenizer(a.directory)
    chosen = windows(
        tokenizer.encode(settings.text.content, add_bos=False),
        length=settings.length,
        limit=settings.count,
        prefix=tokenizer.encode("", add_bos=True),
    )
    figures, tokens = compare(side(a, settings), side(b, settings), chosen)
    return a.weights_file, describe(a, b, settings, len(chosen)) | figures, tokens


def side(loaded: Loaded, settings: Settings) -> Side:
    loaded.model.setup_rope(settings.length, settings.device)
    scorer = Scorer(
        loaded.model,
        loaded.config,
        rows=ROWS,
        max_seq_len=settings.length,
        dtype=settings.dtype,
        device=settings.device,
    )
    return Side(loaded.model, scorer)


def describe(a: Loaded, b: Loaded, settings: Settings, count: int) -> dict[str, Any]:
    return {
        "version": 1,
        "checkpoint": a.weights_file.name,
        "sha256": weights_sha256(a.weights_file),
        "bytes": weights_bytes(a.weights_file),
        "against": b.weights_file.name,
        "against_sha256": weights_sha256(b.weights_file),
        "against_bytes": weights_bytes(b.weights_file),
        "text": settings.text.source,
        "text_sha256": settings.text.sha256,
        "windows": count,
        "length": settings.length,
        "dtype": str(settings.dtype).removeprefix("torch."),
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
        f"ratio {report['perplexity_ratio']:.4f})",
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
    """SQNR by layer, and the share of tokens whose KL exceeds a value. Needs matplotlib: gpt-fast[plot]."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot", "needs matplotlib: pip install gpt-fast[plot]") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [layer["layer"] for layer in report["layers"]]
    for key, label in (("weight_sqnr_db", "weights"), ("hidden_sqnr_db", "hidden states")):
        values = [math.nan if layer[key] is None else layer[key] for layer in report["layers"]]
        left.plot(numbers, values, marker=".", label=label)
    left.set(xlabel="layer", ylabel="SQNR (dB)", title=report["checkpoint"])
    left.legend()
    kl = tokens.kl.sort().values
    share = 1 - torch.arange(len(kl)) / len(kl)
    right.plot(kl.clamp(min=1e-8).tolist(), share.tolist())
    right.set(xscale="log", yscale="log", xlabel="KL (nats)", ylabel="share of tokens above",
              title=f"mean {report['mean_kl']:.4f}, 99th percentile {report['p99_kl']:.4f}")  # fmt: skip
    figure.savefig(path, dpi=120)
