"""What the management port can do to a server that answers: a second worker, and the description that blocks it."""

import concurrent.futures
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from support.paths import ROOT
from support.server import Response, Server, new_server
from support.waiting import wait_until

sys.path.insert(0, str(ROOT / "scripts"))

from watch import STALL_SECONDS

pytestmark = [pytest.mark.server, pytest.mark.model]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = new_server()
    try:
        made.start(max_num_seqs=4, max_seq_len=512)
        yield made
    finally:
        made.stop()


def manage(server: Server, path: str, method: str = "GET") -> tuple[int, str]:
    url = f"http://127.0.0.1:{server.ports[1]}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def watch_lines(server: Server) -> list[str]:
    return (server.instance.logs / "watch.log").read_text().splitlines()


def test_a_busy_server_is_left_alone_by_the_watch(server: Server) -> None:
    """All slots and places taken for longer than the watch waits, with prompts as long as can be."""
    pids = set(server.instance.usage().workers)
    body = {"prompt": "word " * 300, "max_new_tokens": 60, "ignore_eos": True, "stream": False}
    statuses: list[int] = []

    def call_again_and_again(client: int) -> None:
        began = time.monotonic()
        while time.monotonic() - began < STALL_SECONDS + 2:
            statuses.append(server.call(body | {"seed": client}).status)

    with concurrent.futures.ThreadPoolExecutor(60) as clients:
        list(clients.map(call_again_and_again, range(60)))
    assert {200, 429} == set(statuses)
    assert pids and pids <= set(server.instance.usage().workers) and watch_lines(server) == []


def test_a_second_worker_is_refused_and_every_request_answered(server: Server) -> None:
    body = {"prompt": "The capital of France is", "max_new_tokens": 20, "temperature": 0, "stream": False}

    def call(_: int) -> Response:
        return server.call(body)

    expected = call(0).text
    (worker,) = server.instance.workers()
    manage(server, "/models/gpt-fast?min_worker=2", "PUT")
    answers = []

    def refusals() -> list[str]:
        return [line for line in server.instance.worker_lines() if "min_worker: one worker holds" in line]

    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        # TorchServe tries to start it again and again.
        wait_until(lambda: len(refusals()) > 2, meanwhile=lambda: answers.extend(clients.map(call, range(4))))
    assert {(answer.status, answer.text) for answer in answers} == {(200, expected)}
    still = [w for w in server.instance.workers() if w["status"] == "READY"]
    assert [w["pid"] for w in still] == [worker["pid"]]
    assert json.loads(manage(server, "/models/gpt-fast")[1])[0]["workers"]


def test_a_description_is_answered_and_what_it_blocks_is_started_anew(server: Server) -> None:
    """TorchServe 0.12 serves nothing after it."""
    old = server.instance.frontend()
    status, text = manage(server, "/models/gpt-fast?customized=true")
    assert status == 200 and json.loads(text)[0]["customizedMetadata"]["path"]
    wait_until(lambda: watch_lines(server))
    (line,) = watch_lines(server)
    assert "TorchServe has ended: started anew, ready after" in line
    assert old is not None and server.instance.frontend() not in (None, old)
    said = (server.instance.logs / "model_log.last.log").read_text()
    assert said.count("blocked by a describe job") == 1
    assert server.call({"prompt": "The capital of France", "max_new_tokens": 5}).text.startswith(" is Paris")
