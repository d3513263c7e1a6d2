"""However the files are cut and their tensors named: the same checkpoint, or a message that names what lies there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import digests, gpt_fast_state, run_convert, save_bin
from test_convert_refusals import refuse

from gpt_fast.checkpoint.manifest import verify_manifest
from gpt_fast.checkpoint.side_names import is_side_file
from gpt_fast.convert.names import plain_names
from gpt_fast.convert.source import open_file
from support.examples import rest_slow
from support.tiny_models import save, tokenizer_json

WEIGHTS = "model.safetensors"
Rename = Callable[[str], str]
LAYER = "model.layers.1."
RENAMED: dict[str, Rename] = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: name.replace(LAYER, LAYER + "_orig_mod."),
    "FSDP": lambda name: name.replace("model.", "model._fsdp_wrapped_module.", 1).replace(
        LAYER, LAYER + "_fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "a module that holds it": lambda name: f"model.{name}",
    "a language model's": lambda name: f"language_model.{name}",
    "no model.": lambda name: name.removeprefix("model."),
    "module. instead of model.": lambda name: "module." + name.removeprefix("model."),
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save("llama-gqa", tmp_path / "hf")
    run_convert(tmp_path / "hf", tmp_path / "want")
    return tmp_path / "hf"


def same(hf: Path, source: Path | None = None) -> None:
    """`source` (the directory unless said) converts to what the directory did at first."""
    out = run_convert(source or hf, hf.parent / "same")
    assert digests(out)[WEIGHTS] == digests(hf.parent / "want")[WEIGHTS]


def rename_tensors(hf: Path, rename: Rename) -> dict[str, torch.Tensor]:
    tensors = {rename(name): tensor for name, tensor in load_file(hf / WEIGHTS).items()}
    save_file(tensors, hf / WEIGHTS)
    return tensors


@pytest.mark.parametrize("kind", rest_slow(RENAMED, quick=3))
def test_names_that_wrappers_give(kind: str, hf: Path) -> None:
    tensors = rename_tensors(hf, RENAMED[kind])
    same(hf)
    torch.save(tensors, hf / "pytorch_model.bin")
    (hf / WEIGHTS).unlink()
    same(hf)


def test_wrapped_gpt_fast_file(hf: Path) -> None:
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in gpt_fast_state("llama-gqa").items()}, hf / "model.pth")
    same(hf, hf / "model.pth")


def test_other_names_are_told(hf: Path) -> None:
    rename_tensors(hf, lambda name: name.replace("embed_tokens", "wte"))
    refuse(hf, WEIGHTS, "tensor model.embed_tokens.weight: is missing", "the file has lm_head.weight, model.layers.0.")
    rename_tensors(hf, lambda name: name.replace("wte", "embed_tokens"))
    tensors = load_file(hf / WEIGHTS)
    save_file(tensors | {"module.lm_head.weight": tensors["lm_head.weight"].clone()}, hf / WEIGHTS)
    refuse(hf, WEIGHTS, "lm_head.weight", "is the same tensor as")


def test_plain_names_of_names_that_are() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    assert plain_names(names) == {name: name for name in names}
    assert plain_names([]) == {}


# ----------------------------------------------------------------------------------------- how files are cut


def cut(hf: Path, *, suffix: str = ".safetensors") -> list[Path]:
    """The directory's tensors in three shards without an index."""
    tensors = load_file(hf / WEIGHTS)
    (hf / WEIGHTS).unlink()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    files = [hf / f"{stem}-{number:05d}-of-00003{suffix}" for number in (1, 2, 3)]
    for number, file in enumerate(files):
        part = {name: tensor for n, (name, tensor) in enumerate(tensors.items()) if n % 3 == number}
        save_file(part, file) if suffix == ".safetensors" else torch.save(part, file)
    return files


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index(suffix: str, hf: Path) -> None:
    files = cut(hf, suffix=suffix)
    same(hf)
    files[1].rename(hf / "kept")
    refuse(hf, files[1].name + ": no such file, but " + files[0].name + " is there")
    (hf / "kept").rename(files[1])
    files[2].rename(files[2].with_name(files[2].name.replace("00003" + suffix, "00004" + suffix)))
    refuse(hf, "shards of several sets and no index", files[0].name)


