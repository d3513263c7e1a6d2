"""A format's quality, from the report that `python -m gpt_fast.eval --quality` leaves beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt_fast.checkpoint.quality_gate import report_path, weights_sha256


def quality_of(weights: Path, *, kv_cache: str = "auto", dtype: str | None = None) -> dict[str, Any] | str:
    """{"perplexity", "perplexity_against", "mean_kl", "against", "text"}, or why there is no figure: two words.

    dtype: what weights that are not quantized compute in, for that is their format; the report must be on it.
    """
    try:
        report = json.loads(report_path(weights, kv_cache=kv_cache).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "no report"
    except ValueError:
        return "unreadable report"
    try:
        if report["sha256"] != weights_sha256(weights):
            return "outdated report"
        if dtype is not None and report["dtype"] != dtype:
            return "no report"
        return {key: report[key] for key in ("perplexity", "perplexity_against", "mean_kl", "against", "text")}
    except (KeyError, TypeError, ValueError):
        return "unreadable report"
