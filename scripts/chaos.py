#!/usr/bin/env python3
"""Faults and floods against the server that `make serve` left running; prints a table: case, tried, survived, lost.

Floods, drops, slow readers and soak also against the door without TorchServe (--url http://127.0.0.1:8000).

    python scripts/chaos.py                       all but the soak, some 15 minutes; --quick: 6
    python scripts/chaos.py --only flood drop     some of: see CASES below
    python scripts/chaos.py --only soak --minutes 480

A request survives when it is answered with the text that its prompt gets alone, is refused with 429 or 503, or, where
its server was killed, ends in an error. It is lost when it hangs, or when an answer that is cut short looks whole.
Exit code 1 when any was lost.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from instance import ROOT, Instance, fetch, requests_in_flight

from gpt_fast.bench.client import Answer, NativeApi, ask, post
from gpt_fast.cli.errors import at_least, http_url, one_line_errors

PROMPT = "The history of the city begins"
HANG_SECONDS = 120.0
TOLD_SECONDS = 1.0  # how soon a refusal must come
REFUSED = ("status 429", "status 503")


@dataclass
class Tally:
    """What came of a case's requests, and what else is worth a line."""

    tried: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, answers: list[Answer], expected: str, *, cut_allowed: bool) -> None:
        for answer in answers:
            self.tried += 1
            told = any(status in answer.error for status in REFUSED) or (
                cut_allowed and "no end within" not in answer.error
            )
            if (answer.error and not told) or (not answer.error and answer.text != expected):
                self.lost += 1
                if len(self.notes) < 3:
                    self.notes.append(
                        answer.error or f"a wrong or cut answer of {len(answer.text)} characters that looks whole"
                    )

    def must(self, holds: bool, note: str) -> None:
        """Something beside the requests."""
        self.notes.append(note if holds else f"NOT HELD: {note}")
        self.lost += not holds


@dataclass(frozen=True)
class SecondDoor:
    """`gpt-fast serve`: of it, what floods ask an Instance for."""

    root: str

    def token(self, kind: str) -> str:
        return os.environ.get("GPT_FAST_API_KEY", "")

    def active_requests(self) -> float:
        return requests_in_flight(fetch(f"{self.root}/metrics", self.token("metrics"), 5.0)) or 0.0

    def workers_running(self) -> list[psutil.Process]:
        port = urlsplit(self.root).port
        listen = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        return [psutil.Process(c.pid) for c in listen if c.pid]


class Target:
    """What is served, by either door, and what its prompts are answered with. instance: with TorchServe only."""

    def __init__(self, door: Instance | SecondDoor, *, quick: bool, minutes: float) -> None:
        self.door, self.quick, self.minutes = door, quick, minutes
        self.url = (
            f"{door.root if isinstance(door, SecondDoor) else door.url('inference_address')}/predictions/gpt-fast"
        )
        self.expected: dict[int, str] = {}

    @property
    def instance(self) -> Instance:
        if isinstance(self.door, SecondDoor):
            raise RuntimeError("--url: nothing starts this door anew (got a fault, allowed floods: see --help)")
        return self.door

    @property
    def token(self) -> str:
        return self.door.token("inference") or ""

    async def ask(self, tokens: int, *, timeout: float = HANG_SECONDS) -> Answer:
        return await ask(self.url, NativeApi(), PROMPT, tokens, token=self.token, timeout=timeout)

    async def oracle(self, tokens: int) -> str:
        if tokens not in self.expected:
            answer = await self.ask(tokens)
            if answer.error:
                raise RuntimeError(f"alone, before any fault: {answer.error}")
            self.expected[tokens] = answer.text
        return self.expected[tokens]

    async def seconds_until_served(self) -> float:
        begin = time.monotonic()
        while time.monotonic() - begin < HANG_SECONDS:
            with suppress(OSError, ValueError):  # its key file is being written
                if not (await self.ask(4, timeout=30)).error:
                    break
            await asyncio.sleep(0.1)
        return time.monotonic() - begin


