#!/usr/bin/env python3
"""Closed-loop load on a running server: N streams, figures under `vllm bench serve`'s names, one JSON line last.

    python scripts/loadgen.py --url http://127.0.0.1:8080/predictions/gpt-fast --streams 1 4 16 --seconds 30

Every answer is compared with the one the same prompt got alone before; exit code 1 when any failed or differs.
Other servers on the same machine are loaded in turn with --peer; what differs there is counted, and no failure.
"""

import argparse
import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_fast.bench.client import Api, NativeApi, OpenAIApi
from gpt_fast.bench.closed_loop import Load, Prompt, ask_alone, check, metrics, run
from gpt_fast.bench.report import show
from gpt_fast.bench.sample import Case
from gpt_fast.cli.errors import at_least, http_url, one_line_errors
from gpt_fast.files import write_json
from gpt_fast.measure import machine
from gpt_fast.measure.stats import percentile


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", type=http_url, required=True, help="where to post")
    add("--api", choices=("native", "openai"), default="native", help="openai: /v1/completions, other servers too")
    add("--model", help="the model's name, where the server asks for one (openai)")
    add("--token", default="", help="the inference key, where the server asks for one")
    add("--peer", action="append", default=[], metavar="NAME=URL", help="another server's /v1/completions")
    add("--rounds", type=at_least(1), default=1, help="the servers take turns so often")
    add("--streams", type=at_least(1), nargs="+", default=[1, 4, 16], metavar="N", help="in flight, one run each")
    add("--seconds", type=float, default=30.0, help="of each run; requests under way are let finish")
    add("--requests", type=at_least(1), help="end each run after so many requests instead")
    add("--prompts", type=at_least(1), default=16, help="different prompts, of random token ids")
    add("--prompt_len", type=at_least(1), default=32, help="tokens of a prompt")
    add("--vocabulary", type=at_least(1), default=1000, help="token ids are drawn below this")
    add("--max_new_tokens", type=at_least(1), default=128)
    add("--out", type=Path, help="write the JSON here, indented")
    args = parser.parse_args(argv, argparse.Namespace(arguments=sys.argv[1:] if argv is None else argv))
    if bad := next((peer for peer in args.peer if not all(peer.partition("=")[::2])), None):
        parser.error(f"--peer: must be NAME=URL (got {bad!r})")
    if args.seconds <= 0:
        parser.error(f"--seconds: must be above 0 (got {args.seconds})")
    return args


@dataclass
class Server:
    """One that is loaded. `oracle`: what it answers to each prompt alone."""

    name: str
    url: str
    api: Api
    token: str
    oracle: dict[Prompt, str]


OURS = "gpt-fast"


def servers(args: argparse.Namespace) -> list[Server]:
    ours = Server(OURS, args.url, NativeApi() if args.api == "native" else OpenAIApi(args.model), args.token, {})
    peers = (peer.partition("=")[::2] for peer in args.peer)
    return [ours, *(Server(name, url, OpenAIApi(), "", {}) for name, url in peers)]


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What each server answers alone; then for each number of streams every server in turn."""
    case = Case(args.prompt_len, args.max_new_tokens, args.prompts, vocabulary=args.vocabulary)
    prompts = [tuple(prompt) for prompt in case.prompts()]
    targets = servers(args)
    for server in targets:
        alone = Load(server.url, server.api, 1, args.max_new_tokens, token=server.token)
        try:
            server.oracle = await ask_alone(alone, prompts)
        except RuntimeError as error:
            raise RuntimeError(f"{server.url}: {error}") from error
    runs = []
    for streams in args.streams:
        for turn in range(args.rounds):
            for server in targets[:: 1 if turn % 2 == 0 else -1]:
                runs.append(await measure_run(server, streams, prompts, args))
                print(line(runs[-1]), flush=True)
    told = machine.description("python scripts/loadgen.py", args.arguments)
    settings = {"prompt_len": args.prompt_len, "max_new_tokens": args.max_new_tokens, "prompts": args.prompts}
    return told | settings | {"runs": runs, "ratios": ratios(runs)}


async def measure_run(server: Server, streams: int, prompts: list[Prompt], args: argparse.Namespace) -> dict[str, Any]:
    load = Load(server.url, server.api, streams, args.max_new_tokens, args.seconds, args.requests, server.token)
    pids = machine.server_processes(server.url)
    meter, shares = machine.CpuMeter(pids), machine.ShareMeter(pids)
    before = meter.read()
    outcomes, duration = await run(load, prompts)
    told = {"server": server.name, "foreign_load": machine.foreign_share(before, meter.read()), "cpu": shares.read()}
    return told | metrics(outcomes, load, duration) | check(outcomes, server.oracle)


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Our tokens/s over each peer's, round by round, for each number of streams."""
    rates: dict[tuple[int, str], list[float]] = {}
    for figures in runs:
        rates.setdefault((figures["max_concurrency"], figures["server"]), []).append(figures["output_throughput"])
    found = []
    for (streams, name), theirs in rates.items():
        if name != OURS:
            each = [a / b for a, b in zip(rates[streams, OURS], theirs, strict=True) if b > 0]
            found.append(
                {
                    "streams": streams,
                    "peer": name,
                    "output_throughput_ratio": {"median": percentile(each, 50), "rounds": each},
                }
            )
    return found


HEADING = (
    f"{'server':<14} {'streams':>7} {'requests':>8} {'tokens/s':>9}"
    + "".join(f" {name + ' p50 ms':>12} {'p99':>8}" for name in ("TTFT", "TPOT", "ITL", "E2EL"))
    + f" {'failed':>7} {'differ':>7} {'mixed up':>8} {'foreign':>8}   CPU by process"
)


def line(figures: dict[str, Any]) -> str:
    cells = [f"{figures['server']:<14} {figures['max_concurrency']:7d} {figures['completed']:8d}"]
    cells.append(f"{figures['output_throughput']:9.1f}")
    for name in ("ttft", "tpot", "itl", "e2el"):
        median, worst = figures[f"median_{name}_ms"], figures[f"p99_{name}_ms"]
        cells.append(f"{show(median, '.2f'):>12} {show(worst, '.2f'):>8}")
    cells.append(f"{figures['failed']:7d} {figures['mismatched']:7d} {figures['mixed_up']:8d}")
    cells.append(f"{show(figures['foreign_load'], '.1%'):>8}  ")
    cells += [f"{name} {share:.1%}" for name, share in figures["cpu"].items()]
    return " ".join(cells)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(HEADING)
    with one_line_errors(also=(RuntimeError,)):
        result = asyncio.run(measure(args))
    ours = [run for run in result["runs"] if run["server"] == OURS]
    problems = [run["first_problem"] for run in ours if run["first_problem"]]
    for found in result["ratios"]:
        ratio = show(found["output_throughput_ratio"]["median"], ".2f")
        print(f"{found['streams']} streams: {ratio} times {found['peer']}'s tokens/s")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if args.out:
        write_json(result, args.out)
    print(json.dumps(result))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
