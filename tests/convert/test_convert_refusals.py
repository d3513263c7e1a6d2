"""Bad sources are refused with file and tensor named, nothing in them runs, and nothing gets a final name."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.text.tokenizer import TokenizerError
from support.tiny_models import make, save, tokenizer_json

WEIGHTS = "model.safetensors"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    save("llama-gqa", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save("llama-gqa", tmp_path / "hf", max_shard_size="60KB")
    return tmp_path / "hf"


def refuse(source: Path, *names: str, dtype: str = "keep") -> None:
    out = source.parent / "out"
    with pytest.raises((CheckpointError, ConfigError, TokenizerError)) as caught:
        convert(open_job(source), out, dtype=dtype, progress=False)
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in names), message
    assert not out.exists()


def rewrite(directory: Path, change: Change) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def to_bin(directory: Path, values: Any = None) -> Path:
    """The same directory with pytorch_model.bin instead of safetensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
    torch.save(tensors if values is None else values, directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    return directory / "pytorch_model.bin"


Q1 = "model.layers.1.self_attn.q_proj.weight"
BAD_TENSORS: list[tuple[Change, tuple[str, ...]]] = [
    (lambda t: t.pop(Q1), (Q1, "missing")),
    (lambda t: t.pop("lm_head.weight"), ("lm_head.weight", "missing")),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}), ("layers.3", "not part of this model")),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}), ("q_proj.bias", "not part")),
    (lambda t: t.update({Q1: torch.ones(48, 47)}), (Q1, "wrong shape", "[48, 47]", "[48, 48]")),
    (lambda t: t.update({Q1: torch.ones(48, 48, dtype=torch.int8)}), (Q1, "wrong dtype", "torch.int8")),
    (lambda t: t.update({Q1: torch.ones(48, 48).double()}), (Q1, "wrong dtype", "torch.float64")),
    (lambda t: t.update({Q1: torch.ones(48, 48).half()}), (Q1, "torch.float16", "--dtype")),
    (lambda t: t[Q1].view(-1)[100:101].fill_(float("nan")), (Q1, "not finite")),
    (lambda t: t["model.norm.weight"].view(-1)[-1:].fill_(float("inf")), ("model.norm.weight", "not finite")),
    (lambda t: t.update({"model.embed_tokens.weight": torch.ones(161, 48)}), ("embed_tokens", "[161, 48]")),
]


@pytest.mark.parametrize(("change", "names"), BAD_TENSORS)
def test_bad_tensors_in_safetensors(change: Change, names: tuple[str, ...], hf: Path) -> None:
    rewrite(hf, change)
    refuse(hf, WEIGHTS, *names)


@pytest.mark.parametrize(("change", "names"), BAD_TENSORS)
def test_bad_tensors_in_bin(change: Change, names: tuple[str, ...], hf: Path) -> None:
    rewrite(hf, change)
    to_bin(hf)
    refuse(hf, "pytorch_model.bin", *names)


