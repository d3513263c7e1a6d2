"""Loading: bit exact, and every damaged checkpoint refused with file and tensor named before it can be served."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gpt_fast.checkpoint.directory import FORMAT
from gpt_fast.checkpoint.manifest import (
    add_to_manifest,
    hash_file,
    install,
    read_manifest,
    staging,
    verify_manifest,
    write_manifest,
)
from gpt_fast.checkpoint.safetensors_file import CheckpointError, FileRecord, SafetensorsFile, TensorSpec, write_file
from gpt_fast.checkpoint.side_names import NAMES
from gpt_fast.config import ConfigError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import load_checkpoint
from support.manifest import list_files
from support.tiny_models import logits, save

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save("llama-gqa", directory / "hf")
    convert(open_job(directory / "hf"), directory / "one", progress=False)
    convert(open_job(directory / "hf"), directory / "many", progress=False, shard_bytes=60_000)
    return directory


@pytest.fixture
def one(converted: Path, tmp_path: Path) -> Path:
    """A copy of a converted checkpoint to damage."""
    return Path(shutil.copytree(converted / "one", tmp_path / "one"))


@pytest.fixture
def many(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted / "many", tmp_path / "many"))


def refuse(path: Path, *names: str) -> None:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load_checkpoint(path, device="cpu")
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in names), message


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and make the manifest agree, as a wrong converter would."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata=FORMAT)
    list_files(directory)


# ------------------------------------------------------------------------------------------- what loads


def test_a_directory_its_file_and_its_shards_load_the_same(converted: Path) -> None:
    models = [
        load_checkpoint(path, device="cpu").model.state_dict()
        for path in (converted / "one", converted / "one" / WEIGHTS, converted / "many", converted / "many" / WEIGHTS)
    ]
    want = load_file(converted / "one" / WEIGHTS)
    for state in models:
        assert state.keys() == want.keys()
        assert all(torch.equal(state[name], want[name]) for name in want)


def test_weights_are_mapped_and_frozen(converted: Path) -> None:
    model = load_checkpoint(converted / "one", device="cpu").model
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    first, second = (load_checkpoint(converted / "one", device="cpu").model.norm.weight for _ in range(2))
    first.fill_(3)  # private pages: neither the file nor another model sees it
    assert not torch.equal(first, second)
    verify_manifest(converted / "one")


def test_dtype_is_kept_or_cast(converted: Path) -> None:
    for dtype in (None, torch.bfloat16, torch.float16):
        model = load_checkpoint(converted / "one", device="cpu", dtype=dtype).model
        assert {p.dtype for p in model.parameters()} == {dtype or torch.float32}


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    save("qwen2-tied", tmp_path / "hf")
    convert(open_job(tmp_path / "hf"), tmp_path / "out", progress=False)
    for dtype in (None, torch.bfloat16):
        model = load_checkpoint(tmp_path / "out", device="cpu", dtype=dtype).model
        assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in load_file(tmp_path / "out" / WEIGHTS)


def test_quantized_file_is_prepared_from_its_metadata(one: Path) -> None:
    from gpt_fast.quantize import Scheme
    from gpt_fast.quantize.rtn import quantize_weight

    scheme, tensors = Scheme(8, 0), load_file(one / WEIGHTS)
    stored = quantize_weight(tensors.pop("output.weight"), scheme, name="output")
    tensors |= {f"output.{part}": tensor for part, tensor in stored.items()}
    modules = json.dumps({"version": 1, "modules": {"output": str(scheme)}})
    save_file(tensors, one / "model_x.safetensors", metadata={**FORMAT, "quantization": modules})
    add_to_manifest(one, {"model_x.safetensors": hash_file(one / "model_x.safetensors")})
    loaded = load_checkpoint(one / "model_x.safetensors", device="cpu")
    assert loaded.quantization is not None and loaded.model.output.weight.dtype == torch.int8
    tokens = torch.arange(20)[None]
    assert (logits(loaded, tokens) - logits(load_checkpoint(one, device="cpu"), tokens)).abs().max() < 0.5


# ------------------------------------------------------------------------------------------ what is refused


def test_truncated_at_twenty_offsets(one: Path) -> None:
    data = (one / WEIGHTS).read_bytes()
    for number in range(20):
        (one / WEIGHTS).write_bytes(data[: number * (len(data) - 1) // 19])
        refuse(one, WEIGHTS)
    (one / WEIGHTS).write_bytes(data[:-1])
    refuse(one, WEIGHTS, "tensor output.weight", "cut off")


@pytest.mark.slow
def test_two_hundred_bit_flips(one: Path) -> None:
    clean = (one / WEIGHTS).read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        data = bytearray(clean)
        position = rng.randrange(len(data))
        data[position] ^= 1 << rng.randrange(8)
        (one / WEIGHTS).write_bytes(data)
        refuse(one, WEIGHTS)


def test_verify_false_trusts_content_but_not_sizes_nor_other_files(one: Path) -> None:
    data = bytearray((one / WEIGHTS).read_bytes())
    data[-2] ^= 1
    (one / WEIGHTS).write_bytes(data)
    load_checkpoint(one, device="cpu", verify=False)
    refuse(one, WEIGHTS, "sha256")
    config = (one / "config.json").read_text()
    (one / "config.json").write_text(config.replace("1e-06", "2e-06"))
    with pytest.raises(CheckpointError, match=r"config\.json: its sha256"):
        load_checkpoint(one, device="cpu", verify=False)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: t.pop("layers.1.ffn_norm.weight"), ("layers.1.ffn_norm.weight", "missing")),
        (lambda t: t.update(extra=torch.zeros(2)), ("tensor extra", "not part of this model")),
        (lambda t: t.update({"norm.weight": torch.ones(47)}), ("norm.weight", "[47]", "[48]")),
        (lambda t: t.update({"norm.weight": torch.ones(48, dtype=torch.int32)}), ("norm.weight", "torch.int32")),
        (lambda t: t.update({"norm.weight": torch.ones(48).half()}), ("torch.float16", "torch.float32")),
        (lambda t: t["layers.2.attention.wo.weight"].view(-1)[7:8].fill_(float("nan")), ("layers.2.attention.wo",)),
        (lambda t: t["layers.0.feed_forward.w2.weight"].view(-1)[-1:].fill_(float("-inf")), ("layers.0.feed_forward",)),
        (lambda t: t.update({"tok_embeddings.weight": torch.zeros(161, 48)}), ("tok_embeddings", "[161, 48]")),
    ],
)
def test_wrong_tensors(change: Callable[[dict[str, torch.Tensor]], object], names: tuple[str, ...], one: Path) -> None:
    rewrite(one, change)
    refuse(one, WEIGHTS, *names)


def test_wrong_vocabulary_in_the_config(one: Path) -> None:
    values = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps({**values, "vocab_size": 150}))
    list_files(one)
    refuse(one, "tok_embeddings.weight", "[160, 48]", "[150, 48]")


def test_pickles_are_refused_unread(one: Path) -> None:
    (one / "pickled").mkdir()
    (one / "pickled" / "model.pth").write_bytes(b"\x80\x02anything")
    refuse(one / "pickled" / "model.pth", "model.pth", "model.safetensors is meant", "convert_hf_checkpoint.py")
    (one / "pickled" / "model.pth").rename(one / WEIGHTS)
    refuse(one, WEIGHTS, "pickled")


def test_what_is_no_converted_file_is_told_which_are(one: Path) -> None:
    """gpt-fast's habit is --checkpoint_path DIR/model.pth."""
    shutil.copy(one / WEIGHTS, one / "model_int8.safetensors")
    list_files(one)
    refuse(one / "model.pth", "model.pth: no such file", f"{one} has: model.safetensors, model_int8.safetensors")
    (one / "model.pth").write_bytes(b"\x80\x02anything")
    refuse(one / "model.pth", "is a pickled checkpoint", "model.safetensors, model_int8.safetensors")
    refuse(one / "config.json", "config.json: is no weights file", "model.safetensors, model_int8.safetensors")
    shutil.copy(one / "config.json", one / "x.safetensors")
    list_files(one)
    refuse(one / "x.safetensors", "is no safetensors file: it does not begin with the length of a header")


