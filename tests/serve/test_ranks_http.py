"""One model on two ranks behind a real TorchServe: the same answers, and all starts anew when a rank is gone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from gpt_fast.config import SamplingParams
from gpt_fast.llm import Engine
from support.manifest import list_files
from support.quantized import random_model, small_config, write_checkpoint
from support.server import new_server

pytestmark = pytest.mark.server

GONE = 30  # seconds, after a rank died or stopped, until none is left of its group


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(small_config(vocab_size=258, max_position=1024, head_dim=32, intermediate_size=192))
    directory = write_checkpoint(tmp_path_factory.mktemp("ranks"), model, tokenizer=True)
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": template}))
    list_files(directory)
    return directory


@pytest.fixture(scope="module")
def server(checkpoint):
    server = new_server()
    try:
        keys = {"parallelType": "tp", "torchrun": {"nproc-per-node": 2}}
        server.start(keys=keys, checkpoint_path=str(checkpoint), dtype="float32", speculate="ngram", max_num_seqs=4)
        yield server
    finally:
        server.stop()
        assert not any(map(psutil.Process.is_running, server.instance.processes()))


def ranks_of(server) -> dict[int, psutil.Process]:
    """The model's processes by rank."""
    found = {}
    for process in server.instance.processes():
        try:
            if "LOCAL_RANK" in (environ := process.environ()):
                found[int(environ["LOCAL_RANK"])] = process
        except psutil.NoSuchProcess:
            continue
    return found


def body(prompt: str, count: int, **options: object) -> dict:
    return {"prompt": prompt, "max_new_tokens": count, "ignore_eos": True, "temperature": 0, **options}


def test_eight_clients_get_what_one_process_says(server, checkpoint, one_torch_thread):
    prompts = ["one two three, " * n + str(n) for n in range(1, 9)]
    engine = Engine.load(checkpoint, dtype="float32", device="cpu", max_seq_len=1024)
    params = [SamplingParams(max_new_tokens=64, ignore_eos=True)] * 8
    expected = [answer.text for answer in engine.generate(prompts, params)]
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda prompt: server.call(body(prompt, 64)).text, prompts))
    assert found == expected
    choice = server.call({"model": "gpt-fast", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5,
                          "logprobs": True, "seed": 1}, "/1.0/v1/chat/completions").json["choices"][0]  # fmt: skip
    assert len(choice["logprobs"]["content"]) == 5
    assert len(ranks_of(server)) == 2


def test_a_client_that_left_is_noticed(server):
    connection = server.connect(body("one two", 900, stream=True))
    assert connection.getresponse().read(1)
    server.wait_for(lambda figures: figures["num_requests_running"] == 1, seconds=20)
    connection.close()
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=20)


@pytest.mark.parametrize(("rank", "sent"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_rank_that_is_gone_ends_all_and_all_starts_anew(server, rank, sent):
    lose_a_rank(server, rank, sent)


def lose_a_rank(server, rank: int, sent: signal.Signals) -> dict[str, float]:
    """Signal a rank amid a stream: the seconds until its client knew, its group was gone, the next answer came."""
    if watcher := server.instance.watcher():
        watcher.kill()  # the ranks are to notice it by themselves
    before, shared = ranks_of(server), set(os.listdir("/dev/shm"))
    connection = server.connect(body("one two", 1000, stream=True))
    response = connection.getresponse()
    received, whole = response.read(1), False
    started = time.monotonic()
    before[rank].send_signal(sent)
    try:
        while piece := response.read1(1 << 16):
            received += piece
        whole = True  # a small model may have said all before the signal came
    except (http.client.HTTPException, OSError):
        pass
    cut = time.monotonic() - started
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in before.values()):
        assert time.monotonic() - started < GONE, "ranks are left"
        time.sleep(0.1)
    gone = time.monotonic() - started
    answer = server.call(body("one two", 5))
    while answer.status != 200:
        assert time.monotonic() - started < 8 * GONE, answer.text
        time.sleep(0.5)
        answer = server.call(body("one two", 5))
    after = ranks_of(server)
    assert len(after) == 2 and not {p.pid for p in after.values()} & {p.pid for p in before.values()}
    assert set(os.listdir("/dev/shm")) <= shared
    if whole:
        expected = server.call(body("one two", 1000)).text
        assert received.decode() == expected, "a stream that was cut came to a regular end"
    return {"cut": cut, "gone": gone, "served": time.monotonic() - started}