def workers(target: Target) -> list[psutil.Process]:
    return target.door.workers_running()


def frontend(target: Target) -> list[psutil.Process]:
    process = target.instance.frontend()
    return [process] if process else []


def fault(
    victims: Callable[[Target], list[psutil.Process]], sent: signal.Signals, times: int
) -> Callable[[Target], Awaitable[Tally]]:
    """A signal amid eight streams: each is told, and the server comes back by itself."""

    async def case(target: Target) -> Tally:
        tally, expected, back = Tally(), await target.oracle(300), []
        for _ in range(min(times, 2) if target.quick else times):
            streams = [asyncio.create_task(target.ask(300)) for _ in range(8)]
            await asyncio.sleep(0.7)
            for process in victims(target):
                process.send_signal(sent)
            begin = time.monotonic()
            await target.seconds_until_served()
            back.append(time.monotonic() - begin)
            tally.count(list(await asyncio.gather(*streams)), expected, cut_allowed=True)
        tally.must(max(back) < HANG_SECONDS, f"served again after {min(back):.1f} to {max(back):.1f} s")
        return tally

    return case


async def describe(target: Target) -> Tally:
    """TorchServe's own describe job, which blocks its queue for ever."""
    tally, url = Tally(), f"{target.instance.url('management_address')}/models/gpt-fast?customized=true"
    old = frontend(target)
    await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=20).read())
    begin = time.monotonic()
    while frontend(target) in ([], old) and time.monotonic() - begin < HANG_SECONDS:
        await asyncio.sleep(0.1)
    await target.seconds_until_served()
    tally.must(frontend(target) != old, f"served again after {time.monotonic() - begin:.1f} s")
    return tally


async def flood(target: Target) -> Tally:
    """200 requests at once."""
    tally, expected = Tally(), await target.oracle(32)
    answers = await asyncio.gather(*(target.ask(32) for _ in range(200)))
    tally.count(list(answers), expected, cut_allowed=False)
    refused = [a.ended - a.started for a in answers if a.error]
    tally.notes.append(f"{len(refused)} refused, the last after {max(refused, default=0):.2f} s")
    return tally


async def rate(target: Target, streams: int, seconds: float, tokens: int) -> tuple[float, list[Answer]]:
    """Whole answers' tokens/s of a closed loop, and all answers. Who is refused asks again after a second, as told."""
    begin, answers = time.monotonic(), []

    async def client() -> None:
        while time.monotonic() - begin < seconds:
            answers.append(await target.ask(tokens))
            if answers[-1].error:
                await asyncio.sleep(1)

    await asyncio.gather(*(client() for _ in range(streams)))
    return tokens * sum(not a.error for a in answers) / (time.monotonic() - begin), answers


async def overload(target: Target) -> Tally:
    """Four times as many clients as slots and places, against the throughput of as many clients as slots."""
    tally, tokens, expected = Tally(), 32, await target.oracle(32)
    seconds = 15.0 if target.quick else 300.0
    peak, _ = await rate(target, 16, 10.0, tokens)
    loaded, answers = await rate(target, 160, seconds, tokens)
    tally.count(answers, expected, cut_allowed=False)
    late = sum(bool(a.error) and a.ended - a.started > TOLD_SECONDS for a in answers)
    refused = sum(bool(a.error) for a in answers)
    tally.notes.append(f"{refused} refused, {late} of them after more than {TOLD_SECONDS:g} s")
    tally.must(loaded >= 0.8 * peak, f"{loaded:.0f} tokens/s of {peak:.0f}")
    back = await target.seconds_until_served()
    tally.must(back < 5, f"normal {back:.1f} s later")
    return tally