def test_a_tensor_in_two_shards_without_an_index(hf: Path) -> None:
    files = cut(hf)
    name, tensor = next(iter(load_file(files[0]).items()))
    save_file(load_file(files[1]) | {name: tensor}, files[1])
    refuse(hf, files[1].name, name, f"is in {files[0].name} too")


def test_a_weights_file_or_an_index_as_the_source(hf: Path) -> None:
    same(hf, hf / WEIGHTS)
    save_bin("llama-gqa", hf.parent / "bin", shards=3)
    same(hf, hf.parent / "bin" / "pytorch_model.bin.index.json")
    assert open_file(hf / WEIGHTS).infos.keys() == load_file(hf / WEIGHTS).keys()
    refuse(hf / "config.json", "config.json: is no weights file (allowed .safetensors, .bin")


def test_a_directory_without_weights_is_told_what_it_has(hf: Path) -> None:
    (hf / WEIGHTS).rename(hf / "adapter_model.safetensors")
    refuse(hf, "has no model.safetensors", "adapter_model.safetensors, config.json")


# ------------------------------------------------------------------------------------------------- side files


def test_every_side_file_is_kept_and_listed(hf: Path) -> None:
    """additional_chat_templates/ too; what a later conversion does not have goes, its folder with it."""
    names = ["chat_template.jinja", "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja"]
    (hf / "tokenizer.json").write_bytes(tokenizer_json())
    (hf / "additional_chat_templates").mkdir()
    for name in names:
        (hf / name).write_text(f"{{# {name} #}}")
    (hf / "additional_chat_templates" / "notes.txt").write_text("x")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (hf / name).write_text("{}")
    out = run_convert(hf, hf.parent / "out")
    for name in (*names, "special_tokens_map.json", "added_tokens.json"):
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    assert not (out / "additional_chat_templates" / "notes.txt").exists()
    verify_manifest(out)
    listed = json.loads((out / "manifest.json").read_text())["files"]
    assert {*names} < listed.keys()
    for name in names[1:]:
        (hf / name).unlink()
    run_convert(hf, out)
    assert not (out / "additional_chat_templates").exists()
    verify_manifest(out)


@pytest.mark.parametrize(
    "name", ["tekken.json", "tokenizer.model.v3", "tiktoken.model", "qwen.tiktoken", "spiece.model"]
)
def test_the_only_tokenizer_is_not_left_behind(name: str, hf: Path) -> None:
    (hf / name).write_text("{}")
    refuse(hf, name, "is no tokenizer that is read here", "tokenizer.json, tokenizer.model, vocab.json with merges.txt")
    (hf / "tokenizer.json").write_bytes(tokenizer_json())
    same(hf)


def test_vocab_and_merges_are_kept_or_asked_for(hf: Path) -> None:
    vocab = {chr(0x4E00 + i): i for i in range(160)}
    (hf / "vocab.json").write_text(json.dumps(vocab))
    refuse(hf, "vocab.json", "vocab.json with merges.txt")
    (hf / "merges.txt").write_text("#version: 0.2\n")
    (hf / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    refuse(hf, "vocab.json", "161 tokens", "vocab_size is 160")  # the class adds <|endoftext|>
    del vocab[chr(0x4E00 + 159)]
    (hf / "vocab.json").write_text(json.dumps(vocab))
    out = run_convert(hf, hf.parent / "out")
    assert {"vocab.json", "merges.txt", "tokenizer_config.json"} < digests(out).keys()


def test_what_is_fetched_is_what_conversion_reads() -> None:
    for name in ("merges.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert is_side_file(name)
    for name in (
        "additional_chat_templates/../x.jinja",
        "additional_chat_templates/x.py",
        "a/tokenizer.json",
        "x.jinja",
    ):
        assert not is_side_file(name)
