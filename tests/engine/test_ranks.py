"""Rank 0 leads, the others follow: engines and commands on real torchrun ranks against one process, and their ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpt_fast import generate
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.engine import pulse
from gpt_fast.load.engine import load_share
from gpt_fast.model.parallel import Ranks
from support.manifest import list_files
from support.paths import SUPPORT
from support.quantized import random_model, small_config, write_checkpoint
from support.ranks import TIMEOUT, company, run_program, run_ranks, torchrun, two_agents
from support.server import free_ports

pytestmark = pytest.mark.slow  # starts torchrun's ranks

BYTES = {"vocab_size": 260, "max_position": 1024, "head_dim": 32, "intermediate_size": 192}


FLOATS = "model.safetensors"  # a directory means its smallest file, which rounds otherwise on ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(small_config(**BYTES, n_kv_head=4))
    directory = write_checkpoint(tmp_path_factory.mktemp("ranks"), model, tokenizer=True)
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": template}))
    list_files(directory)
    return directory


# ----------------------------------------------------------------------------------------- engines


def test_every_kind_of_request_is_answered_as_by_one_process(checkpoint, tmp_path, one_torch_thread):
    draft = quantize_checkpoint(checkpoint, mode="int8")
    asked = [
        {},
        {"speculate": "ngram"},
        {"draft_checkpoint_path": str(draft), "speculate": "auto", "speculate_k": 3, "kv_cache": "int8"},
    ]
    asked = [{"checkpoint_path": str(checkpoint), "max_seq_len": 256, **each} for each in asked]
    (tmp_path / "engines.json").write_text(json.dumps(asked))
    led = run_program(4, "engines", tmp_path)
    assert led[1:] == [[None] * 3] * 3
    for options, ours in zip(asked, led[0], strict=True):
        alone = company(None, **options)
        assert alone["answers"].keys() == ours["answers"].keys()
        for (text, tokens, logprobs), theirs in zip(ours["answers"].values(), alone["answers"].values(), strict=True):
            assert (text, tokens) == (theirs[0], theirs[1])
            for mine, other in zip(logprobs, theirs[2], strict=True):
                assert mine == pytest.approx(other, abs=1e-4)
        assert len(ours["answers"]["2"][1]) == 5 and len(ours["answers"]["0"][1]) == 24
        assert set(ours["answers"]["3"][1]) <= set(range(0, 260, 2)) and "e" not in ours["answers"]["5"][0]
        assert "tensor parallel" in ours["path"]
    assert led[0][0]["accepted"] is None and led[0][2]["accepted"] > 0


def test_steps_begun_before_they_are_planned_are_followed(tmp_path):
    (whole, led), followed = run_program(2, "steps_begun", tmp_path)
    assert led == whole and [len(tokens) for tokens in led] == [8, 13, 18, 23, 28, 33]
    assert len(followed) == 1  # the whole model's


def test_what_is_done_to_a_cache_is_done_on_every_rank(tmp_path):
    whole, led = (torch.tensor(logits) for logits in run_program(2, "cache_operations", tmp_path)[0])
    assert whole.isfinite().all() and len({tuple(row) for row in whole.view(9, -1).tolist()}) == 2  # filled, empty
    torch.testing.assert_close(led, whole, rtol=0, atol=1e-5)


@pytest.mark.model
def test_three_ranks_write_what_one_process_writes(default_checkpoint):
    flags = ["--checkpoint_path", str(default_checkpoint / FLOATS), "--batch_size", "4", "--num_samples", "1",
             "--seed", "3", "--max_new_tokens", "24", "--dtype", "float32", "--device", "cpu",
             "--top_k", "3"]  # fmt: skip
    done = run_ranks(3, "-m", "gpt_fast.generate", *flags)
    alone = subprocess.run([sys.executable, "-m", "gpt_fast.generate", *flags], capture_output=True, text=True)
    assert len(rows_of(done.stdout)) == 4 and rows_of(done.stdout) == rows_of(alone.stdout), done.stderr


# ---------------------------------------------------------------------------------------- commands


def test_generate_on_ranks_says_once_what_one_process_says(checkpoint, tmp_path, capsys):
    profile = tmp_path / "trace.json"
    flags = ["--checkpoint_path", str(checkpoint / FLOATS), "--num_samples", "2", "--max_new_tokens", "20",
             "--batch_size", "2", "--dtype", "float32", "--device", "cpu", "--seed", "5"]  # fmt: skip
    done = run_ranks(2, "-m", "gpt_fast.generate", *flags, "--profile", str(profile))
    assert done.returncode == 0, done.stderr
    generate.main(flags)
    ours, theirs = (rows_of(text) for text in (done.stdout, capsys.readouterr().out))
    assert ours == theirs and len(ours) == 4
    assert done.stdout.count("Average tokens/sec") == 1 and "tensor parallel" in done.stdout
    assert "gloo:all_reduce" in profile.read_text() or "c10d" in profile.read_text()


def test_a_conversation_on_ranks_reads_the_terminal_once(checkpoint):
    flags = ["--checkpoint_path", str(checkpoint), "--max_new_tokens", "8", "--device", "cpu", "--interactive"]
    done = run_ranks(2, "-m", "gpt_fast.generate", *flags, given="hello\n/reset\n/exit\n")
    assert done.returncode == 0 and done.stdout.count("> ") == 3, done.stderr


def test_two_machines_say_what_one_process_says(checkpoint, capsys, monkeypatch):
    """Two agents of two ranks each; the operator names the network they speak through."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    flags = ["--checkpoint_path", str(checkpoint / FLOATS), "--num_samples", "2", "--max_new_tokens", "20",
             "--batch_size", "2", "--dtype", "float32", "--device", "cpu", "--seed", "5",
             "--speculate", "ngram"]  # fmt: skip
    agents = two_agents((2, 2), free_ports(1)[0], "-m", "gpt_fast.generate", *flags)
    said = [agent.communicate(timeout=TIMEOUT) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    generate.main(flags)
    first, second = (rows_of(out) for out, _ in said)
    assert (first or second) == rows_of(capsys.readouterr().out) and not (first and second)


def rows_of(shown):
    """The texts of a batch's rows, as generate prints them."""
    return re.findall(r"^--- row \d+\n(.*?)(?=\n--- row |\nTime for)", shown, re.M | re.S)


# ---------------------------------------------------------------------------------------------- ends


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    lonely = write_checkpoint(tmp_path, random_model(small_config(**BYTES, n_head=1, n_kv_head=1)), tokenizer=True)
    done = run_ranks(2, "-m", "gpt_fast.eval", "--checkpoint_path", str(lonely), "--tasks", "basics")
    assert done.returncode == 1 and done.stdout == ""
    message = "error: n_head: has none for some of 2 ranks (got 1, allowed 1 ranks at most)"
    assert [line for line in done.stderr.splitlines() if "n_head" in line] == [message]


def test_compiled_shares_are_refused_before_anything_loads():
    group: Any = SimpleNamespace(ranks=Ranks(0, 2), local=Ranks(0, 2))
    with pytest.raises(ConfigError, match=r"^compile: compiled shares of a model gave wrong tokens on ranks"):
        load_share(EngineConfig(checkpoint_path="nowhere", compile=True), group)


def test_a_wrong_flag_is_said_once():
    done = run_ranks(2, "-m", "gpt_fast.eval", "--windows", "many")
    assert done.returncode == 1 and done.stderr.count("argument --windows: invalid int value: 'many'") == 1


def test_ranks_that_hold_something_else_are_refused(checkpoint, tmp_path):
    (tmp_path / "checkpoint").write_text(str(checkpoint))
    done = run_ranks(2, str(SUPPORT / "ranks.py"), "disagreement", str(tmp_path))
    assert done.returncode == 1
    assert re.search(
        r"rank 1: is not set up as rank 0 is \(got .*float32/int8.*, allowed .*float32/float32", done.stderr
    )


def test_one_ranks_failure_ends_the_group(tmp_path):
    started = time.monotonic()
    done = run_ranks(2, str(SUPPORT / "ranks.py"), "failure", str(tmp_path))
    assert done.returncode == 1 and time.monotonic() - started < TIMEOUT / 2
    assert done.stderr.count("error: rank 1 has had enough") == 1
    assert "all_reduce" not in done.stderr  # the rank that waited says nothing


def test_no_rank_outlives_torchrun(tmp_path):
    process = torchrun(2, str(SUPPORT / "ranks.py"), "waiting", str(tmp_path))
    pids = noted(tmp_path, 2)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_ends_the_group(stopped, tmp_path):
    process = torchrun(2, str(SUPPORT / "ranks.py"), "waiting", str(tmp_path))
    pids = noted(tmp_path, 2)
    os.kill(pids[stopped], signal.SIGSTOP)
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1 and not any(alive(pid) for pid in pids)
    assert said.count(f"error: rank {stopped} gave no sign of life for {pulse.SILENCE:.0f} s") == 1


def noted(directory: Path, count: int) -> list[int]:
    """The processes of the `waiting` ranks, once all are there."""
    notes = [directory / f"pid.{rank}" for rank in range(count)]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes))
    return [int(note.read_text()) for note in notes]


def wait_for(condition):
    end = time.monotonic() + TIMEOUT / 4
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
