"""What --checkpoint_path may name: a checkpoint, published weights (converted once), a pulled model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpt_fast.config import ConfigError
from gpt_fast.convert.hub_files import choose_files, choose_gguf
from gpt_fast.convert.named import checkpoint_to_serve, converted, pulled, read_quant
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.load.checkpoint import load_checkpoint
from support.quantized import random_model, small_config, write_checkpoint
from support.tiny_models import save, tokenizer_json

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a working directory of the test's own."""
    monkeypatch.setenv("GPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_checkpoints_and_files_in_them_stay_what_they_are(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "model", random_model(small_config()))
    for name in (made, made / "model.safetensors", tmp_path / "nowhere.safetensors"):
        assert converted(str(name)) == name
    assert not (tmp_path / "cache").exists()


def test_a_published_directory_is_converted_once(tmp_path: Path, capsys: Captured) -> None:
    save("llama-gqa", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tokenizer_json())
    made = converted(str(tmp_path / "hf"))
    assert capsys.readouterr().err.count("converting") >= 1 and load_checkpoint(made, device="cpu").quantization is None
    assert converted("hf") == made and "once" not in capsys.readouterr().err
    os.utime(tmp_path / "hf" / "model.safetensors", (1, 1))
    assert converted("hf") == made and "once" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    )


def test_a_pulled_model_goes_by_its_name(tmp_path: Path, capsys: Captured) -> None:
    made = write_checkpoint(tmp_path / "checkpoints/org/name", random_model(small_config()))
    weights = quantize_checkpoint(made, mode="int4")
    assert pulled("org/name") == Path("checkpoints/org/name") and converted("org/name").is_dir()
    assert converted("org/name:int4").resolve() == converted("org/name:int4.g32").resolve() == weights
    assert checkpoint_to_serve("org/name").name == "model.safetensors"
    assert "passes over model_int4.g32.safetensors (no quality report" in capsys.readouterr().err
    (tmp_path / "cache/checkpoints/org").mkdir(parents=True)
    (tmp_path / "checkpoints").rename(tmp_path / "cache/moved")
    (tmp_path / "cache/moved/org/name").rename(tmp_path / "cache/checkpoints/org/name")
    assert converted("org/name") == tmp_path / "cache/checkpoints/org/name"


@pytest.mark.parametrize("name", ["org/name", "org/name:int8", "org/name:Q4_0"])
def test_what_was_not_pulled_is_refused_with_the_way_to_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint_path: no such file.*gpt-fast pull {name}"):
        converted(name)


@pytest.mark.parametrize(
    ("tag", "meant"),
    [
        ("int8", ("int8", 32)),
        ("int4", ("int4", 32)),
        ("int4.g64", ("int4", 64)),
        ("int4-gptq.g128", ("int4-gptq", 128)),
    ],
)
def test_tags_of_our_own(tag: str, meant: tuple[str, int]) -> None:
    assert read_quant(tag) == meant and read_quant("Q4_0") is None and read_quant("") is None


def test_a_gguf_is_chosen_by_its_tag() -> None:
    names = ["README.md", "m-Q4_0.gguf", "m.q8_0.gguf", "m-Q6_K-00001-of-00002.gguf", "config.json"]
    assert choose_gguf(names, "q4_0") == ["m-Q4_0.gguf"] and choose_gguf(names, "Q8_0") == ["m.q8_0.gguf"]
    with pytest.raises(ValueError, match=r":Q5_K: no such quantization \(got Q5_K, the repository has :Q4_0, :Q8_0;"):
        choose_gguf(names, "Q5_K")
    with pytest.raises(ValueError, match=r"holds GGUF files only: say which \(allowed :Q4_0, :Q8_0\)"):
        choose_files(names)
