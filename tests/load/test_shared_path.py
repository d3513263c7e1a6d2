"""Which path a model's shares take, and what commands on ranks answer on the fused one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt_fast.config import EngineConfig
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.eval.__main__ import main
from gpt_fast.load.engine import load_model
from gpt_fast.load.path import choose_path
from gpt_fast.model.parallel import Ranks
from gpt_fast.ops.cpu import build
from support.quantized import CPU, random_model, small_config, write_checkpoint
from support.ranks import run_ranks

BYTES = {"vocab_size": 258, "max_position": 1024, "head_dim": 32, "intermediate_size": 192}


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(small_config(**BYTES))
    return quantize_checkpoint(write_checkpoint(tmp_path_factory.mktemp("path"), model, tokenizer=True), mode="int8")


def test_ranks_on_several_machines_do_not_share_memory(int8: Path) -> None:
    group = type("Group", (), {"ranks": Ranks(0, 4), "local": Ranks(0, 2)})()
    config = EngineConfig(checkpoint_path=str(int8), device="cpu")
    loaded = load_model(str(int8), device=CPU, dtype="auto", group=group)
    path = choose_path(config, loaded, 1, group=group)
    assert path.name == "plain (tensor parallel: the fused CPU kernels sum over the ranks of one machine)"


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels")
def test_a_commands_ranks_run_the_fused_decoder(int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint_path", str(int8), "--tasks", "basics_perplexity", "--limit", "6", "--device", "cpu"]
    done = run_ranks(2, "-m", "gpt_fast.eval", *flags)
    assert done.returncode == 0, done.stderr
    main(flags)
    ours, theirs = (json.loads(text.splitlines()[-1]) for text in (done.stdout, capsys.readouterr().out))
    assert (ours["path"], theirs["path"]) == ("fused CPU decoder on 2 ranks", "fused CPU decoder")
    ours, theirs = (each["results"]["basics_perplexity"] for each in (ours, theirs))
    assert ours["bits_per_byte,none"] == pytest.approx(theirs["bits_per_byte,none"], rel=1e-3)
