"""What the management port can do to a server that answers: a second worker, and the description that blocks it."""

import concurrent.futures
import json
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from support.server import Response, Server, new_server
from support.waiting import wait_until

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


def test_a_description_is_answered_and_what_it_leaves_behind_is_not_called_ready(server: Server) -> None:
    """TorchServe 0.12 serves nothing after it: better it ends, and whoever keeps it running starts it anew."""
    status, text = manage(server, "/models/gpt-fast?customized=true")
    assert status == 200 and json.loads(text)[0]["customizedMetadata"]["path"]
    wait_until(lambda: server.instance.frontend() is None)
    said = [line for line in server.instance.worker_lines() if "blocked by a describe job" in line]
    assert len(said) == 1