def test_truncated_at_twenty_offsets(hf: Path) -> None:
    data = (hf / WEIGHTS).read_bytes()
    for number in range(20):
        (hf / WEIGHTS).write_bytes(data[: number * (len(data) - 1) // 19])
        refuse(hf, WEIGHTS)
    (hf / WEIGHTS).write_bytes(data[:-9])
    refuse(hf, WEIGHTS, "tensor ", "cut off")
    (hf / WEIGHTS).write_bytes(data)
    path = to_bin(hf)
    data = path.read_bytes()
    for number in range(20):
        path.write_bytes(data[: number * (len(data) - 1) // 19])
        refuse(hf, "pytorch_model.bin")


def test_float16_that_does_not_reach(hf: Path) -> None:
    rewrite(hf, lambda t: t["model.norm.weight"][3:4].fill_(70000.0))
    refuse(hf, WEIGHTS, "model.norm.weight", "torch.float16", dtype="float16")


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    save("qwen2-tied", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    refuse(tmp_path / "hf", "lm_head.weight", "tie_word_embeddings")


def test_wrong_vocabulary(hf: Path) -> None:
    (hf / "tokenizer.json").write_bytes(tokenizer_json(161))
    refuse(hf, "tokenizer.json", "161 tokens", "vocab_size is 160")
    (hf / "tokenizer.json").write_text("{")
    refuse(hf, "tokenizer.json")
    (hf / "tokenizer.json").write_text("{}")
    refuse(hf, "tokenizer.json")


# ------------------------------------------------------------------------------------------------ indexes


@pytest.mark.parametrize(
    "name", ["../model-00001-of-00005.safetensors", "/etc/passwd", "model.bin", "absent.safetensors"]
)
def test_an_index_names_weights_beside_it_only(name: str, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"][Q1] = name
    index.write_text(json.dumps(values))
    (sharded / "model.bin").write_bytes(b"x")
    refuse(sharded, "model.safetensors.index.json", Q1)


def test_swapped_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    refuse(sharded, "model-0000", "tensor ")


def test_a_missing_shard(sharded: Path) -> None:
    next(iter(sharded.glob("model-*.safetensors"))).unlink()
    refuse(sharded, "index.json", "no .safetensors file here")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refuse(sharded, second.name, name, "is not listed")


def test_nothing_to_convert(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    refuse(tmp_path / "hf", "has no model.safetensors")
    refuse(tmp_path / "nowhere", "nowhere")


# ------------------------------------------------------------------------------------------------ pickles


class Payload:
    """Unpickling this would create the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


def test_a_pickle_payload_never_runs(hf: Path) -> None:
    canary = hf.parent / "canary"
    for payload in (Payload(canary), {"a": Payload(canary)}, [Payload(canary)]):
        torch.save(payload, hf / "model.pth")
        refuse(hf / "model.pth", "model.pth", "not a plain file of tensors")
    (hf / "model.pth").write_bytes(pickle.dumps(Payload(canary)))
    refuse(hf / "model.pth", "model.pth")
    torch.save(Payload(canary), hf / "model.pth", _use_new_zipfile_serialization=False)
    refuse(hf / "model.pth", "model.pth", "saved by torch before 1.6")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Payload(canary)))  # the payload is live: unpickled, it does run
    assert canary.exists()


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([torch.ones(2)], ("must hold a dict",)),
        ({"a": 3}, ("tensor a", "not a tensor")),
        ({"a": torch.eye(3).to_sparse()}, ("a",)),
        ({3: torch.ones(2)}, ("tensor 3",)),
    ],
)
def test_torch_files_hold_dense_tensors_by_name(value: Any, names: tuple[str, ...], hf: Path) -> None:
    torch.save(value, hf / "model.pth")
    refuse(hf / "model.pth", "model.pth", *names)


def test_gpt_fast_int4_is_refused_by_tensor(hf: Path) -> None:
    state = {f"layers.{i}.attention.wqkv.scales_and_zeros": torch.ones(2) for i in range(3)}
    torch.save(make("llama-gqa").state_dict() | state, hf / "model_int4.g32.pth")
    refuse(hf / "model_int4.g32.pth", "model_int4.g32.pth", "scales_and_zeros")


# ------------------------------------------------------------------------------------------ interrupted


@pytest.mark.slow
def test_a_full_disk_leaves_no_checkpoint(hf: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from gpt_fast.convert.hf import open_job; from gpt_fast.convert.run import convert\n"
        "job = open_job(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "convert(job, Path(sys.argv[2]), progress=False)"
    )
    out = hf.parent / "out"
    command = [sys.executable, "-c", code, str(hf), str(out)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr
    assert not out.exists()


def test_a_failed_conversion_leaves_the_old_checkpoint(hf: Path) -> None:
    out = hf.parent / "out"
    convert(open_job(hf), out, progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rewrite(hf, lambda t: t[Q1].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=Q1):
        convert(open_job(hf), out, progress=False)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
