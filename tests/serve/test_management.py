"""What the management port can do to a server that answers: a second worker harms nobody."""

import concurrent.futures
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from support.server import Server, new_server

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


def test_a_second_worker_is_refused_and_every_request_answered(server: Server) -> None:
    body = {"prompt": "The capital of France is", "max_new_tokens": 20, "temperature": 0, "stream": False}
    expected = server.call(body).text
    (worker,) = server.instance.workers()
    manage(server, "/models/gpt-fast?min_worker=2", "PUT")
    end = time.monotonic() + 20  # TorchServe tries several times to start it
    answers = []
    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        while time.monotonic() < end:
            answers += clients.map(lambda _: server.call(body), range(4))
    assert {(answer.status, answer.text) for answer in answers} == {(200, expected)}
    lines = [line for line in server.instance.worker_lines() if "one worker holds the model" in line]
    assert any("min_worker: " in line for line in lines)
    still = [w for w in server.instance.workers() if w["status"] == "READY"]
    assert [w["pid"] for w in still] == [worker["pid"]]
    assert json.loads(manage(server, "/models/gpt-fast")[1])[0]["workers"]
