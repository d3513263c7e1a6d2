"""The rows as a table, a roofline and JSON. What a column means: docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt_fast.measure.picture import picture

Row = dict[str, Any]

KEYS = ("kind", "model", "format", "tp", "kv_cache", "rows", "context", "width", "prompt")
COLUMNS = {  # name: (key, format)
    "us/step": ("us_per_step", "{:.1f}"),
    "tok/s": ("tokens_per_s", "{:.1f}"),
    "GB/s": ("gb_s", "{:.0f}"),
    "% ceiling": ("percent_of_ceiling", "{:.1f}"),
    "kernels": ("kernels_per_step", "{:.0f}"),
    "host us/tok": ("host_us_per_token", "{:.1f}"),
    "/ best peer": ("over_peer", "{:.2f}"),
}


def finish(rows: list[Row], ceiling: float | None) -> None:
    """Add what only all rows together tell: the share of the read ceiling (GB/s), the ratio to the best peer."""
    for row in rows:
        if ceiling and "gb_s" in row:
            row["percent_of_ceiling"] = 100 * row["gb_s"] / ceiling
        ours = row["kind"] == "decode" and "tokens_per_s" in row and not {"kv_cache", "tp"} & {*row}  # as no peer's is
        if ours and (best := best_peer(rows, row)):
            row["over_peer"] = row["tokens_per_s"] / best


def best_peer(rows: Iterable[Row], ours: Row) -> float | None:
    """The highest rate a peer had on the same model, format, batch and context."""
    same = ("model", "format", "rows", "context")
    rates = [
        row["tokens_per_s"]
        for row in rows
        if row["kind"].startswith("peer") and "tokens_per_s" in row and all(row[k] == ours[k] for k in same)
    ]
    return max(rates, default=None)


def line(row: Row) -> str:
    """A row as text: what it is, then its figures or its error."""
    name = " ".join(f"{key} {row[key]}" if key not in KEYS[:3] else str(row[key]) for key in KEYS if key in row)
    if "error" in row:
        return f"{name}: error: {row['error']}"
    shown = {key for key, _ in COLUMNS.values()}
    figures = [f"{title} {form.format(row[key])}" for title, (key, form) in COLUMNS.items() if row.get(key) is not None]
    rest = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k not in shown and k.endswith(EXTRA)]
    return f"{name}: {', '.join(figures + rest)}"


EXTRA = ("ms", "_s", "us_plain", "over_one", "_us", "over_short")


def table(result: dict[str, Any]) -> str:
    """Everything, a line a row; decode rows in columns."""
    ceilings = result.get("ceilings") or {}
    head = [f"{key} {value:.4g}" for key, value in ceilings.items() if isinstance(value, float)]
    lines = [f"{result['device']}: {', '.join(head) or 'ceilings not measured'}"]
    titles = ("model", "format", "rows", "context", *COLUMNS)
    cells = [titles] + [decode_cells(row) for row in result["rows"] if row["kind"] == "decode"]
    widths = [max(len(cell[i]) for cell in cells) for i in range(len(titles))]
    if len(cells) > 1:
        lines += ["  ".join(text.rjust(width) for text, width in zip(cell, widths, strict=True)) for cell in cells]
    lines += [line(row) for row in result["rows"] if row["kind"] != "decode" or "error" in row]
    return "\n".join(lines)


def decode_cells(row: Row) -> tuple[str, ...]:
    figures = ("-" if row.get(key) is None else form.format(row[key]) for key, form in COLUMNS.values())
    form = row["format"] + (f", {row['kv_cache']} KV" if "kv_cache" in row else "")
    form += f", 1 of {row['tp']} ranks" if "tp" in row else ""
    return (row["model"], form, str(row["rows"]), str(row["context"]), *figures)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bytes of a step against its time, with the read ceiling as the line nothing can be below."""
    with picture(path, inches=(8, 5)) as figure:
        draw(figure.subplots(), result)


def draw(axis: Any, result: dict[str, Any]) -> None:
    measured = [row for row in result["rows"] if "gb_per_step" in row]
    for index, form in enumerate(dict.fromkeys(row["format"] for row in measured)):
        points = [(row["gb_per_step"], row["us_per_step"]) for row in measured if row["format"] == form]
        sizes, times = zip(*points, strict=True)
        axis.scatter(sizes, times, s=18, color=f"C{index}", label=form)
    ceiling = (result.get("ceilings") or {}).get("read_gb_s")
    every = sorted(row["gb_per_step"] for row in measured)
    if ceiling and every:
        axis.plot(every, [size / ceiling * 1e6 for size in every], color="black", label=f"read {ceiling:.0f} GB/s")
    axis.set(
        xscale="log", yscale="log", xlabel="GB a step must read", ylabel="microseconds a step", title=result["device"]
    )
    axis.legend()
