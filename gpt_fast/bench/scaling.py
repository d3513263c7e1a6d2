"""python -m gpt_fast.bench --stub-collectives: one rank's share of a model alone, and what N ranks would make of it.

    python -m gpt_fast.bench --stub-collectives --tp 1 2 4 8
    python -m gpt_fast.bench --stub-collectives --models smollm2-135m --formats int8 --threads 1 --measure

Without --measure nothing runs: the table says what bench/predicted.py expects of A100 cards, beside what gpt-fast
published for them. With it, rank 0's share (random weights) runs on this machine's fused decoder with its sums left
out, once with 2 layers and once with 4, from which all layers' time follows; so a 70B fits any machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt_fast.bench import predicted
from gpt_fast.bench.gpu.models import SHAPES, random_model, rank_config
from gpt_fast.bench.predicted import DIRECT, FITTED, NCCL, Step
from gpt_fast.cli.errors import at_least, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.config import ModelConfig
from gpt_fast.files import write_json
from gpt_fast.measure import machine
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch

LAYERS = (2, 4)  # measured, for the slope; more than the last cache holds, of any model that needs cards
CONTEXT = 128
WEIGHTS = {"bf16": "bfloat16", "int8": "int8", "int4": "int4"}  # as the CPU decoder calls them
COLUMNS = {
    "model": "{}", "format": "{}", "ranks": "{}", "GB a rank": "{:.2f}", "sums": "{}",
    "gpt-fast, NCCL": "{:.1f}", "model of it": "{:.1f}", "gpt-fast, direct": "{:.1f}", "model of that": "{:.1f}",
    "predicted": "{:.1f}", "share ms": "{:.2f}", "predicted here": "{:.1f}",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        told = machine.description("python -m gpt_fast.bench", args.arguments) if args.measure else {}
        found = rows(args)
        result = told | {"columns": "tokens a second, one stream; predicted: no card ran", "rows": found}
        print(table(found))
        if args.out:
            write_json(result, args.out)
        print(json.dumps(result))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="gpt-fast bench --stub-collectives", description=__doc__)
    add = parser.add_argument
    add("--tp", nargs="+", type=at_least(1), default=[1, 2, 4, 8], metavar="N", help="ranks")
    add("--models", nargs="+", choices=[*SHAPES], default=["llama-2-7b", "llama-3.1-8b", "llama-2-70b"], help="shapes")
    add("--formats", nargs="+", choices=[*WEIGHTS], default=[*WEIGHTS], help="of the weights")
    add("--measure", action="store_true", help="run the share on this machine")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="its")
    add("--threads", type=at_least(1), default=1, help="of the rank on a CPU")
    add("--sum_us", type=float, default=5.0, help="microseconds of one sum over ranks, for the prediction here")
    add("--repeat", type=at_least(1), default=20, help="steps timed; their median counts")
    add("--out", type=Path, help="write the JSON here, indented")
    given = sys.argv[1:] if argv is None else argv
    return parser.parse_args(given, argparse.Namespace(arguments=["--stub-collectives", *given]))


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name in args.models:
        for form in args.formats:
            for size in args.tp:
                share = rank_config(SHAPES[name], form, 0, size)
                row = prediction(name, form, size)
                if args.measure:
                    seconds = share_seconds(share, form, args)
                    row["share ms"] = seconds * 1e3
                    row["predicted here"] = 1 / (seconds + row["sums"] * args.sum_us * 1e-6)
                found.append(row)
    return found


def prediction(name: str, form: str, size: int) -> dict[str, Any]:
    """A row of the table, of A100 cards; without what nobody published or could fit."""
    share = rank_config(SHAPES[name], form, 0, size)
    ours, upstream = Step.ours(share, form, size), upstream_step(name, form, size)
    row = {"model": name, "format": form, "ranks": size, "GB a rank": ours.nbytes / 1e9, "sums": ours.sums}
    titles = {"gpt-fast, NCCL": NCCL, "gpt-fast, direct": DIRECT}
    row |= {title: table[name, form][size] for title, table in titles.items() if size in table.get((name, form), {})}
    expected = {"model of it": (upstream, NCCL), "model of that": (upstream, DIRECT), "predicted": (ours, DIRECT)}
    for title, (step, published) in expected.items():
        each = sum_seconds(published, size)
        if each is not None and step.nbytes < predicted.A100_MEMORY:
            row[title] = 1 / step.seconds(each)
    return row


def upstream_step(name: str, form: str, size: int) -> Step:
    whole = SHAPES[name]
    return Step.upstream(rank_config(whole, form, 0, size), form, size, vocabulary=whole.vocab_size)


def sum_seconds(published: Mapping[tuple[str, str], Mapping[int, float]], size: int) -> float | None:
    """Of one sum over so many ranks, from the model that all others check; None where it was not published."""
    if size == 1:
        return 0.0
    if size not in published[FITTED]:
        return None
    return upstream_step(*FITTED, size).fitted_sum(published[FITTED][size])


# ------------------------------------------------------------------------------------------ measuring


def share_seconds(share: ModelConfig, form: str, args: argparse.Namespace) -> float:
    """Of a step of the whole share, from that of a few of its layers: seconds."""
    few, more = (step_seconds(dataclasses.replace(share, n_layer=count), form, args) for count in LAYERS)
    return few + (more - few) / (LAYERS[1] - LAYERS[0]) * (share.n_layer - LAYERS[0])


@torch.inference_mode()
def step_seconds(config: ModelConfig, form: str, args: argparse.Namespace) -> float:
    """The median step of one token of one stream on the device's fused decoder."""
    if args.device == "cuda":
        from gpt_fast.bench.gpu import rows as gpu

        subject = gpu.Subject(random_model(config, form, torch.device("cuda"), torch.bfloat16))
        effort = gpu.Effort(repeat=5, new_tokens=args.repeat, steps=4)
        return float(gpu.decode(subject, 1, CONTEXT, effort)["us_per_step"]) / 1e6
    from gpt_fast.ops.cpu import CpuDecoder

    cpu = torch.device("cpu")
    model = random_model(config, form, cpu, torch.bfloat16)
    model.setup_rope(CONTEXT + 1, cpu)
    decoder = CpuDecoder(model, weights=WEIGHTS[form], threads=args.threads)
    cache = KVCache(config, slots=1, max_seq_len=CONTEXT + 1, dtype=torch.bfloat16, device=cpu)
    batch = Batch(torch.tensor([[1]]), torch.tensor([[CONTEXT]]), cache, length=CONTEXT + 1)
    seconds = []
    for _ in range(args.repeat + 2):  # the first ones warm up
        started = time.perf_counter()
        decoder(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


# ------------------------------------------------------------------------------------------- the table


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Rows of Markdown; columns that no row fills are left out."""
    titles = [title for title in COLUMNS if any(title in row for row in found)]
    cells = [[COLUMNS[title].format(row[title]) if title in row else "" for title in titles] for row in found]
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *cells])
