"""gpt-fast bench: tables, then one JSON line last. docs/performance.md explains every column.

    gpt-fast bench --engine --checkpoint_path DIR
    gpt-fast bench --engine --http http://127.0.0.1:8080/predictions/gpt-fast --checkpoint_path DIR
    gpt-fast bench --gpu --help
    gpt-fast bench --stub-collectives --help
    gpt-fast bench --engine --checkpoint_path DIR/model_int4.g32.safetensors --gguf FILE \\
        --prompt_len 32 512 --batch_size 1 4 --peer ik_llama.cpp=FOLDER --out benchmarks/NAME.json
    gpt-fast bench --engine --checkpoint_path DIR --batch_size 1 16 --peer build=OTHER_CHECKOUT

Every target runs in a process of its own; for each case one discarded round, then --repeat rounds in which all take
turns. Figures are medians over segments of 25 decode steps during which other programs used at most 10 % of the CPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from gpt_fast.bench import report
from gpt_fast.bench.interleave import Run, interleave
from gpt_fast.bench.peers import PEERS
from gpt_fast.bench.remote import Remote
from gpt_fast.bench.sample import Case, Unavailable
from gpt_fast.bench.targets import Factory, bandwidth, factories, model_facts
from gpt_fast.cli.errors import at_least, http_url, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.convert.named import CHECKPOINT_HELP, converted
from gpt_fast.files import write_json
from gpt_fast.measure import machine
from gpt_fast.measure.picture import picture_path
from gpt_fast.measure.stats import FOREIGN_LIMIT

VERIFY_SIZES = range(1, 9)


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if "--gpu" in given:
        from gpt_fast.bench.gpu.command import main as gpu_main

        return gpu_main([argument for argument in given if argument != "--gpu"])
    if "--stub-collectives" in given:
        from gpt_fast.bench.scaling import main as scaling_main

        return scaling_main([argument for argument in given if argument != "--stub-collectives"])
    args = parse_args(argv)
    with one_line_errors(also=(RuntimeError,)):  # as which a target's error comes out of its process
        if not (args.engine or args.tp > 1 or args.http or args.peer):
            raise ValueError("nothing to measure: give --engine, --tp N, --http URL, --peer NAME, or several")
        args.checkpoint_path = converted(str(args.checkpoint_path))
        result = measure(args)
        print(report.table(result))
        if args.out:
            write_json(result, args.out)
        if args.plot:
            report.plot(result, args.plot)
        print(json.dumps(result))


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast bench", description=__doc__)
    add = flags.add_argument_group("what").add_argument
    add("--checkpoint_path", required=True, type=Path, help=CHECKPOINT_HELP)
    add("--engine", action="store_true", help="measure the engine called directly")
    add("--tp", type=at_least(1), default=1, metavar="N", help="measure the engine on N ranks of this machine")
    add("--http", type=http_url, metavar="URL", help="measure a running server that serves the same checkpoint")
    add("--token", default="", help="the server's inference key, where it asks for one")
    peers = "; ".join(f"{name}{f'=PATH ({what})' if what else ''}" for name, (_, what) in PEERS.items())
    add("--peer", action="append", default=[], type=peer, metavar="NAME[=PATH]", help=f"may be repeated: {peers}")
    add("--gguf", type=Path, help="the same weights for peers that read GGUF")
    add = flags.add_argument_group("how").add_argument
    add("--prompt_len", type=at_least(1), nargs="+", default=[32], metavar="N", help="tokens")
    add("--batch_size", type=at_least(1), nargs="+", default=[1], metavar="N", help="rows decoded together")
    add("--max_new_tokens", type=at_least(1), default=200, help="of every row")
    add("--repeat", type=at_least(1), default=5, help="rounds")
    add("--threads", type=at_least(0), default=0, help="of every target; 0: one a core")
    add("--busy", type=at_least(0), default=0, metavar="N", help="the engine also beside N programs that never rest")
    add(
        "--starts",
        type=at_least(0),
        default=3,
        help="again, of the engine and a build, caches warm: the median; 0: the first",
    )
    add("--verify", action="store_true", help="also the cost of a forward of 2 to 8 tokens of one row")
    add("--long_prompt", type=at_least(1), metavar="N", help="also a stream's gaps while N tokens prefill beside it")
    add("--foreign_limit", type=float, default=FOREIGN_LIMIT, help="of the CPUs; above it a segment is noisy: dropped")
    add("--probe_gib", type=float, default=1.0, help="buffer of the bandwidth probe; 0: no probe")
    add = flags.add_argument_group("the engine").add_argument
    add("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    add("--kv_cache", default="auto", help="auto, float32, bfloat16, float16, int8")
    add("--kernels", default="auto", help="auto (fused where there is one), plain")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--temperature", type=float, default=0.0, help="of its sampler; 0: the best token, as peers are asked for")
    add("--compile", action="store_true", help="compile decoding")
    add("--compile_prefill", action="store_true", help="compile the prompt's forward too")
    add = flags.add_argument_group("results").add_argument
    add("--out", type=Path, help="write the JSON here, indented")
    add("--plot", type=picture_path, help="write a picture here (needs matplotlib)")
    return flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parser().parse_args(argv, argparse.Namespace(arguments=sys.argv[1:] if argv is None else argv))


def peer(value: str) -> tuple[str, Path | None]:
    name, _, path = value.partition("=")
    if name not in PEERS:
        raise argparse.ArgumentTypeError(f"unknown peer (got {name!r}, allowed {', '.join(PEERS)})")
    return name, Path(path) if path else None


# ------------------------------------------------------------------------------------------ measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start every target, take turns, and put the result together."""
    threads = args.threads or os.cpu_count() or 1
    vocabulary, kv_elements = model_facts(args.checkpoint_path)
    cases = [
        Case(prompt_len, args.max_new_tokens, rows, vocabulary=vocabulary, temperature=args.temperature)
        for prompt_len in args.prompt_len
        for rows in args.batch_size
    ]
    with ExitStack() as stack:
        notes: list[str] = []
        makers = factories(args, threads, kv_elements)
        targets = {name: remote for name, maker in makers.items() if (remote := start(stack, notes, name, maker))}
        probe = start(stack, notes, "probe", (bandwidth, {"nbytes": int(args.probe_gib * 2**30), "threads": threads}))
        if not targets:
            raise RuntimeError(f"nothing could be measured: {'; '.join(notes)}")
        results = interleave(
            runs(targets, args.busy),
            cases,
            repeat=args.repeat,
            probe=partial(probe.call, "probe") if probe else lambda: None,
        )
        results.notes[:0] = notes
        descriptions = {name: target.call("describe") for name, target in targets.items()}
        processes = {name: process_figures(name, target, args) for name, target in targets.items()}
        method = probe.call("method") if probe else None
    if args.starts:  # when every target is gone
        builds = {name: makers[name] for name in targets if name in ("engine", "build")}
        for name, seconds in starts(builds, args.starts).items():
            processes[name] |= {"start_seconds": statistics.median(seconds), "starts": seconds}
    told = machine.description("python -m gpt_fast.bench", args.arguments) | {
        "threads": threads,
        "probe": method,
        "repeat": args.repeat,
    }
    result = told | report.build(results, descriptions, processes, ours=next(iter(targets)), limit=args.foreign_limit)
    return result | {"http_over_engine": report.http_over_engine(result)}


