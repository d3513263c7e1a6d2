"""gpt-fast pull, from a Hugging Face cache and without a network: fetched, converted and quantized once."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_fast.load.checkpoint import load_checkpoint
from support.paths import ROOT
from support.tiny_models import save, tokenizer_json

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_repository(home: Path, source: Path) -> Path:
    """Files as huggingface_hub keeps them: blobs by hash, a commit's snapshot of links to them, refs/main."""
    repo = home / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for path in source.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def pull(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """In a folder of checkpoints of its own, as an installed package has it, without a network."""
    environ = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "GPT_FAST_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "gpt_fast", "pull", *words]
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)


def test_what_the_cache_holds_is_pulled_without_a_network_and_once(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "source", max_shard_size="60KB")
    (tmp_path / "source" / "tokenizer.json").write_bytes(tokenizer_json())
    snapshot = cache_repository(tmp_path / "home", tmp_path / "source")
    before = sorted(path.name for path in snapshot.iterdir())
    done = pull(tmp_path, "org/tiny:int8", "--out_dir", "made")
    assert done.returncode == 0, done.stderr
    assert f"in {snapshot}" in done.stdout and " in made" in done.stdout and "serves:     model_int8" in done.stdout
    made = tmp_path / "made"
    assert load_checkpoint(made / "model_int8.safetensors", device="cpu").quantization is not None
    times = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    again = pull(tmp_path, "org/tiny:int8", "--out_dir", "made")
    assert again.returncode == 0 and again.stdout == done.stdout and again.stderr == ""
    assert times == {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert before == sorted(path.name for path in snapshot.iterdir())  # the Hub's cache is nobody else's to write


def test_what_cannot_be_had_is_one_line_at_once(tmp_path: Path) -> None:
    cases = {
        "org/none": "pull: org/none: is not in the cache",
        "no:name": "pull: no:name: is no path on this machine and no name of the Hub",
        f"{tmp_path}:Q4_0": "pull: ",
    }
    for name, told in cases.items():
        done = pull(tmp_path, name)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith(told)