def test_missing_files(one: Path) -> None:
    refuse(one / "model_int8.safetensors", "model_int8.safetensors: no such file")
    refuse(one / "nowhere", "nowhere: no such file")
    (one / "manifest.json").unlink()
    refuse(one, "manifest.json: no such file")


def test_files_outside_the_manifest_are_refused(one: Path) -> None:
    shutil.copy(one / WEIGHTS, one / "model_other.safetensors")
    refuse(one / "model_other.safetensors", "is not in manifest.json")
    (one / "generation_config.json").unlink()
    refuse(one, "generation_config.json: no such file")


@pytest.mark.parametrize("name", [*NAMES, "additional_chat_templates/tool_use.jinja"])
def test_nothing_is_read_that_the_manifest_does_not_list(name: str, one: Path) -> None:
    (one / "additional_chat_templates").mkdir()
    records = read_manifest(one)
    records.pop(name, None)
    write_manifest(one, records, {})
    (one / name).write_text("{}")
    refuse(one, f"{name}: is not in manifest.json: take it away, or convert again")
    (one / name).unlink()
    (one / "notes.txt").write_text("not read, so no matter")
    load_checkpoint(one, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_what_says_what_to_read_is_listed_too(name: str, many: Path) -> None:
    records = read_manifest(many)
    del records[name]
    write_manifest(many, records, {})
    refuse(many, f"{name}: is not in manifest.json")


def test_swapped_and_missing_shards(many: Path) -> None:
    first, second, *_ = sorted(many.glob("model-*.safetensors"))
    first.rename(many / "x")
    second.rename(first)
    (many / "x").rename(second)
    refuse(many, "model-00001")
    list_files(many)
    refuse(many, "model-00001", "is not where the index says")
    second.unlink()
    refuse(many, "model-00002")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "", 3, None])