def runs(targets: Mapping[str, Remote], busy: int) -> dict[str, Run]:
    """What takes turns: every target, and the engine once more beside busy programs."""
    found: dict[str, Run] = {name: partial(target.call, "run") for name, target in targets.items()}
    if busy and "engine" in targets:
        engine = targets["engine"]
        found[f"engine beside {busy} busy"] = lambda case: engine.call("run", case, busy)
    return found


def start(stack: ExitStack, notes: list[str], name: str, factory: Factory) -> Remote | None:
    """The target in its process, which the stack ends; None, with a note, for a peer that cannot be had."""
    make, options = factory
    try:
        remote = Remote(make, **options)
    except Unavailable as reason:
        notes.append(str(reason))
        return None
    except RuntimeError as error:
        if name not in PEERS:
            raise
        notes.append(f"{name}: {error}")
        return None
    stack.callback(remote.close)
    return remote


def starts(builds: Mapping[str, Factory], count: int) -> dict[str, list[float]]:
    """Seconds from before the engine's process exists to its first token, `count` times, each build in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in builds}
    for _ in range(count):
        for name, (make, options) in builds.items():
            remote = Remote(make, **options)
            seconds[name].append(remote.start_seconds if name == "engine" else remote.call("start_seconds"))
            remote.close()
    return seconds


def process_figures(name: str, target: Remote, args: argparse.Namespace) -> dict[str, Any]:
    """Of the target's process, after all rounds; a server's is not ours to look into."""
    if name == "http":
        return {}
    rss = target.peak_rss()
    figures: dict[str, Any] = {"peak_rss_mb": None if rss is None else rss / 1e6}
    if name == "engine":
        figures |= {"start_seconds": target.start_seconds, "recompiles": target.call("recompiles")}
    if name == "engine" and args.verify:
        context = max(args.prompt_len)
        seconds = target.call("verify", context, [m for m in VERIFY_SIZES if m <= args.max_new_tokens])
        figures["verify_ms"] = {
            str(m): {"ms": value * 1000, "ratio": value / seconds[1]} for m, value in seconds.items()
        }
    if name == "engine" and args.long_prompt:
        figures["long_prompt"] = target.call("long_prompt", args.long_prompt, args.repeat)
    return figures


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the targets' processes end with this one
    main()
