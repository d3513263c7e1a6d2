"""`python -m gpt_fast.serve` as a user runs it: readiness, official clients, TLS, draining, mistakes."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time

import psutil
import pytest

from gpt_fast.serve.__main__ import main
from gpt_fast.serve.asgi.uvicorn_server import listen
from support.paths import ROOT
from support.serve_process import ServeProcess
from support.waiting import wait_until

MODEL = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model_int4.g32.safetensors"
SMALL = ("--checkpoint_path", str(MODEL), "--max_num_seqs", "4", "--max_seq_len", "1024")
LONG = {"prompt": "Once upon a time", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}


def pause() -> None:
    time.sleep(0.05)


ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def start(tmp_path):
    begun = []

    def start_it(*flags: str, **options) -> ServeProcess:
        begun.append(ServeProcess(tmp_path, *SMALL, *flags, **options))
        return begun[-1]

    yield start_it
    for process in begun:
        process.end()


@pytest.mark.server
@pytest.mark.model
def test_from_the_first_connection_to_the_last(start):
    """One start for all of it: a start takes seconds."""
    server = start()
    wait_until(lambda: server.get("/health")[0], meanwhile=pause)
    status, told = server.get("/health")
    assert (status, json.loads(told)) in ((503, {"status": "loading"}), (200, {"status": "ok"}))
    server.ready()
    official_clients(server)
    figures = server.get("/metrics")[1]
    assert '\ngpt_fast_request_success_total{finished_reason="length",model_name="gpt-fast"} ' in figures
    assert "# HELP gpt_fast_time_to_first_token_seconds " in figures
    assert 'http_requests_total{handler="/v1/messages",method="POST",status="200"} 1.0' in figures
    drain(server)


def official_clients(server: ServeProcess) -> None:
    import anthropic
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["gpt-fast"]
        question = [{"role": "user", "content": "What is the capital of France?"}]
        asked = {"model": "gpt-fast", "messages": question, "max_tokens": 12, "temperature": 0}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
        assert whole and "".join(pieces) == whole
        answer = client.responses.create(model="gpt-fast", input=question, max_output_tokens=12, temperature=0)
        assert answer.output_text == whole
        with pytest.raises(openai.BadRequestError, match="top_p"):
            client.chat.completions.create(**asked, top_p=7)
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        message = client.messages.create(
            model="gpt-fast", messages=question, max_tokens=12, extra_body={"temperature": 0}
        )
        assert message.content[0].text == whole
        assert client.messages.count_tokens(model="gpt-fast", messages=question).input_tokens > 5


def drain(server: ServeProcess) -> None:
    """SIGTERM: what runs ends whole, what comes gets 503 and when to come again, then the process ends with 0."""
    running = server.stream(LONG)
    running.read(1)
    late = http.client.HTTPConnection("localhost", server.port, timeout=60)
    late.connect()
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/health")[0] != 200)
    late.request("POST", "/v1/completions", json.dumps(LONG).encode())
    refused = late.getresponse()
    assert (refused.status, refused.getheader("retry-after")) == (503, "1")
    assert json.loads(refused.read())["error"]["code"] == "draining"
    text = running.read().decode()
    assert text.endswith("data: [DONE]\n\n") and '"finish_reason": "length"' in text
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.server
@pytest.mark.model
def test_a_second_signal_cuts_what_runs_over_tls_with_a_key(start, tmp_path):
    certificate, key, keys = (tmp_path / name for name in ("cert.pem", "key.pem", "keys"))
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    keys.write_text("sk-0123456789\n")
    keys.chmod(0o600)
    tls = ssl.create_default_context(cafile=str(certificate))
    flags = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--api-key-file", str(keys)]
    server = start(*flags, tls=tls).ready()
    assert server.get("/v1/models")[0] == 401
    connection = http.client.HTTPSConnection("localhost", server.port, timeout=60, context=tls)
    headers = {"Authorization": "Bearer sk-0123456789"}
    connection.request("POST", "/v1/completions", json.dumps(LONG | {"max_tokens": 900}).encode(), headers)
    running = connection.getresponse()
    running.read(1)
    server.process.send_signal(signal.SIGINT)
    wait_until(lambda: server.get("/health")[0] == 503)
    server.process.send_signal(signal.SIGINT)
    assert '"server_error"' in running.read().decode()
    assert server.process.wait(30) == 0


FAILS = """
import sys
from pathlib import Path
from gpt_fast.llm import Engine
from gpt_fast.serve.__main__ import main
step = Engine.step
def fail(engine):
    if Path("fail").exists():
        raise RuntimeError("an illegal memory access")
    return step(engine)
Engine.step = fail
main(sys.argv[1:])
"""


@pytest.mark.server
@pytest.mark.model
def test_an_engine_that_fails_for_good_ends_the_server_with_status_1(start, tmp_path):
    server = start(program=("-c", FAILS)).ready()
    running = server.stream(LONG | {"max_tokens": 900})
    running.read(1)
    (tmp_path / "fail").touch()
    assert '"server_error"' in running.read().decode()
    assert server.process.wait(30) == 1
    assert (
        server.log.read_text()
        .rstrip()
        .endswith(
            "gpt-fast gives up, to be started again: the engine stopped: RuntimeError('an illegal memory access')"
        )
    )


@pytest.mark.nightly
@pytest.mark.server
@pytest.mark.model
def test_ranks_serve_one_model_and_end_together(start):
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "gpt_fast.serve")
    server = start(program=program).ready()
    told = server.stream(LONG | {"prompt": "The capital of France is", "max_tokens": 8}).read().decode()
    assert "Paris" in told and told.endswith("data: [DONE]\n\n")
    ranks = [p for p in psutil.Process(server.process.pid).children() if p.environ().get("LOCAL_RANK") == "1"]
    ranks[0].kill()
    assert server.process.wait(60) == 1
    assert server.get("/health")[0] == 0


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--checkpoint_path: is required"),
        (["--checkpoint_path", "nowhere", "--host", "0.0.0.0"], "--host: not a loopback address"),
        (["--checkpoint_path", "nowhere", "--cors-origin", "*"], "--cors-origin: "),
        (["--checkpoint_path", "nowhere", "--ssl-certfile", "nowhere.pem"], "No such file"),
        (["--checkpoint_path", "nowhere", "--ssl-keyfile", "key.pem"], "--ssl-keyfile: needs --ssl-certfile"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--config", str(ROOT / "configs/tensor-parallel-cpu.yaml")], "torchrun --standalone --nproc_per_node=2 -m"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT_FAST_API_KEY", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(flags)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and says in told and told.count("\n") == 1, told


@pytest.mark.slow
def test_what_is_no_checkpoint_is_told_after_the_port_is_open(tmp_path):
    command = [sys.executable, "-m", "gpt_fast.serve", "--port", "0", "--checkpoint_path", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRON, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "nowhere" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="--port: cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])