def test_an_index_names_plain_files_only(name: object, many: Path) -> None:
    index = many / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["norm.weight"] = name
    index.write_text(json.dumps(values))
    list_files(many)
    refuse(many, "index.json", "norm.weight")


def test_hugging_face_files_are_not_served_unconverted(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted / "hf", tmp_path / "hf")
    list_files(tmp_path / "hf")
    refuse(tmp_path / "hf", WEIGHTS, "was not written by gpt-fast")


# ------------------------------------------------------------------------------------- safetensors files


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2, 2).half(),
        "d": torch.randint(-128, 127, (9,), dtype=torch.int8),
        "e": torch.empty(0, 4),
        "f": torch.tensor(3.0),
    }
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    record = write_file(tmp_path / "ours", specs, lambda spec: tensors[spec.name], metadata={"k": "v"})
    assert record == hash_file(tmp_path / "ours")
    read = load_file(tmp_path / "ours")
    save_file(tensors, tmp_path / "theirs", metadata={"k": "v"})
    theirs = SafetensorsFile(tmp_path / "theirs")
    assert theirs.metadata == {"k": "v"}
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor) and torch.equal(theirs.tensor(name), tensor), name
    assert SafetensorsFile(tmp_path / "ours").data_start % 64 == 0


@pytest.mark.parametrize("length", range(100, 260, 8))
def test_any_header_length_is_read(length: int, tmp_path: Path) -> None:
    """A header of 128 bytes begins with 0x80, as a pickle does."""
    header = json.dumps({"__metadata__": {"k": ""}})
    header = header.replace('""', '"' + "x" * (length - len(header)) + '"')
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert len(header) == length and SafetensorsFile(tmp_path / "x.safetensors").entries == {}


def header_file(path: Path, header: str, data: bytes = b"\0" * 8) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}', "twice"),
        ('{"a":{"dtype":"F8","shape":[8],"data_offsets":[0,8]}}', "tensor a: unknown dtype"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "tensor a: has 8 bytes"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "tensor a: bad shape"),
        ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,9]}}', "tensor a: bad shape"),
        ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "tensor a: is cut off"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "tensor a: overlaps or leaves a gap"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "4 bytes after"),
        ('{"a":{"dtype":"F32","shape":[2]}}', "tensor a: header entry"),
        ('{"__metadata__":{"a":1}}', "__metadata__"),
        ("[1]", "not a JSON object"),
        ("{" * 9, "not JSON"),
    ],
)
def test_bad_headers_are_named(header: str, names: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="x.safetensors: .*" + names):
        SafetensorsFile(header_file(tmp_path / "x.safetensors", header))


@given(st.binary(max_size=60), st.integers(0, 200), st.integers(0, 30))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2, 2)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:at] + junk + data[at + len(junk) : len(data) - cut])
    try:
        file = SafetensorsFile(path)
        for name in file.entries:
            file.tensor(name)
    except CheckpointError as error:
        assert "\n" not in str(error)


# ------------------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 2, "files": {}}',
        '{"version": 1, "files": {"../x": {"size": 1, "sha256": "0"}}}',
        '{"version": 1, "files": {"x": {"size": 1, "sha256": "zz"}}}',
        '{"version": 1, "files": {"x": 1}}',
    ],
)
def test_malformed_manifests_are_refused(text: str, one: Path) -> None:
    (one / "manifest.json").write_text(text)
    refuse(one, "manifest.json")


def test_staging_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), staging(tmp_path / "new") as stage:
        (stage / "half").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_installing_never_leaves_a_mixture(one: Path, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "config.json").write_text("{}")
    absent = {"config.json": FileRecord(2, "0" * 64), WEIGHTS: FileRecord(1, "0" * 64)}
    with pytest.raises(OSError):
        install(tmp_path / "stage", one, absent, {})
    refuse(one, "manifest.json: no such file")
