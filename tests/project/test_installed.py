"""The wheel, built and installed into a virtual environment of its own, used outside the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from support.paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.model]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class Installed(NamedTuple):
    """gpt-fast as it was installed, an empty folder and an environment to run it in."""

    program: Path
    folder: Path
    environ: dict[str, str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """What it depends on comes from this environment, torch above all, through a path that brings no editable install
    along."""
    home = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(home / "dist"), str(source(home / "src"))]
    subprocess.run([*pip, *build], check=True, capture_output=True, timeout=300)
    (wheel,) = (home / "dist").iterdir()
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    options = ["install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, "--python", str(python), *options], check=True, capture_output=True, timeout=300)
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (home / "empty").mkdir()
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"  # torch-model-archiver's program

    return Installed(home / "venv" / "bin" / "gpt-fast", home / "empty", environ)


@pytest.fixture(scope="module")
def run(installed: Installed) -> Run:
    def run(*words: object, typed: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(installed.program), *map(str, words)]
        place = {"cwd": installed.folder, "env": installed.environ}
        return subprocess.run(command, **place, input=typed, capture_output=True, text=True, timeout=300)

    return run


def source(folder: Path) -> Path:
    """The files that git knows, as they are now."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (name.startswith(("gpt_fast/", "deploy/")) or "/" not in name) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_help_archive_and_doctor_need_no_checkout(run: Run, default_checkpoint: Path) -> None:
    assert "commands:" in run("--help").stdout
    archived = run("archive", "--model", default_checkpoint)
    assert archived.returncode == 0 and "built" in archived.stdout, archived.stderr
    assert "/installed" in archived.stdout and "model_store/gpt-fast.tar.gz" in archived.stdout
    asked = run("doctor", "--model", default_checkpoint)
    assert "doctor: Java" in asked.stdout and "Traceback" not in asked.stderr, asked.stderr


def test_generate_and_a_chat_turn(run: Run, default_checkpoint: Path) -> None:
    brief = ["--temperature", 0, "--max_new_tokens", 24, "--max_seq_len", 256]
    said = run("generate", "--checkpoint_path", default_checkpoint, "--num_samples", 1, *brief,
               "--prompt", "The capital of France is")  # fmt: skip
    assert "The capital of France is Paris" in said.stdout, said.stderr
    assert "takes model_int4.g32.safetensors (its GGUF's own values)" in said.stderr
    source = default_checkpoint / "model.safetensors"  # of the file that is served, rounding decides the words
    talk = run("chat", "--checkpoint_path", source, *brief, typed="What is the capital of France?\n/exit\n")
    assert talk.returncode == 0 and "> The capital of France is Paris." in talk.stdout, talk.stderr


@pytest.mark.server
def test_serve_answers_a_chat_and_stops(installed: Installed, default_checkpoint: Path) -> None:
    source = default_checkpoint / "model.safetensors"  # as above
    flags = ["--port", "0", "--max_num_seqs", "2", "--max_seq_len", "512"]
    command = [str(installed.program), "serve", "--checkpoint_path", str(source), *flags]
    place = {"cwd": installed.folder, "env": installed.environ}
    process = subprocess.Popen(command, **place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        assert process.stderr is not None
        told: list[str] = []
        for line in process.stderr:  # it ends with the process
            told.append(line)
            if line.startswith("ready: "):
                break
        (url,) = re.findall(r"^ready: (http\S+)/v1 ", told[-1]) or pytest.fail("".join(told))
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 24}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body | {"temperature": 0}).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert "Paris" in json.load(answer)["choices"][0]["message"]["content"]
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
