"""The load generator: nothing lost, nothing mixed up, and it notices when a server does either."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys

import pytest

from gpt_fast.bench.client import Answer, Arrival, NativeApi, OpenAIApi, ask
from gpt_fast.bench.closed_loop import Load, Outcome, check, metrics, run, spread
from support.paths import ROOT
from support.round_server import RoundServer


def answer(text: str, *, started: float = 0.0, ttft: float = 0.1, gap: float = 0.05, error: str = "") -> Answer:
    """One letter a piece."""
    arrivals = tuple(Arrival(started + ttft + gap * i, letter) for i, letter in enumerate(text))
    return Answer(started, started + ttft + gap * len(text), arrivals, error)


def load(**changes) -> Load:
    return Load(**({"url": "", "api": NativeApi(), "streams": 2, "new_tokens": 5} | changes))


# -------------------------------------------------------------------------------------------- figures


def test_answers_that_are_lost_wrong_or_anothers_are_told_apart():
    oracle = {(1,): "abc", (2,): "xyz"}
    outcomes = [
        Outcome((1,), answer("abc")),
        Outcome((2,), answer("abc")),
        Outcome((2,), answer("xy")),
        Outcome((1,), answer("", error="status 500: no")),
    ]
    found = check(outcomes, oracle)
    assert (found["failed"], found["mismatched"], found["mixed_up"]) == (1, 2, 1)
    assert found["first_problem"] == "status 500: no"
    assert check(outcomes[:1], oracle)["first_problem"] is None
    assert check(outcomes[:2], oracle)["first_problem"] == "got 'abc', alone it was 'xyz'"


def test_metrics_have_vllms_names_and_leave_out_what_failed():
    outcomes = [
        Outcome((1, 2), answer("abcde", ttft=0.1)),
        Outcome((3, 4), answer("abcde", ttft=0.3)),
        Outcome((5, 6), answer("ab", error="cut")),
    ]
    found = metrics(outcomes, load(), duration=2.0)
    assert (found["completed"], found["total_input_tokens"], found["total_output_tokens"]) == (2, 4, 10)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (1, 5, 7)
    assert found["mean_ttft_ms"] == found["median_ttft_ms"] == pytest.approx(200)
    assert found["p99_ttft_ms"] == pytest.approx(298) and found["std_ttft_ms"] == pytest.approx(100)
    assert [found["mean_tpot_ms"], found["p99_itl_ms"]] == pytest.approx([50, 50])
    assert found["median_e2el_ms"] == pytest.approx(450)
    assert set(spread("ttft", [])) <= set(found) and set(spread("ttft", []).values()) == {None}


# --------------------------------------------------------------------------------------------- client


async def against(reply: bytes, api=None, **options) -> Answer:
    """Ask a server that answers with these bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        if b"wait" not in reply:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        return await ask(f"http://127.0.0.1:{port}/x", api or NativeApi(), [1], 4, **options)


