"""The result of a bench: one plain dict, shown as tables and a plot, written as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_fast.bench.interleave import Results
from gpt_fast.bench.sample import Description
from gpt_fast.bench.summary import ratio, summarize
from gpt_fast.measure.picture import picture

# Column -> (heading, figure of summary.summarize, format).
COLUMNS = (
    ("TTFT ms", "ttft_ms", ".1f"),
    ("prefill t/s", "prefill_tokens_per_s", ".0f"),
    ("decode t/s", "decode_tokens_per_s", ".1f"),
    ("p10", "decode_tokens_per_s_p10", ".1f"),
    ("p90", "decode_tokens_per_s_p90", ".1f"),
    ("TPOT p50", "tpot_ms_p50", ".2f"),
    ("p90", "tpot_ms_p90", ".2f"),
    ("p99", "tpot_ms_p99", ".2f"),
    ("MB/step", "bytes_per_step", ".1f"),
    ("GB/s", "gb_per_s", ".1f"),
    ("probed", "probed_gb_per_s", ".1f"),
    ("%", "percent_of_probed", ".0f"),
    ("foreign", "foreign_load", ".1%"),
)


def build(
    results: Results,
    descriptions: Mapping[str, Description],
    processes: Mapping[str, Mapping[str, Any]],
    *,
    ours: str,
    limit: float,
) -> dict[str, Any]:
    """The dict that everything below shows.

    Args:
        processes: per target what was measured of its process: peak_rss_mb, start_seconds, starts, recompiles,
            verify_ms, long_prompt.
        ours: the target that the others are compared with. limit: foreign load above which a segment is noisy.
    """
    cases, described = [], descriptions[ours]  # our engine beside busy programs is described as our engine is
    for (prompt_len, new_tokens, rows), samples in results.samples.items():
        figures = {name: summarize(taken, descriptions.get(name, described), limit) for name, taken in samples.items()}
        ratios = {
            name: ratio(samples[ours], taken, limit)
            for name, taken in samples.items()
            if ours in samples and name != ours
        }
        cases.append(
            {
                "prompt_len": prompt_len,
                "new_tokens": new_tokens,
                "batch_size": rows,
                "targets": figures,
                "ratios": ratios,
            }
        )
    targets = {
        name: {"load_seconds": told.load_seconds, **processes.get(name, {}), **told.facts}
        for name, told in descriptions.items()
    }
    return {"ours": ours, "foreign_limit": limit, "targets": targets, "cases": cases, "notes": results.notes}


# --------------------------------------------------------------------------------------------- tables


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def table(report: Mapping[str, Any]) -> str:
    """For people: a table a case, the ratios under it, then a line a target."""
    lines: list[str] = []
    for case in report["cases"]:
        lines += [*case_lines(case), *ratio_lines(case, report["ours"]), ""]
    lines += [line for name, target in report["targets"].items() if (line := target_line(name, target))]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def case_lines(case: Mapping[str, Any]) -> list[str]:
    width = max(len("target"), *map(len, case["targets"])) if case["targets"] else 6
    lines = [
        f"prompt {case['prompt_len']}, {case['new_tokens']} new tokens, batch {case['batch_size']}",
        " ".join([f"{'target':{width}}", *(f"{heading:>11}" for heading, _, _ in COLUMNS), f"{'noisy':>9}"]),
    ]
    for name, figures in case["targets"].items():
        scaled = figures | {"bytes_per_step": figures["bytes_per_step"] and figures["bytes_per_step"] / 1e6}
        cells = [f"{show(scaled[key], form):>11}" for _, key, form in COLUMNS]
        noisy = f"{figures['noisy_segments']}/{figures['segments']}"
        lines.append(" ".join([f"{name:{width}}", *cells, f"{noisy:>9}"]))
    return lines


def ratio_lines(case: Mapping[str, Any], ours: str) -> list[str]:
    lines = []
    for name, figures in case["ratios"].items():
        parts = [
            f"{what} {show(figures[what], '.2f')} ({show(figures[f'{what}_min'], '.2f')}.."
            f"{show(figures[f'{what}_max'], '.2f')}, {figures[f'{what}_rounds']} rounds)"
            for what in ("decode", "prefill")
        ]
        lines.append(f"{ours} / {name}: {', '.join(parts)}")
    return lines


def target_line(name: str, target: Mapping[str, Any]) -> str:
    """ "" when nothing is known of the target's process, as of a server."""
    seconds = target.get("starts")
    several = f" ({min(seconds):.2f}..{max(seconds):.2f}, {len(seconds)} starts)" if seconds else ""
    known = (
        ("load_seconds", "load {:.2f} s"),
        ("start_seconds", f"start to first token {{:.2f}} s{several}"),
        ("peak_rss_mb", "peak memory {:.0f} MB"),
    )
    parts = [text.format(target[key]) for key, text in known if target.get(key) is not None]
    if "quality" in target:
        weights = target["dtype"] if target["quantization"] == "none" else target["quantization"]
        parts.append(f"format {weights}, quality {quality_text(target['quality'])}")
    if target.get("verify_ms"):
        costs = ", ".join(f"M={m} {cost['ratio']:.2f}x" for m, cost in target["verify_ms"].items() if m != "1")
        parts.append(f"verify of M tokens against one ({target['verify_ms']['1']['ms']:.2f} ms): {costs}")
    if target.get("long_prompt"):
        parts.append(long_prompt_text(target["long_prompt"]))
    if "recompiles" in target:
        parts.append(f"recompiles {target['recompiles']}")
    return f"{name}: {'; '.join(parts)}" if parts else ""


