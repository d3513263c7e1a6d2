"""Which file of a directory is served: the smallest that its report allows, and the line that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_fast.checkpoint.choice import choose_weights
from gpt_fast.checkpoint.quality_gate import report_path, weights_sha256
from gpt_fast.config import ConfigError
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.files import write_json
from gpt_fast.load.engine import load_parts
from gpt_fast.serve.startup import EngineConfig, with_weights
from support.quantized import random_model, small_config, write_checkpoint


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", random_model(small_config(vocab_size=257)), tokenizer=True)


def judge(weights: Path, *, ratio: float, kl: float = 0.001) -> None:
    report = {"sha256": weights_sha256(weights), "perplexity_ratio": ratio, "mean_kl": kl}
    write_json(report, report_path(weights))


def test_alone_it_is_the_source(directory: Path) -> None:
    assert choose_weights(directory) == (directory / "model.safetensors", f"{directory}: takes model.safetensors")
    file = directory / "model.safetensors"
    assert choose_weights(file) == (file, "")


def test_int8_is_served_unless_its_report_is_bad(directory: Path) -> None:
    weights = quantize_checkpoint(directory, mode="int8")
    assert choose_weights(directory) == (weights, f"{directory}: takes {weights.name} (int8, no quality report)")
    judge(weights, ratio=1.001)
    assert choose_weights(directory).weights == weights
    judge(weights, ratio=1.5)
    choice = choose_weights(directory)
    assert choice.weights.name == "model.safetensors" and "passes over model_int8.safetensors" in choice.told
    assert "perplexity_ratio is worse (got 1.5, allowed at most 1.03)" in choice.told and "\n" not in choice.told


def test_who_names_float32_gets_nothing_rounded(directory: Path) -> None:
    int8 = quantize_checkpoint(directory, mode="int8")
    choice = choose_weights(directory, dtype="float32")
    assert choice.weights == directory / "model.safetensors" and "float32 asks for weights without" in choice.told
    assert choose_weights(int8, dtype="float32").weights == int8  # the file was asked for by its name
    assert choose_weights(directory, dtype="bfloat16").weights == int8  # what quantized weights are computed in too
    (directory / "model.safetensors").unlink()
    assert choose_weights(directory, dtype="float32").weights == int8


def test_int4_needs_a_report_that_is_good(directory: Path) -> None:
    int8, int4 = (quantize_checkpoint(directory, mode=mode) for mode in ("int8", "int4"))
    choice = choose_weights(directory)
    assert choice.weights == int8 and f"gpt-fast eval --quality {int4}" in choice.told
    judge(int4, ratio=1.01)
    assert choose_weights(directory).weights == int4
    int4.with_name(f"{int4.stem}.quality.json").write_text('{"sha256": "of other weights"}')
    assert choose_weights(directory).weights == int8
    judge(int4, ratio=1.01, kl=0.5)
    assert choose_weights(directory).weights == int8


def test_thresholds_of_the_configuration_hold_for_every_file(directory: Path) -> None:
    int8 = quantize_checkpoint(directory, mode="int8")
    assert choose_weights(directory, {"max_mean_kl": 0.01}).weights.name == "model.safetensors"  # no report
    judge(int8, ratio=1.5)
    assert choose_weights(directory, {"max_mean_kl": 0.01}).weights == int8
    assert choose_weights(directory, {"max_mean_kl": 0.0001}).weights.name == "model.safetensors"
    config = EngineConfig(checkpoint_path=str(directory), quality={"max_mean_kl": 0.0001})
    with pytest.raises(ConfigError, match=r"quality: no model\.quality\.json"):  # as ever: asked for, and not there
        load_parts(with_weights(config))


def test_the_server_serves_what_prepare_made(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = quantize_checkpoint(directory, mode="int8")
    with caplog.at_level("INFO"):
        assert with_weights(EngineConfig(checkpoint_path=str(directory))).checkpoint_path == str(weights)
    assert "takes model_int8.safetensors" in caplog.text


def test_a_file_that_somebody_deleted_is_not_chosen(directory: Path) -> None:
    quantize_checkpoint(directory, mode="int8").unlink()
    assert choose_weights(directory).weights.name == "model.safetensors"