async def drop(target: Target) -> Tally:
    """1,000 clients that connect, ask and leave at once, while one stream runs."""
    tally, expected = Tally(), await target.oracle(300)
    stream = asyncio.create_task(target.ask(300))

    async def leave() -> None:
        with suppress(TimeoutError, OSError, EOFError):
            async with asyncio.timeout(0.05):
                async for _ in post(target.url, NativeApi().body(PROMPT, 300), target.token):
                    return

    for _ in range(20):
        await asyncio.gather(*(leave() for _ in range(50)))
    tally.count([await stream], expected, cut_allowed=False)
    begin = time.monotonic()
    while target.door.active_requests() and time.monotonic() - begin < 30:
        await asyncio.sleep(0.1)
    tally.must(not target.door.active_requests(), f"slots free {time.monotonic() - begin:.1f} s after 1,000 left")
    tally.count([await target.ask(300)], expected, cut_allowed=False)
    return tally


async def slow(target: Target) -> Tally:
    """Eight clients that read one piece a second, beside one that reads as fast as it can."""
    tally, expected = Tally(), await target.oracle(300)

    async def dawdle() -> None:
        async for _ in post(target.url, NativeApi().body(PROMPT, 1000), target.token):
            await asyncio.sleep(1)

    dawdlers = [asyncio.create_task(dawdle()) for _ in range(8)]
    await asyncio.sleep(1)
    tally.count([await target.ask(300) for _ in range(3)], expected, cut_allowed=False)
    for each in dawdlers:
        each.cancel()
    await asyncio.gather(*dawdlers, return_exceptions=True)
    return tally


async def soak(target: Target) -> Tally:
    """16 streams for some minutes: every answer whole, and the memory of the worker does not grow."""
    tally, expected = Tally(), await target.oracle(64)
    await rate(target, 16, 20.0, 64)
    before = sum(p.memory_info().rss for p in workers(target))
    speed, answers = await rate(target, 16, 60 * target.minutes, 64)
    grown = (sum(p.memory_info().rss for p in workers(target)) - before) / 2**20
    tally.count(answers, expected, cut_allowed=False)
    tally.must(grown <= 20, f"{grown:+.1f} MB, {speed:.0f} tokens/s over {target.minutes:g} minutes")
    return tally


CASES: dict[str, Callable[[Target], Awaitable[Tally]]] = {
    "kill-worker": fault(workers, signal.SIGKILL, 10),
    "stop-worker": fault(workers, signal.SIGSTOP, 2),
    "kill-torchserve": fault(frontend, signal.SIGKILL, 2),
    "stop-torchserve": fault(frontend, signal.SIGSTOP, 2),
    "describe": describe,
    "flood": flood,
    "overload": overload,
    "drop": drop,
    "slow-readers": slow,
    "soak": soak,
}


FLOODS = ("flood", "overload", "drop", "slow-readers", "soak")


async def run(target: Target, names: list[str]) -> int:
    print(f"{'case':<16} {'tried':>6} {'survived':>8} {'lost':>5}")
    lost = 0
    for name in names:
        tally = await CASES[name](target)
        lost += tally.lost
        figures = f"{tally.tried:6d} {max(tally.tried - tally.lost, 0):8d} {tally.lost:5d}"
        print(f"{name:<16} {figures}  {'; '.join(tally.notes)}", flush=True)
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=ROOT / ".run", help="of the instance")
    parser.add_argument("--only", nargs="+", choices=CASES, help="default: all but the soak")
    parser.add_argument("--quick", action="store_true", help="fewer kills, a shorter overload")
    parser.add_argument("--minutes", type=at_least(1), default=30, help="of the soak")
    parser.add_argument("--url", type=http_url, help="of the door without TorchServe; then floods only")
    args = parser.parse_args()
    names = args.only or [name for name in (FLOODS if args.url else CASES) if name != "soak"]
    with one_line_errors("chaos", also=(RuntimeError,)):
        target = Target(chosen_door(args), quick=args.quick, minutes=args.minutes)
        print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        return int(asyncio.run(run(target, names)) > 0)


def chosen_door(args: argparse.Namespace) -> Instance | SecondDoor:
    if args.url:
        return SecondDoor(args.url.rstrip("/"))
    instance = Instance(args.run_dir.resolve())
    if not instance.watcher():
        raise ValueError(f"nothing is served and watched in {instance.run_dir}; start it with: make serve")
    return instance


if __name__ == "__main__":
    sys.exit(main())
