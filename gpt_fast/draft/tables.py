"""A draft's report shown: tables, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_fast.draft.assess import CategoryAcceptance, DraftReport
from gpt_fast.measure.picture import picture


def print_report(report: DraftReport) -> None:
    print(f"\n=== {report.draft}")
    print("acceptance of proposal i where those before it stand (95 % interval), proposals accepted a block")
    for row in report.acceptance:
        rates = "  ".join(f"{a:.2f} ({low:.2f}-{high:.2f})" for a, low, high in row.rates)
        print(f"  {row.category:10} T={row.temperature:<4g} {row.mean_accepted:5.2f} of {row.steps} blocks   {rates}")
    for o in report.overlap:
        print(f"  {o.category:10} E[sum min(p,q)] {o.overlap:.3f}, top-1 agreement {o.top1:.3f}, KL {o.kl:.3f} nats")
    print(f"{'batch':>6} {'plain ms':>9} {'draft ms':>9} {'draft tok/s':>12} {'prompt ms':>10} {'c':>6}  v and o by k")
    for c in report.costs:
        by_k = "  ".join(f"k={k}: {c.v[k]:.2f} {c.o[k]:+.2f}" for k in c.v)
        print(
            f"{c.batch_size:6} {c.plain_ms:9.2f} {c.draft_ms:9.2f} {c.draft_tokens_per_s:12.1f}"
            f" {c.draft_prompt_ms:10.2f} {c.c:6.3f}  {by_k}"
        )
    print(f"{'batch':>6} {'best k':>6} {'predicted':>10} {'measured':>9} {'residual':>9} {'break-even a':>13}  verdict")
    for s in report.speeds:
        print(
            f"{s.batch_size:6} {s.k:6} {s.predicted:10.2f} {s.measured:9.2f} {s.residual:+9.1%} {s.break_even:13.2f}"
            f"  {s.verdict}"
        )


def print_comparison(reports: Sequence[DraftReport]) -> None:
    """All drafts in one table, the fastest first at each batch size."""
    print(
        f"\n{'batch':>6} {'draft':40} {'best k':>6} {'c':>6} {'accepted':>9} {'predicted':>10} {'measured':>9}  verdict"
    )
    rows = [
        (speed.batch_size, -speed.measured, report, cost, speed)
        for report in reports
        for cost, speed in zip(report.costs, report.speeds, strict=True)
    ]
    for batch_size, _, report, cost, speed in sorted(rows, key=lambda row: row[:2]):
        print(
            f"{batch_size:6} {report.draft[-40:]:40} {speed.k:6} {cost.c:6.3f} {report.mean_accepted:9.2f}"
            f" {speed.predicted:10.2f} {speed.measured:9.2f}  {speed.verdict}"
        )


def plot(reports: Sequence[DraftReport], path: Path) -> None:
    """Acceptance by position with its 95 % intervals, and speed-up by batch size, of every draft."""
    with picture(path, inches=(11, 4.5)) as figure:
        left, right = figure.subplots(1, 2)
        rows = [(Path(report.draft).name, row) for report in reports for row in report.acceptance]
        for index, (name, row) in enumerate(rows):
            plot_acceptance(left, name, row, aside=0.3 * (index / len(rows) - 0.5))
        for report in reports:
            sizes, name = [s.batch_size for s in report.speeds], Path(report.draft).name
            right.plot(sizes, [s.predicted for s in report.speeds], "--", label=f"{name} predicted")
            right.plot(sizes, [s.measured for s in report.speeds], marker="o", label=f"{name} measured")
        left.set(xlabel="proposal", ylabel="accepted where those before stand (95 % intervals)", ylim=(0, 1.02))
        left.set_xticks(range(1, 1 + max(len(row.rates) for _, row in rows)))
        right.axhline(1.0, color="grey", linewidth=1)
        right.set(xlabel="batch size", ylabel="speed-up over plain decode")
        right.set_xticks(sorted({s.batch_size for report in reports for s in report.speeds}))
        for axes in (left, right):
            axes.legend(fontsize="x-small")


def plot_acceptance(axes: Any, name: str, row: CategoryAcceptance, *, aside: float) -> None:
    """aside: how far from its position, so that rows' intervals do not hide each other."""
    positions = [i + aside for i in range(1, len(row.rates) + 1)]
    errors = [[max(a - low, 0.0) for a, low, _ in row.rates], [max(high - a, 0.0) for a, _, high in row.rates]]
    label = f"{name} {row.category} T={row.temperature:g}"
    axes.errorbar(
        positions, [a for a, _, _ in row.rates], yerr=errors, marker="o", capsize=2, elinewidth=0.8, label=label
    )
