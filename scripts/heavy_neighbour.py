#!/usr/bin/env python3
"""How long running streams wait for text while neighbours post the largest requests that a server takes.

    python scripts/heavy_neighbour.py --url http://127.0.0.1:8080/predictions/gpt-fast

Streams run all the time; quiet seconds and seconds beside two neighbours, who post one kind of request in a loop, take
turns. A table of the streams' gaps, from one piece of text to the next, and one JSON line last. No request is like
another, so nothing is answered from a cache.
"""

import argparse
import asyncio
import itertools
import json
import string
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from gpt_fast.bench.client import NativeApi, post
from gpt_fast.bench.report import show
from gpt_fast.cli.errors import at_least, http_url, one_line_errors
from gpt_fast.files import write_json
from gpt_fast.measure import machine
from gpt_fast.measure.stats import percentile

MIB = (1 << 20) - 512  # a body of 1 MiB, less what stands around its text
CONSTRAINT = 32_768 - 64  # bytes of a schema, an expression or a grammar
SHORT = {"prompt": "The capital of France is", "max_new_tokens": 1}
SALT = "saltsalt"  # in each body once, for what makes it unlike all others
PATHS = {"chat": "/1.0/v1/chat/completions"}  # of kinds that are not native requests
Body = dict[str, Any]


def letters(rng: Random, size: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase + "  ", k=size))


def names(rng: Random, count: int) -> list[str]:
    return [SALT, *("".join(rng.choices(string.ascii_lowercase, k=8)) for _ in range(count))]


