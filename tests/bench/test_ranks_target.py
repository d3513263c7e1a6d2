"""The bench's engine on ranks: real processes, that it starts and that end with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gpt_fast.bench.__main__ import main
from support.paths import ROOT
from support.quantized import random_model, small_config, write_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the ranks, which are programs of their own


def ranks_alive() -> list[int]:
    """Processes of this test's own that compute beside a rank 0."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text, environment = path.read_bytes(), (path.parent / "environ").read_bytes()
        except OSError:
            continue
        if b"gpt_fast.bench.ranks_target" in text and f"PYTEST_OWNER={os.getpid()}".encode() in environment:
            found.append(int(path.parent.name))
    return found


def test_the_engine_on_ranks_takes_turns_with_the_engine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTEST_OWNER", str(os.getpid()))
    model = random_model(small_config(vocab_size=258, n_head=6, n_kv_head=3, max_position=512))
    path = write_checkpoint(tmp_path, model, tokenizer=True)
    main(["--engine", "--tp", "2", "--checkpoint_path", str(path), "--device", "cpu", "--repeat", "1", "--starts", "0",
          "--max_new_tokens", "26", "--probe_gib", "0", "--foreign_limit", "1"])  # fmt: skip
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    case = result["cases"][0]["targets"]
    assert case.keys() == {"engine", "engine on 2 ranks"}
    assert all(figures["decode_tokens_per_s"] > 0 for figures in case.values())
    told = result["targets"]["engine on 2 ranks"]
    assert told["ranks"] == 2 and told["peak_rss_mb"] > 100
    assert not ranks_alive()


def test_what_ranks_refuse_is_said_without_traceback_and_leaves_no_process(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTEST_OWNER", str(os.getpid()))
    path = write_checkpoint(tmp_path, random_model(small_config(vocab_size=258, n_head=1, n_kv_head=1)), tokenizer=True)
    with pytest.raises(SystemExit) as ended:
        main(["--tp", "2", "--checkpoint_path", str(path), "--device", "cpu", "--probe_gib", "0", "--starts", "0"])
    said = [line for line in capfd.readouterr().err.splitlines() if "n_head" in line or "Traceback" in line]
    assert ended.value.code == 2
    assert set(said) == {"error: n_head: has none for some of 2 ranks (got 1, allowed 1 ranks at most)"}
    assert not ranks_alive()