def long_prompt_text(told: Mapping[str, Any]) -> str:
    during, usual = told["during_ms_p50"], told["usual_ms_p50"]
    return (
        f"a stream's gap beside a prompt of {told['prompt_len']} tokens {during:.2f} ms against {usual:.2f} "
        f"({told['over_usual']:.2f}x), p99 {told['during_ms_p99']:.2f} against {told['usual_ms_p99']:.2f}; "
        f"its prefill {told['beside_s']:.2f} s against {told['alone_s']:.2f} alone"
    )


def quality_text(quality: Mapping[str, Any] | str) -> str:
    if isinstance(quality, str):
        return quality
    return (
        f"perplexity {quality['perplexity']:.3f} (source {quality['perplexity_against']:.3f}), "
        f"KL {quality['mean_kl']:.4f}"
    )


# ---------------------------------------------------------------------------------------------- files


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Decode and prefill rates, a group of bars a case, p10 to p90 as whiskers."""
    rates = {"decode": "decode_tokens_per_s", "prefill": "prefill_tokens_per_s"}
    names = list(dict.fromkeys(name for case in report["cases"] for name in case["targets"]))
    with picture(path, inches=(11, 4.5)) as figure:
        for axis, (title, key) in zip(figure.subplots(1, 2), rates.items(), strict=True):
            bars(axis, report["cases"], names, key)
            axis.set(title=f"{title}, tokens/s (all rows)")
            axis.legend()


def bars(axis: Any, cases: list[Mapping[str, Any]], names: list[str], key: str) -> None:
    """A group of bars a case, one a target."""
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        for place, case in enumerate(cases):
            bar(axis, place + index * width, case["targets"].get(name, {}), key, width, f"C{index}")
        axis.plot([], color=f"C{index}", lw=6, label=name)  # the legend's entry, once
    middle = (0.8 - width) / 2
    axis.set_xticks([place + middle for place in range(len(cases))], list(map(label, cases)))


def bar(axis: Any, place: float, figures: Mapping[str, Any], key: str, width: float, color: str) -> None:
    """One bar, and its p10 to p90; nothing where nothing was measured."""
    if figures.get(key) is None:
        return
    axis.bar(place, figures[key], width, color=color)
    if f"{key}_p10" in figures:
        axis.plot([place] * 2, [figures[f"{key}_p10"], figures[f"{key}_p90"]], color="black", lw=1)


def label(case: Mapping[str, Any]) -> str:
    return f"prompt {case['prompt_len']}\nbatch {case['batch_size']}"


def http_over_engine(report: Mapping[str, Any]) -> float | None:
    """The share of the engine's decode rate that is left over HTTP: the median of the rounds, first case."""
    for case in report["cases"]:
        decode = case["ratios"].get("http", {}).get("decode")
        if report["ours"] == "engine" and decode:
            return float(1 / decode)
    return None
