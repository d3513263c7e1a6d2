"""What a start may not do: import what no request needs, or collect garbage while it imports."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.generate import main as generate
from gpt_fast.llm import Engine
from support.manifest import list_files
from support.paths import ROOT
from support.quantized import random_model, small_config, write_checkpoint

pytestmark = pytest.mark.slow

# Compilers take longer to import than the engine to load; tokenizers and templates are imported with a checkpoint's.
COMPILERS = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
EXTRAS = {"transformers", "gguf", "tiktoken", "llguidance", "matplotlib", "lm_eval", "huggingface_hub"}
OF_CHECKPOINTS = {"tokenizers", "sentencepiece", "jinja2"}


def fresh(code: str) -> str:
    """What a new Python process prints."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def among(names: set[str]) -> str:
    return f"import sys; print(*sorted({names!r} & sys.modules.keys()))"


@pytest.mark.parametrize("module", ["llm", "generate", "serve.startup"])
def test_the_engine_imports_neither_compilers_nor_extras(module: str) -> None:
    assert fresh(f"import gpt_fast.{module}; {among(COMPILERS | EXTRAS | OF_CHECKPOINTS)}") == ""


@pytest.fixture(scope="module")
def byte_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(small_config(vocab_size=257))
    return write_checkpoint(tmp_path_factory.mktemp("bytes"), model, tokenizer=True)


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_a_first_token_needs_no_compiler(mode: str, byte_checkpoint: Path) -> None:
    weights = byte_checkpoint if mode == "none" else quantize_checkpoint(byte_checkpoint, mode=mode)
    code = f"""
from gpt_fast.config import SamplingParams
from gpt_fast.generate import main as generate
from gpt_fast.llm import Engine
engine = Engine.load({str(weights)!r}, max_num_seqs=1, threads=1)
assert len(list(engine.events("a", SamplingParams(max_new_tokens=1)))) == 1
{among(COMPILERS | EXTRAS)}"""
    assert fresh(code) == ""


@pytest.mark.parametrize("damaged", [True, False])
def test_damaged_weights_are_named_before_a_broken_tokenizer(
    damaged: bool, byte_checkpoint: Path, tmp_path: Path
) -> None:
    """They are read at the same time."""
    directory = Path(shutil.copytree(byte_checkpoint, tmp_path / "copy"))
    (directory / "tokenizer.json").write_text("{}")
    list_files(directory)
    if damaged:
        content = bytearray((directory / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="its sha256 differs" if damaged else "not a tokenizer.json"):
        Engine.load(str(directory), max_num_seqs=1, threads=1)


def test_the_command_collects_nothing_while_it_imports() -> None:
    code = "import gc, gpt_fast.generate; print(gc.get_stats()[2]['collections'], gc.get_freeze_count() > 100_000)"
    assert fresh(code) == "0 True"


def test_the_collector_rests_and_goes_on() -> None:
    with at_rest():
        assert not gc.isenabled()
        with at_rest():  # part of the rest around it
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


def test_the_collector_goes_on_after_a_failed_import() -> None:
    with pytest.raises(ImportError), at_rest():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


def test_a_collector_that_is_off_stays_off() -> None:
    before = gc.get_freeze_count()
    gc.disable()
    try:
        with at_rest():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint_path", "/nowhere"], "/nowhere"),
        (["--num_samples", "0"], "argument --num_samples: must be a whole number (got '0', allowed 1 or more)"),
        (["--prompt", ""], "prompt"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_generate_ends_on_a_mistake_with_one_line(
    flags: list[str], message: str, byte_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        generate(["--checkpoint_path", str(byte_checkpoint), "--max_new_tokens", "4", *flags])
    assert caught.value.code == 2 and message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("mode", ["int8", "int4-gptq"])
def test_quantizing_needs_no_compiler(mode: str, byte_checkpoint: Path) -> None:
    code = f"""
from pathlib import Path
import torch
from gpt_fast.convert.quantized import Calibration, quantize_checkpoint
text = Calibration(torch.zeros(1, 8, dtype=torch.int64), "zeros", "")
quantize_checkpoint(Path({str(byte_checkpoint)!r}), mode={mode!r}, groupsize=32, calibration=text, label="_start_")
{among(COMPILERS | EXTRAS)}"""
    assert fresh(code) == ""
