"""The README's commands, run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], *, cwd: Path = ROOT, typed: str = "") -> str:
    done = subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(start: str) -> list[str]:
    """Every command of the README's shell blocks that begins so, with its continued lines joined."""
    lines = "\n".join(text for kind, text in BLOCKS if kind == "").replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith(start)]


@pytest.mark.model
def test_the_library_example_streams_an_answer():
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    assert len(example.strip().splitlines()) <= 8
    assert run([sys.executable, "-c", example]).startswith(" Paris")


@pytest.mark.model
def test_generate_runs():
    for command in commands("python -m gpt_fast.generate"):
        short = ["--num_samples", "1", "--max_new_tokens", "4", "--max_seq_len", "256"]
        shown = run([sys.executable, *shlex.split(command)[1:], *short], typed="Hi!\n/exit\n")
        assert "Average tokens/sec" in shown or "Type a message" in shown


def test_make_knows_every_target():
    for command in commands("make "):
        target, *_ = shlex.split(command)[1:]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_scripts_exist():
    for script in re.findall(r"scripts/[\w.]+", README):
        assert (ROOT / script).is_file(), script


def test_linked_pages_exist():
    for page in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / page).is_file(), page


@pytest.mark.model
def test_the_archiver_line_makes_an_archive_with_the_package(tmp_path):
    """`make bundle` and the archiver's line; tests/test_serve_scripts.py serves what such lines make."""
    for name in ("handler.py", "model_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    run([sys.executable, str(ROOT / "scripts/archive.py"), "--bundle-only"])
    (tmp_path / "build").symlink_to(ROOT / "build")
    (line,) = commands("torch-model-archiver")
    run(shlex.split(line), cwd=tmp_path)
    names = run(["tar", "tzf", "gpt-fast.tar.gz"], cwd=tmp_path).splitlines()
    for name in ("handler.py", "model_config.yaml", "gpt_fast/engine.py", "gpt_fast/serve/chat.html"):
        assert f"gpt-fast/{name}" in names
