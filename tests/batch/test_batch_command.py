"""gpt-fast batch as a user runs it: killed at any time it goes on, and the answers are those of an unbroken run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpt_fast.batch.__main__ import main
from support.paths import ROOT
from support.waiting import wait_until

MODEL = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model_int4.g32.safetensors"
COUNT = 30


def write_input(folder: Path) -> Path:
    path = folder / "in.jsonl"
    lines = [{"prompt": f"Fact {i}:", "max_tokens": 40, "ignore_eos": True, "logprobs": 2} for i in range(COUNT - 1)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "oops\n")
    return path


def start(given: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gpt_fast", "batch", "--input", given, "--output", output]
    command += ["--checkpoint_path", MODEL, "--max_num_seqs", "4", "--max_seq_len", "256", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    options: dict[str, Any] = {"cwd": given.parent, "env": environ, "text": True, "start_new_session": True}
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, **options)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def wait_for_answers(output: Path, process: subprocess.Popen[str], count: int) -> None:
    journal = output.with_name(f"{output.name}.partial")
    wait_until(
        lambda: process.poll() is not None or (journal.exists() and journal.read_bytes().count(b"\n") > count),
        meanwhile=lambda: time.sleep(0.02),
    )
    assert process.poll() is None, "it ended before it was killed"


def children(process: subprocess.Popen[str]) -> list[int]:
    """Its workers: the resource tracker of multiprocessing loads no model."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_workers_and_the_whole_killed_and_begun_again_give_the_bytes_of_an_unbroken_run(tmp_path: Path) -> None:
    given, unbroken, broken = write_input(tmp_path), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    status, told = ended(start(given, unbroken))
    assert status == 1 and f"{COUNT} answers; 1 of them tell of an error" in told

    process = start(given, broken, "--workers", "2")
    try:
        wait_for_answers(broken, process, 2)
        os.kill(children(process)[0], signal.SIGKILL)
        wait_for_answers(broken, process, 12)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    assert not broken.exists()

    kept = broken.with_name("b.jsonl.partial").read_bytes()
    status, told = ended(start(given, broken))
    assert status == 1 and kept.count(b"\n") > 12
    assert broken.read_bytes() == unbroken.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "in.jsonl"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--input", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "in.jsonl: is there already; remove it, or name another"),
        (["--input", "in.jsonl", "--defaults", "3"], "argument --defaults: must be a JSON object (got '3')"),
        (["--input", "in.jsonl", "--workers", "0"], "argument --workers: must be a whole number"),
        (["--input", "in.jsonl", "--checkpoint_path", "nothing"], "nothing"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_input(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--output", "out.jsonl", "--checkpoint_path", str(MODEL), *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_without_pyarrow_parquet_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else find(name))
    with pytest.raises(SystemExit):
        main(["--input", str(tmp_path / "in.parquet"), "--output", "o.jsonl", "--checkpoint_path", str(MODEL)])
    assert "in.parquet: Parquet needs pyarrow (the extra `parquet` has it: pip install" in capsys.readouterr().err
