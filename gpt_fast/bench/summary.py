"""From samples to figures. Pure functions; noisy segments and prefills are dropped here, and counted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from gpt_fast.bench.sample import Description, Sample, Segment
from gpt_fast.measure.stats import is_quiet, percentile


def quiet_segments(sample: Sample, limit: float) -> list[Segment]:
    return [segment for segment in sample.segments if is_quiet(segment.foreign, limit)]


def decode_rate(sample: Sample, limit: float) -> float | None:
    """Tokens a second over the sample's quiet segments, all rows."""
    quiet = quiet_segments(sample, limit)
    seconds = sum(segment.seconds for segment in quiet)
    return sum(segment.tokens for segment in quiet) / seconds if seconds > 0 else None


def prefill_rate(sample: Sample, limit: float) -> float | None:
    """Prompt tokens a second, all rows; None when others were busy meanwhile."""
    if not is_quiet(sample.ttft_foreign, limit) or sample.ttft <= 0:
        return None
    return sample.case.rows * sample.case.prompt_len / sample.ttft


def summarize(samples: Sequence[Sample], description: Description, limit: float) -> dict[str, Any]:
    """The figures of one target in one case; a figure is None where nothing quiet was measured."""
    segments = [segment for sample in samples for segment in sample.segments]
    quiet = [segment for segment in segments if is_quiet(segment.foreign, limit)]
    rates = [segment.tokens / segment.seconds for segment in quiet if segment.seconds > 0]
    gaps = [gap * 1000 for segment in quiet for gap in segment.gaps]
    ttfts = [sample.ttft * 1000 for sample in samples if is_quiet(sample.ttft_foreign, limit)]
    prefills = [rate for sample in samples if (rate := prefill_rate(sample, limit)) is not None]
    loads = [segment.foreign for segment in segments if segment.foreign is not None]
    return {
        "ttft_ms": percentile(ttfts, 50),
        "ttft_ms_p10": percentile(ttfts, 10),
        "ttft_ms_p90": percentile(ttfts, 90),
        "prefill_tokens_per_s": percentile(prefills, 50),
        "decode_tokens_per_s": percentile(rates, 50),
        "decode_tokens_per_s_p10": percentile(rates, 10),
        "decode_tokens_per_s_p90": percentile(rates, 90),
        "tpot_ms_p50": percentile(gaps, 50),
        "tpot_ms_p90": percentile(gaps, 90),
        "tpot_ms_p99": percentile(gaps, 99),
        **traffic(samples, description, limit),
        "segments": len(segments),
        "noisy_segments": len(segments) - len(quiet),
        "noisy_prefills": len(samples) - len(ttfts),
        "foreign_load": statistics.fmean(loads) if loads else None,
    }


def traffic(samples: Sequence[Sample], description: Description, limit: float) -> dict[str, float | None]:
    """Bytes read a decode step, the rate that makes, and its share of the bandwidth probed before each run."""
    per_step = description.bytes_per_step(samples[0].case) if samples else None
    achieved, shares = [], []
    for sample in samples:
        quiet = quiet_segments(sample, limit)
        seconds = sum(segment.seconds for segment in quiet)
        if per_step is None or seconds <= 0:
            continue
        achieved.append(per_step * sum(segment.steps for segment in quiet) / seconds)
        if sample.bandwidth:
            shares.append(100 * achieved[-1] / sample.bandwidth)
    gb_per_s = percentile(achieved, 50)
    probed = percentile([sample.bandwidth for sample in samples if sample.bandwidth], 50)
    return {
        "bytes_per_step": per_step,
        "gb_per_s": None if gb_per_s is None else gb_per_s / 1e9,
        "probed_gb_per_s": None if probed is None else probed / 1e9,
        "percent_of_probed": percentile(shares, 50),
    }


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], limit: float) -> dict[str, Any]:
    """Ours over theirs, round by round: median, min, max; rounds in which either has nothing quiet do not count."""
    figures: dict[str, Any] = {}
    for name, rate in (("decode", decode_rate), ("prefill", prefill_rate)):
        pairs = [(rate(a, limit), rate(b, limit)) for a, b in zip(ours, theirs, strict=True)]
        ratios = [a / b for a, b in pairs if a and b]
        figures[name] = percentile(ratios, 50)
        figures[f"{name}_min"] = min(ratios, default=None)
        figures[f"{name}_max"] = max(ratios, default=None)
        figures[f"{name}_rounds"] = len(ratios)
    return figures