def schema(rng: Random) -> Body:
    """An object of as many properties, of several types, as the bytes allow."""
    types = itertools.cycle(({"type": "integer"}, {"type": "string"}, {"enum": ["a", "b", 3]}, {"type": "boolean"}))
    properties = dict(zip(names(rng, CONSTRAINT // 36), types, strict=False))
    return {**SHORT, "json_schema": {"type": "object", "properties": properties, "required": [*properties][:8]}}


def grammar(rng: Random) -> Body:
    rules = names(rng, CONSTRAINT // 48)
    lines = [f'{name} ::= "{letters(rng, 6)}" {other}? [a-z]+' for name, other in itertools.pairwise(rules)]
    return {**SHORT, "grammar": "\n".join([f"root ::= {rules[0]}", *lines, f'{rules[-1]} ::= "x"'])}


def chat(rng: Random) -> Body:
    contents = [SALT, *(letters(rng, MIB // 1024 - 40) for _ in range(1023))]
    return {"messages": [{"role": "user", "content": content} for content in contents], "max_tokens": 1}


def ids(rng: Random, count: int) -> list[int]:
    return [rng.randrange(1000, 9999) for _ in range(count)]


KINDS: dict[str, Callable[[Random], Body]] = {
    "text": lambda rng: {**SHORT, "prompt": SALT + letters(rng, MIB)},
    "text, encoded": lambda rng: {**SHORT, "prompt": SALT + letters(rng, 80_000)},
    "token ids": lambda rng: {**SHORT, "prompt": ids(rng, MIB // 6)},
    "chat": chat,
    "schema": schema,
    "grammar": grammar,
    "choice": lambda rng: {**SHORT, "structured_outputs": {"choice": names(rng, CONSTRAINT // 12)}},
    "regex": lambda rng: {**SHORT, "structured_outputs": {"regex": "|".join(names(rng, CONSTRAINT // 9))}},
}


def salted(body: bytes, rng: Random) -> Iterator[bytes]:
    """The body again and again, never the same."""
    while True:
        yield body.replace(SALT.encode(), "".join(rng.choices(string.ascii_lowercase, k=8)).encode())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", type=http_url, required=True, help="where native requests go")
    add("--token", default="", help="the inference key, where the server asks for one")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--streams", type=at_least(1), default=4)
    add("--max_new_tokens", type=at_least(1), default=2000, help="of a stream, which then begins anew")
    add("--neighbours", type=at_least(1), default=2, help="who post beside the streams, each one request at a time")
    add("--rounds", type=at_least(1), default=3, help="how often each kind has its turn")
    add("--seconds", type=float, default=4.0, help="of each turn, and of the quiet before it")
    add("--out", type=Path, help="write the JSON here, indented")
    return parser.parse_args(argv, argparse.Namespace(arguments=sys.argv[1:] if argv is None else argv))


# ------------------------------------------------------------------------------------------- the streams


class Turns:
    """Whose turn it is, and the streams' gaps in each: a gap belongs to the turn in which it began."""

    def __init__(self) -> None:
        self.now = ""
        self.gaps: dict[str, list[float]] = defaultdict(list)

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        self.now = name
        yield
        self.now = ""


async def stream_forever(args: argparse.Namespace, turns: Turns, rng: Random) -> None:
    api = NativeApi()
    while True:
        body = api.body(letters(rng, 64), args.max_new_tokens)
        last, began = None, ""
        async for text in api.texts(post(args.url, body, args.token)):
            at = time.perf_counter()
            if text and last is not None and began:
                turns.gaps[began].append(at - last)
            last, began = (at, turns.now) if text else (last, began)


# ------------------------------------------------------------------------------------------- the neighbours


async def post_until(url: str, token: str, bodies: Iterator[bytes], until: float) -> list[str]:
    """What became of each request: "" for an answer, else the refusal."""
    found = []
    while time.perf_counter() < until:
        try:
            async for _ in post(url, next(bodies), token):
                pass
            found.append("")
        except ConnectionError as error:
            found.append(str(error))
    return found


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    turns, outcomes, rng = Turns(), defaultdict[str, list[str]](list), Random(0)
    made = {kind: json.dumps(KINDS[kind](rng)).encode() for kind in args.kinds}
    streams = [asyncio.create_task(stream_forever(args, turns, Random(index))) for index in range(args.streams)]
    await asyncio.sleep(1.0)
    meter = machine.CpuMeter(machine.server_processes(args.url))
    before = meter.read()
    try:
        for _, kind in itertools.product(range(args.rounds), args.kinds):
            async with turns.turn("quiet"):
                await asyncio.sleep(args.seconds)
            until = time.perf_counter() + args.seconds
            async with turns.turn(kind):
                url, bodies = args.url + PATHS.get(kind, ""), salted(made[kind], rng)
                posts = (post_until(url, args.token, bodies, until) for _ in range(args.neighbours))
                for found in await asyncio.gather(*posts):
                    outcomes[kind] += found
            if broken := next((task for task in streams if task.done()), None):
                broken.result()
                raise RuntimeError("a stream ended")
    finally:
        for task in streams:
            task.cancel()
    told = machine.description("python scripts/heavy_neighbour.py", args.arguments)
    foreign = machine.foreign_share(before, meter.read())
    figures = {kind: figures_of(turns.gaps[kind], outcomes[kind]) for kind in ("quiet", *args.kinds)}
    return told | {"streams": args.streams, "neighbours": args.neighbours, "foreign_load": foreign, "turns": figures}


def figures_of(gaps: list[float], outcomes: list[str]) -> dict[str, Any]:
    percents = {f"gap_ms_p{percent}": percentile([1000 * gap for gap in gaps], percent) for percent in (50, 99, 100)}
    refused = [outcome for outcome in outcomes if outcome]
    return {**percents, "gaps": len(gaps), "requests": len(outcomes), "refused": refused[:1]}


def lines(turns: dict[str, dict[str, Any]]) -> list[str]:
    heading = f"{'beside':<15} {'gap p50 ms':>10} {'p99':>7} {'max':>7} {'p50 / quiet':>11} {'requests':>8}  refused"
    found, quiet = [heading], turns["quiet"]["gap_ms_p50"]
    for kind, each in turns.items():
        gaps = [each[f"gap_ms_p{percent}"] for percent in (50, 99, 100)]
        ratio = gaps[0] / quiet if gaps[0] is not None and quiet else None
        cells = [f"{kind:<15} {show(gaps[0], '.1f'):>10} {show(gaps[1], '.1f'):>7} {show(gaps[2], '.1f'):>7}"]
        cells += [f"{show(ratio, '.2f'):>11} {each['requests']:>8}", *each["refused"]]
        found.append("  ".join(cells)[:150])
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(also=(RuntimeError, OSError)):
        result = asyncio.run(measure(args))
    print("\n".join(lines(result["turns"])))
    if args.out:
        write_json(result, args.out)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
