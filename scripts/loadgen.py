#!/usr/bin/env python3
"""Closed-loop load on a running server: N streams, figures under `vllm bench serve`'s names, one JSON line last.

    python scripts/loadgen.py --url http://127.0.0.1:8080/predictions/gpt-fast --streams 1 4 16 --seconds 30

Every answer is compared with the one the same prompt got alone before; exit code 1 when any failed or differs.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from gpt_fast.bench import machine
from gpt_fast.bench.client import NativeApi, OpenAIApi
from gpt_fast.bench.load import Load, ask_alone, check, metrics, run
from gpt_fast.bench.report import show, write_json
from gpt_fast.bench.sample import Case


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", required=True, help="where to post")
    add("--api", choices=("native", "openai"), default="native", help="openai: /v1/completions, other servers too")
    add("--model", help="the model's name, where the server asks for one (openai)")
    add("--token", default="", help="the inference key, where the server asks for one")
    add("--streams", type=int, nargs="+", default=[1, 4, 16], metavar="N", help="requests in flight, one run each")
    add("--seconds", type=float, default=30.0, help="of each run; requests under way are let finish")
    add("--requests", type=int, help="end each run after so many requests instead")
    add("--prompts", type=int, default=16, help="different prompts, of random token ids")
    add("--prompt_len", type=int, default=32, help="tokens of a prompt")
    add("--vocabulary", type=int, default=1000, help="token ids are drawn below this")
    add("--max_new_tokens", type=int, default=128)
    add("--out", type=Path, help="write the JSON here, indented")
    args = parser.parse_args(argv, argparse.Namespace(arguments=sys.argv[1:] if argv is None else argv))
    for name in ("seconds", "prompts", "prompt_len", "vocabulary", "max_new_tokens"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: must be above 0 (got {getattr(args, name)})")
    if min(args.streams) < 1 or (args.requests is not None and args.requests < 1):
        parser.error("--streams and --requests: must be above 0")
    return args


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The oracle, then one run for each number of streams."""
    api = NativeApi() if args.api == "native" else OpenAIApi(args.model)
    case = Case(args.prompt_len, args.max_new_tokens, args.prompts, vocabulary=args.vocabulary)
    prompts = [tuple(prompt) for prompt in case.prompts()]
    loads = [
        Load(args.url, api, streams, args.max_new_tokens, args.seconds, args.requests, args.token)
        for streams in args.streams
    ]
    oracle = await ask_alone(loads[0], prompts)
    meter = machine.CpuMeter(machine.server_processes(args.url))
    runs = []
    for load in loads:
        before = meter.read()
        outcomes, duration = await run(load, prompts)
        foreign = {"foreign_load": machine.foreign_share(before, meter.read())}
        runs.append(metrics(outcomes, load, duration) | check(outcomes, oracle) | foreign)
        print(line(runs[-1]), flush=True)
    told = machine.description("python scripts/loadgen.py", args.arguments)
    settings = {"prompt_len": args.prompt_len, "max_new_tokens": args.max_new_tokens, "prompts": args.prompts}
    return told | settings | {"runs": runs}


HEADING = f"{'streams':>7} {'requests':>8} {'tokens/s':>9}" + "".join(
    f" {name + ' p50 ms':>12} {'p99':>8}" for name in ("TTFT", "TPOT", "ITL", "E2EL")
) + f" {'failed':>7} {'differ':>7} {'mixed up':>8} {'foreign':>8}"  # fmt: skip


def line(figures: dict[str, Any]) -> str:
    cells = [f"{figures['max_concurrency']:7d} {figures['completed']:8d} {figures['output_throughput']:9.1f}"]
    for name in ("ttft", "tpot", "itl", "e2el"):
        median, worst = figures[f"median_{name}_ms"], figures[f"p99_{name}_ms"]
        cells.append(f"{show(median, '.2f'):>12} {show(worst, '.2f'):>8}")
    cells.append(f"{figures['failed']:7d} {figures['mismatched']:7d} {figures['mixed_up']:8d}")
    cells.append(f"{show(figures['foreign_load'], '.1%'):>8}")
    return " ".join(cells)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(HEADING)
    try:
        result = asyncio.run(measure(args))
    except RuntimeError as error:
        sys.exit(f"error: {args.url}: {error}")
    problems = [run["first_problem"] for run in result["runs"] if run["first_problem"]]
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if args.out:
        write_json(result, args.out)
    print(json.dumps(result))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
