"""What a test starts ends with its pytest: a child pytest starts programs, is ended, and none of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import ROOT
from support.reaper import PREFIX, marked
from support.waiting import HANG_SECONDS, wait_until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

PROGRAMS = """
import subprocess, sys, time

def test_programs_in_sessions_of_their_own_and_one_that_starts_another():
    code = "import subprocess; subprocess.run(['sleep', '600'])"
    subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    subprocess.Popen(["sleep", "601"])
    time.sleep(600)
"""
SERVER = """
import time
from support.server import shared_server

def test_a_server():
    shared_server()
    time.sleep(600)
"""


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:  # it has just ended
        return ""


def check_that_nothing_is_left(folder: Path, test: str, programs: list[str], signal_number: int) -> None:
    """Run `test` in a child pytest until every one of `programs` runs, end the child, and see them all go."""
    (folder / "test_child.py").write_text(test)
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", str(ROOT / "pyproject.toml")]
    child = subprocess.Popen(
        [*pytest_here, "test_child.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
        stdout=subprocess.DEVNULL,
    )
    mark = f"{PREFIX}{child.pid}_"

    def all_run() -> bool:
        assert child.poll() is None
        shown = " ".join(map(command, marked(mark)))
        return all(program in shown for program in programs)

    try:
        wait_until(all_run)
    finally:
        child.send_signal(signal_number)
        child.wait(timeout=HANG_SECONDS)
    wait_until(lambda: not list(marked(mark)))


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_no_program_outlives_its_pytest(tmp_path, signal_number):
    check_that_nothing_is_left(tmp_path, PROGRAMS, ["sleep 600", "sleep 601"], signal_number)


@pytest.mark.server
@pytest.mark.model
def test_no_server_outlives_a_pytest_that_is_killed(tmp_path):
    programs = ["org.pytorch.serve.ModelServer", "model_service_worker.py"]
    check_that_nothing_is_left(tmp_path, SERVER, programs, signal.SIGKILL)
