"""Without a network, commands that ask the Hub say so at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt_fast.cli.hub import OFFLINE, why_unreachable
from support.paths import ROOT


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*OFFLINE, "HF_ENDPOINT", *(name for name in os.environ if name.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_what_listens_is_reached_through_the_proxy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", f"http://{address}")
        assert why_unreachable() is None
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port()}")
        monkeypatch.setenv("http_proxy", address)
        assert why_unreachable() is None
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "cannot be reached" in str(why_unreachable())


def test_what_does_not_listen_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert why_unreachable() == f"{address} cannot be reached (Connection refused)"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:port")
    assert "cannot be reached" in str(why_unreachable())


def test_a_silent_resolver_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def resolve(*args: object, **options: object) -> None:
        released.wait()
        raise OSError("too late")

    monkeypatch.setattr("socket.create_connection", resolve)
    assert why_unreachable(0.01) == "https://huggingface.co cannot be reached (no answer within 0.01 s)"
    released.set()


@pytest.mark.parametrize("name", OFFLINE)
def test_the_users_own_switch_is_an_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert why_unreachable(switches=OFFLINE) == f"{name} is set"


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_a_download_without_a_network_is_one_line(offline: bool, tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{closed_port()}"
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": address,
        **({"HF_HUB_OFFLINE": "1"} if offline else {}),
    }
    command = [sys.executable, str(ROOT / "scripts" / "download.py"), "--repo_id", "a/b", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    reason = "HF_HUB_OFFLINE is set" if offline else f"{address} cannot be reached (Connection refused)"
    assert (done.returncode, done.stderr) == (2, f"download: a/b: {reason}\n")
