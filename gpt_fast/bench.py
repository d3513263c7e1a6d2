"""python -m gpt_fast.bench: how fast one stream decodes, in the engine and through HTTP, interleaved.

    python -m gpt_fast.bench --engine --checkpoint_path DIR
    python -m gpt_fast.bench --engine --http http://127.0.0.1:8080/predictions/gpt-fast --checkpoint_path DIR

TTFT: seconds from sending a tokenized prompt (HTTP: the request) to the first token. Decode rate: tokens after the
first over the time they took. Each mode runs --repeat times in turn (A B A B ...), so that drift of the machine
touches both alike; medians and their ratio are printed, one JSON line last.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from gpt_fast.config import SamplingParams
from gpt_fast.llm import Engine


@dataclass(frozen=True)
class Sample:
    """One timed answer: seconds to the first token, decoded tokens a second after it."""

    ttft: float
    rate: float


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpt_fast.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--engine", action="store_true", help="measure the engine called directly")
    parser.add_argument("--http", metavar="URL", help="measure a running server that serves the same checkpoint")
    parser.add_argument("--prompt_len", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    modes: dict[str, Callable[[list[int]], Sample]] = {}
    vocabulary = 1000
    if args.engine:
        engine = Engine.load(
            args.checkpoint_path, dtype=args.dtype, device=args.device, threads=args.threads, compile=args.compile
        )
        modes["engine"] = lambda prompt: time_engine(engine, prompt, args.max_new_tokens)
    if args.http:
        modes["http"] = lambda prompt: time_http(args.http, prompt, args.max_new_tokens)
    if not modes:
        raise SystemExit("error: nothing to measure: give --engine, --http URL, or both")
    samples = interleave(modes, prompts(args.prompt_len, vocabulary, args.repeat))
    report(samples, args)


def prompts(length: int, vocabulary: int, count: int) -> list[list[int]]:
    """Random token ids, a different prompt each time so that no prefix is ever reused."""
    rng = random.Random(0)
    return [[rng.randrange(100, vocabulary) for _ in range(length)] for _ in range(count)]


def interleave(
    modes: dict[str, Callable[[list[int]], Sample]], prompt_list: list[list[int]]
) -> dict[str, list[Sample]]:
    """One discarded round, then every mode in turn for every prompt."""
    for run in modes.values():
        run(prompt_list[0][::-1])
    samples: dict[str, list[Sample]] = {name: [] for name in modes}
    for prompt in prompt_list:
        for name, run in modes.items():
            samples[name].append(run([*prompt[:-1], prompt[-1] + len(samples[name])]))
    return samples


def time_engine(engine: Engine, prompt: list[int], count: int) -> Sample:
    params = SamplingParams(max_new_tokens=count, ignore_eos=True)
    started = time.perf_counter()
    arrivals = [time.perf_counter() for _ in engine.events(prompt, params)]
    return sample(started, arrivals[0], arrivals[-1], len(arrivals))


def time_http(url: str, prompt: list[int], count: int) -> Sample:
    """Post a streaming request of `count` tokens and time its chunks as they arrive on the socket."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=120)
    body = json.dumps({"prompt": prompt, "max_new_tokens": count, "temperature": 0, "ignore_eos": True})
    started = time.perf_counter()
    connection.request("POST", parts.path, body)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"error: {url} answered {response.status}: {response.read()[:500]!r}")
    response.read1(1)
    first = time.perf_counter()
    last = first
    while response.read1(1 << 16):
        last = time.perf_counter()
    connection.close()
    return sample(started, first, last, count)


def sample(started: float, first: float, last: float, count: int) -> Sample:
    return Sample(first - started, (count - 1) / (last - first) if last > first else float("nan"))


def report(samples: dict[str, list[Sample]], args: argparse.Namespace) -> None:
    print(f"{'mode':8} {'TTFT ms':>10} {'decode tokens/s':>16} {'min':>8} {'max':>8}")
    figures = {}
    for name, rows in samples.items():
        rates = [row.rate for row in rows]
        ttft, rate = statistics.median(row.ttft for row in rows), statistics.median(rates)
        figures[name] = {"ttft_ms": round(ttft * 1000, 2), "decode_tokens_per_s": round(rate, 2)}
        print(f"{name:8} {ttft * 1000:10.1f} {rate:16.1f} {min(rates):8.1f} {max(rates):8.1f}")
    result = {"prompt_len": args.prompt_len, "max_new_tokens": args.max_new_tokens, "repeat": args.repeat} | figures
    if len(samples) == 2:
        result["http_over_engine"] = round(
            figures["http"]["decode_tokens_per_s"] / figures["engine"]["decode_tokens_per_s"], 4
        )
        print(f"http / engine: {result['http_over_engine']:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