def chunked(*pieces: str, end: bool = True) -> bytes:
    body = b"".join(f"{len(p.encode()):x}\r\n{p}\r\n".encode() for p in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + (b"0\r\n\r\n" if end else b"")


def event(text: str) -> str:
    return f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"


@pytest.mark.parametrize(
    ("reply", "api", "text"),
    [
        (chunked("he", "llo é"), NativeApi(), "hello é"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", NativeApi(), "abc"),
        (b"HTTP/1.0 200 OK\r\n\r\nabc", NativeApi(), "abc"),
        (chunked(event("a") + event("b")[:9], event("b")[9:], "data: [DONE]\n\n"), OpenAIApi("m"), "ab"),
    ],
)
def test_whole_answers(reply, api, text):
    got = asyncio.run(against(reply, api))
    assert (got.text, got.error) == (text, "")
    assert got.started <= got.arrivals[0].at <= got.arrivals[-1].at <= got.ended


@pytest.mark.parametrize(
    ("reply", "api", "error"),
    [
        (chunked("hello", end=False), NativeApi(), "IncompleteReadError"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", NativeApi(), "IncompleteReadError"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", NativeApi(), "status 503: busy"),
        (chunked(event("a")), OpenAIApi(), "ended without [DONE]"),
        (chunked("data: {\n\n"), OpenAIApi(), "JSONDecodeError"),
        (chunked(), NativeApi(), "an empty answer"),
        (b'HTTP/1.1 400 Bad\r\n\r\n{\n "a": 1\n}', NativeApi(), 'status 400: { "a": 1 }'),
        (b"", NativeApi(), "IncompleteReadError"),
        (chunked("wait", end=False), NativeApi(), "no end within 0.2 s"),
    ],
)
def test_anything_less_is_an_error_of_one_line(reply, api, error):
    got = asyncio.run(against(reply, api, timeout=0.2 if b"wait" in reply else 10))
    assert error in got.error and "\n" not in got.error


def test_nobody_listens():
    got = asyncio.run(ask("http://127.0.0.1:9/x", NativeApi(), [1], 4))
    assert got.error and not got.arrivals


# ------------------------------------------------------------------------------------------- the loop


def test_as_many_requests_in_flight_as_streams_and_every_prompt_asked():
    """A server that answers when as many requests have arrived as there are streams."""

    async def scenario():
        waiting, most, arrived = asyncio.Barrier(3), 0, itertools.count(1)
        in_flight = 0

        async def serve(reader, writer):
            nonlocal in_flight, most
            next(arrived)
            in_flight += 1
            most = max(most, in_flight)
            await reader.readuntil(b"\r\n\r\n")
            await waiting.wait()
            in_flight -= 1
            writer.write(chunked("abc"))
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            outcomes, duration = await run(load(url=url, streams=3, requests=9), [(1,), (2,), (3,), (4,)])
        return outcomes, duration, most

    outcomes, duration, most = asyncio.run(asyncio.wait_for(scenario(), 20))
    assert most == 3 and len(outcomes) == 9 and duration > 0
    assert sorted(o.prompt[0] for o in outcomes) == [1, 1, 1, 2, 2, 3, 3, 4, 4]
    assert all(o.answer.text == "abc" and not o.answer.error for o in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("api", ["native", "openai"])
def test_the_script_against_the_real_rounds(api, tmp_path):
    with RoundServer() as server:
        url = server.url if api == "native" else f"{server.url}/v1/completions"
        load = "--streams 1 6 --requests 24 --prompts 6 --prompt_len 8 --max_new_tokens 20 --vocabulary 200"
        arguments = ["--url", url, "--api", api, *load.split(), "--out", str(tmp_path / "r.json")]
        done = subprocess.run(
            [sys.executable, "scripts/loadgen.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "r.json").read_text())
    assert [r["max_concurrency"] for r in result["runs"]] == [1, 6]
    for figures in result["runs"]:
        assert (figures["completed"], figures["total_output_tokens"]) == (24, 480)
        assert (figures["failed"], figures["mismatched"], figures["mixed_up"]) == (0, 0, 0)
        assert figures["distinct_answers"] > 3
        assert 0 < figures["median_ttft_ms"] <= figures["median_e2el_ms"]
        assert figures["median_tpot_ms"] > 0
        assert figures["foreign_load"] is None or 0 <= figures["foreign_load"] <= 1


@pytest.mark.slow
def test_peers_are_loaded_in_turn():
    with RoundServer() as server, RoundServer() as other:
        load = "--streams 1 2 --requests 4 --prompts 2 --prompt_len 8 --max_new_tokens 5 --vocabulary 200 --rounds 2"
        arguments = ["--url", server.url, "--peer", f"other={other.url}/v1/completions", *load.split()]
        done = subprocess.run(
            [sys.executable, "scripts/loadgen.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    order = [(run["max_concurrency"], run["server"]) for run in result["runs"]]
    assert order == [(n, name) for n in (1, 2) for name in ("gpt-fast", "other", "other", "gpt-fast")]
    assert {run["completed"] for run in result["runs"]} == {4} and "generator" in result["runs"][0]["cpu"]
    rates = [run["output_throughput"] for run in result["runs"]]
    assert [(r["streams"], r["peer"]) for r in result["ratios"]] == [(1, "other"), (2, "other")]
    assert result["ratios"][0]["output_throughput_ratio"]["rounds"] == [rates[0] / rates[1], rates[3] / rates[2]]


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["name", "=http://x", "name="])
def test_a_peer_without_name_or_url_is_refused(bad):
    done = subprocess.run(
        [sys.executable, "scripts/loadgen.py", "--url", "http://x", "--peer", bad],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and f"--peer: must be NAME=URL (got {bad!r})" in done.stderr


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line():
    arguments = ["--url", "http://127.0.0.1:9/x", "--streams", "1"]
    done = subprocess.run(
        [sys.executable, "scripts/loadgen.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error: http://127.0.0.1:9/x: alone, before the load:")
    assert len(done.stderr.splitlines()) == 1
