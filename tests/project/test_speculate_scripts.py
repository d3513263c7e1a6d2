"""The four speculate_*.sh: they run on whatever models are named, say what is missing, and pass their flags on."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.generate import parse_args
from support.paths import ROOT
from support.quantized import random_model, small_config, write_checkpoint

SCRIPTS = ["7B_int4", "34B_bf16", "70B_int4", "tp_70B_bf16"]
BYTES = {"vocab_size": 258, "max_position": 1024, "head_dim": 32, "intermediate_size": 192}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """tiny/target and tiny/draft, each in every format that a script names."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, seed in (("target", 0), ("draft", 1)):
        directory = write_checkpoint(
            root / "tiny" / name, random_model(small_config(**BYTES), seed=seed), tokenizer=True
        )
        quantize_checkpoint(directory, mode="int8")
        quantize_checkpoint(directory, mode="int4", groupsize=32)
    return root


def run(name, checkpoints, *flags, python=sys.executable, **more):
    environment = {"PYTHON": str(python), "CHECKPOINTS": str(checkpoints), "PYTHONPATH": str(ROOT), **more}
    script = ROOT / "scripts" / f"speculate_{name}.sh"
    return subprocess.run(
        [script, *flags], env=os.environ | environment, cwd="/", capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_are_ones_that_generate_knows(name, checkpoints, tmp_path):
    """With a python that prints its arguments."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    done = run(name, checkpoints, "--seed", "7", python=fake, MODEL_REPO="tiny/target", DRAFT_MODEL_REPO="tiny/draft")
    arguments = done.stdout.splitlines()
    args = parse_args(arguments[arguments.index("gpt_fast.generate") + 1 :])
    assert args.draft_checkpoint_path and args.speculate_k >= 4 and args.temperature == 0
    assert args.seed == 7
    assert ("--nproc_per_node" in arguments) == name.startswith("tp_") != args.compile  # ranks do not compile


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_missing_is_said_with_what_makes_it(name, tmp_path):
    """Of the model that the script is named after, and of the draft where that alone is missing."""
    done = run(name, tmp_path)
    repo = re.search(rf"error: {tmp_path}/(\S+?)/model\S*: no such file; make it with", done.stderr)[1]
    assert done.returncode == 1 and f"scripts/prepare.sh {repo}\n" in done.stderr and done.stdout == ""
    for file in ("model.safetensors", "model_int4.g32.safetensors"):
        (tmp_path / repo).mkdir(parents=True, exist_ok=True)
        (tmp_path / repo / file).touch()
    done = run(name, tmp_path)
    assert done.returncode == 1 and repo not in done.stderr and "gpt_fast.quantize --checkpoint_path" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_with_models_of_ones_own(name, checkpoints):
    flags = ["--num_samples", "1", "--max_new_tokens", "12", "--device", "cpu"]
    models = {"MODEL_REPO": "tiny/target", "DRAFT_MODEL_REPO": "tiny/draft", "COMPILE": "", "RANKS": "2"}
    done = run(name, checkpoints, *flags, **models)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Mean Accepted") == 1 and "tiny/target/model" in done.stdout
