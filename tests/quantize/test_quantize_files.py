"""Quantized files: what is written, that it is the same twice, stays small in memory, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.checkpoint.safetensors_file import SafetensorsFile, TensorSpec, write_weights
from gpt_fast.convert.gguf import gguf_job
from gpt_fast.convert.gguf_repack import REPACK
from gpt_fast.convert.quantized import Calibration, quantize_checkpoint, repack_gguf
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import CheckpointError, load_checkpoint
from gpt_fast.measure.texts import calibration_part, default_text, file_text, held_out_part, split, windows
from gpt_fast.quantize import QuantizationError, Quantized, pack
from gpt_fast.quantize.__main__ import main
from gpt_fast.quantize.rtn import dequantize_weight, quantize_in_bands, quantize_weight
from gpt_fast.quantize.scheme import Scheme
from support.manifest import list_files
from support.quantize_memory import peaks, write_random
from support.quantized import (
    CPU,
    dequantized_model,
    logits_of,
    random_model,
    small_config,
    write_byte_tokenizer,
    write_checkpoint,
)

BYTES = {"vocab_size": 257}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def quantization_of(path: Path) -> dict:
    return json.loads(SafetensorsFile(path).metadata["quantization"])


# ----------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize(("mode", "name"), [("int8", "model_int8"), ("int4", "model_int4.g64")])
@pytest.mark.parametrize("family", ["tied", "untied", "experts"])
def test_a_quantized_file_loads_as_the_quantized_model(family, mode, name, tmp_path):
    changes = {"tied": {}, "untied": {"tie_embeddings": False}, "experts": {"n_expert": 3, "n_expert_per_token": 2}}
    model = random_model(small_config(**changes[family]))
    directory = write_checkpoint(tmp_path, model)
    path = quantize_checkpoint(directory, mode=mode, groupsize=64)
    assert path == directory / f"{name}.safetensors"
    loaded = load_checkpoint(path, device="cpu")
    tokens = torch.randint(0, 96, (2, 20))
    expected = logits_of(dequantized_model(model, mode=mode, groupsize=64), tokens)
    torch.testing.assert_close(logits_of(loaded.model, tokens), expected)
    pack(loaded.model)
    torch.testing.assert_close(logits_of(loaded.model, tokens), expected, rtol=1e-4, atol=1e-4)
    metadata = quantization_of(path)
    assert metadata["mode"] == mode and metadata["groupsize"] == (None if mode == "int8" else 64)
    assert metadata["source"] == {"model.safetensors": digest(directory / "model.safetensors")}
    load_checkpoint(directory, device="cpu")  # the source is as it was


def test_made_twice_the_bytes_are_the_same(tmp_path):
    model = random_model(small_config())
    first = [digest(quantize_checkpoint(write_checkpoint(tmp_path / "a", model), mode=m)) for m in ("int8", "int4")]
    second = [digest(quantize_checkpoint(write_checkpoint(tmp_path / "b", model), mode=m)) for m in ("int8", "int4")]
    assert first == second
    assert digest(quantize_checkpoint(tmp_path / "a", mode="int4")) == first[1]  # over its own earlier file


def test_weights_keep_the_source_dtype_where_they_are_not_quantized(tmp_path):
    model = random_model(small_config()).to(torch.bfloat16)
    path = quantize_checkpoint(write_checkpoint(tmp_path, model), mode="int4")
    entries = SafetensorsFile(path).entries
    assert entries["norm.weight"].dtype == torch.bfloat16
    loaded = load_checkpoint(path, device="cpu").model
    assert loaded.layers[0].attention.wqkv.dtype == torch.bfloat16
    assert logits_of(loaded, torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32


def test_bands_of_rows_give_the_bytes_of_the_whole(monkeypatch):
    weight = torch.randn(37, 96)
    monkeypatch.setattr("gpt_fast.quantize.rtn.ELEMENTS_AT_ONCE", 5 * 96)
    for scheme in (Scheme(8, 0), Scheme(8, 32), Scheme(4, 64)):
        bands = quantize_in_bands(weight, scheme, device=CPU, name="w")
        whole = quantize_weight(weight, scheme, name="w")
        assert all(torch.equal(bands[part], whole[part]) for part in whole)
    weight[23, 4] = float("nan")
    with pytest.raises(QuantizationError, match="w: row 23 holds NaN"):
        quantize_in_bands(weight, Scheme(8, 0), device=CPU, name="w")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_peak_memory_is_a_tensor_not_the_model(mode, tmp_path):
    config = small_config(dim=1024, intermediate_size=4096, head_dim=64, n_head=16, n_layer=12, vocab_size=4096)
    layer = write_random(tmp_path, config)
    peak, anonymous = peaks(tmp_path, mode)
    print(f"{mode} {layer=} {peak=} {anonymous=}")
    assert peak < 1.3 * layer + 250e6 < (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_gptq_holds_half_of_one_hessian(tmp_path):
    """And never a second whole matrix; docs/quantization.md has the figures at 70B's shape."""
    config = small_config(dim=64, intermediate_size=6144, n_layer=1, tie_embeddings=False)
    layer = write_random(tmp_path, config)
    whole = 4 * config.intermediate_size**2
    peak, anonymous = peaks(tmp_path, "int4-gptq", windows=1, length=64)
    print(f"{layer=} {whole=} {peak=} {anonymous=}")
    assert whole / 2 < anonymous < 1.3 * layer + whole + 150e6


# -------------------------------------------------------------------------------------------- refusals


def test_refusals_are_one_line_and_leave_nothing_behind(tmp_path):
    directory = write_checkpoint(tmp_path, random_model(small_config()))
    before = sorted(p.name for p in directory.iterdir())
    for options, message in [
        ({"mode": "int2"}, r"mode: unknown \(got 'int2', allowed int8, int4, int4-gptq\)"),
        ({"mode": "int4", "groupsize": 48}, r"groupsize: unknown for int4 \(got 48, allowed 32, 64, 128, 256\)"),
        ({"mode": "int4-gptq"}, "mode: int4-gptq needs a calibration text"),
    ]:
        with pytest.raises(QuantizationError, match=message):
            quantize_checkpoint(directory, **options)
    assert sorted(p.name for p in directory.iterdir()) == before


def test_an_already_quantized_input_is_refused_naming_both(tmp_path):
    directory = write_checkpoint(tmp_path, random_model(small_config()))
    path = quantize_checkpoint(directory, mode="int8")
    with pytest.raises(
        QuantizationError, match=r"model_int8.safetensors: is already quantized \(int8\), cannot be made int4.g32"
    ):
        quantize_checkpoint(path, mode="int4")


def rewritten(path: Path, *, tensors: dict, modules: dict[str, str | None]) -> Path:
    """The quantized file with other tensors, or another scheme for a module (None: none); the manifest agrees."""
    file = SafetensorsFile(path)
    state = {name: file.tensor(name).clone() for name in file.entries} | tensors
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    said = quantization_of(path)
    said["modules"] = {name: scheme for name, scheme in (said["modules"] | modules).items() if scheme is not None}
    metadata = file.metadata | {"quantization": json.dumps(said)}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    write_weights(path.parent, path.stem, specs, lambda spec: state[spec.name], metadata=metadata)
    list_files(path.parent)
    return path


WO = "layers.0.attention.wo"


@pytest.mark.parametrize(
    ("said", "holds", "message"),
    [
        (None, {}, r"wo: the file holds weight uint8 \[96, 48\], scale .*, its metadata does not say it is quantized"),
        (
            "int8.g32",
            {},
            r"wo: the file holds weight uint8 \[96, 48\], .* says int8.g32, which is weight int8 \[96, 96\]",
        ),
        (
            "int4.g32",
            {"weight": torch.zeros(96, 96)},
            r"wo: the file holds weight float32 \[96, 96\], .* weight uint8 \[",
        ),
        (
            "int4.g32",
            {"min": None},
            r"wo: the file holds weight .*, scale float16 \[96, 3\], its metadata says int4.g32",
        ),
        ("int4.g32", {"scale": torch.zeros(96, 2).half()}, r"scale float16 \[96, 2\], .* scale float16 \[96, 3\]"),
    ],
)
def test_a_file_whose_metadata_contradicts_its_tensors_is_refused(said, holds, message, tmp_path):
    path = quantize_checkpoint(write_checkpoint(tmp_path, random_model(small_config())), mode="int4")
    rewritten(path, tensors={f"{WO}.{part}": tensor for part, tensor in holds.items()}, modules={WO: said})
    with pytest.raises(QuantizationError, match=message) as caught:
        load_checkpoint(path, device="cpu")
    assert "\n" not in str(caught.value)


def test_nan_in_a_source_is_refused_by_tensor_and_row(tmp_path):
    model = random_model(small_config())
    model.layers[1].feed_forward.w2.weight[7, 3] = float("nan")
    directory = write_checkpoint(tmp_path, model)
    with pytest.raises(QuantizationError, match=r"layers\.1\.feed_forward\.w2\.weight: row 7 holds NaN or infinity"):
        quantize_checkpoint(directory, mode="int8")
    assert not (directory / "model_int8.safetensors").exists()


def test_a_damaged_source_or_result_is_refused(tmp_path):
    directory = write_checkpoint(tmp_path, random_model(small_config()))
    path = quantize_checkpoint(directory, mode="int4")
    for target, use in (
        (path, lambda: load_checkpoint(path, device="cpu")),
        (directory / "model.safetensors", lambda: quantize_checkpoint(directory, mode="int8")),
    ):
        data = bytearray(target.read_bytes())
        data[-100] ^= 1
        target.write_bytes(data)
        with pytest.raises(CheckpointError, match=target.name):
            use()


# ---------------------------------------------------------------------------------------------- GGUF

KINDS = {name: getattr(gguf.GGMLQuantizationType, name) for name in ("Q4_0", "Q4_1", "Q8_0")}


def write_gguf(path: Path, model, *, kinds: dict[str, str], arch: str = "llama", default: str = "Q4_1") -> None:
    """The model in GGUF; kinds: block format by a part of the tensor's name."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_eos_token_id(2)
    q, kv = config.n_head * config.head_dim, config.kv_dim
    tensors = {"token_embd.weight": model.tok_embeddings.weight, "output_norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        three = layer.attention.wqkv.weight.split((q, kv, kv))
        tensors |= {f"blk.{i}.attn_{name}.weight": weight for name, weight in zip("qkv", three, strict=True)}
        if config.qkv_bias:
            biases = layer.attention.wqkv.bias.split((q, kv, kv))
            tensors |= {f"blk.{i}.attn_{name}.bias": bias for name, bias in zip("qkv", biases, strict=True)}
        tensors[f"blk.{i}.attn_output.weight"] = layer.attention.wo.weight
        names = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
        tensors |= {f"blk.{i}.{theirs}.weight": getattr(layer.feed_forward, w).weight for theirs, w in names.items()}
        norms = {"attn_norm": layer.attention_norm, "ffn_norm": layer.ffn_norm}
        tensors |= {f"blk.{i}.{theirs}.weight": norm.weight for theirs, norm in norms.items()}
    for name, tensor in tensors.items():
        array = tensor.detach().numpy()
        kind = next((kind for part, kind in kinds.items() if part in name), default if array.ndim == 2 else "F32")
        if kind != "F32":
            number = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(name, gguf.quants.quantize(array, number), raw_dtype=number)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(tmp_path: Path, *, qkv_bias: bool = False, **options) -> tuple[Path, Path]:
    """A GGUF file and the checkpoint converted from it."""
    model = random_model(small_config(**BYTES, qkv_bias=qkv_bias))
    file, directory = tmp_path / "model.gguf", tmp_path / "out"
    write_gguf(file, model, **options)
    write_byte_tokenizer(tmp_path)
    job = gguf_job(file, make_tokenizer=lambda metadata: (tmp_path / "tokenizer.json").read_bytes())
    convert(job, directory, dtype="float32", progress=False)
    return file, directory


@pytest.mark.parametrize(
    ("kinds", "default", "name"),
    [
        ({"token_embd": "Q8_0"}, "Q4_1", "model_int4.g32"),
        ({"token_embd": "Q8_0", "ffn_down": "Q4_1", "attn_v": "Q4_1"}, "Q4_0", "model_int4.g32"),
        ({"token_embd": "F32"}, "Q4_0", "model_int4.g32"),
        ({}, "Q8_0", "model_int8.g32"),
    ],
)
def test_gguf_blocks_are_repacked_without_loss(kinds, default, name, tmp_path):
    file, directory = converted(tmp_path, kinds=kinds, default=default)
    path = repack_gguf(directory, file)
    assert path.name == f"{name}.safetensors"
    first = digest(path)
    main(["--checkpoint_path", str(directory), "--gguf", str(file)])
    assert digest(path) == first
    source, repacked = (load_checkpoint(p, device="cpu").model for p in (directory, path))
    modules = {n: m for n, m in repacked.named_modules() if isinstance(m, Quantized)}
    assert len(modules) == 4 * 2 + 2 + (kinds.get("token_embd") != "F32")
    for module, quantized in modules.items():
        assert torch.equal(quantized.dequantize(), source.get_submodule(module).weight)
    assert quantization_of(path)["repacked"] == {"model.gguf": digest(file)}


def test_queries_and_keys_of_other_architectures_are_reordered(tmp_path):
    file, directory = converted(tmp_path, kinds={"token_embd": "Q8_0"}, arch="qwen2", qkv_bias=True)
    path = repack_gguf(directory, file)
    source, repacked = (load_checkpoint(p, device="cpu").model for p in (directory, path))
    assert torch.equal(repacked.layers[0].attention.wqkv.dequantize(), source.layers[0].attention.wqkv.weight)


def test_a_gguf_that_is_not_the_checkpoints_source_is_refused(tmp_path):
    _, directory = converted(tmp_path, kinds={"token_embd": "Q8_0"})
    other = tmp_path / "other.gguf"
    model = random_model(small_config(**BYTES), seed=5)
    write_gguf(other, model, kinds={"token_embd": "Q8_0"})
    with pytest.raises(QuantizationError, match=r"tok_embeddings: other\.gguf holds other values than the checkpoint"):
        repack_gguf(directory, other)
    write_gguf(other, model, kinds={"": "F32"})
    with pytest.raises(QuantizationError, match="holds no quantized weights"):
        repack_gguf(directory, other)


def test_blocks_that_cannot_share_a_module_are_refused_by_name(tmp_path):
    file, directory = converted(tmp_path, kinds={"token_embd": "Q8_0", "attn_k": "Q8_0"})
    with pytest.raises(QuantizationError, match=r"layers\.0\.attention\.wqkv: Q4_1 and Q8_0 in model\.gguf cannot be"):
        repack_gguf(directory, file)


@given(
    kind=st.sampled_from(sorted(KINDS)), rows=st.integers(1, 4), blocks=st.integers(1, 3), seed=st.integers(0, 2**31)
)
def test_any_block_means_what_ggufs_own_decoder_says(kind, rows, blocks, seed):
    """Random bytes, also those that no quantizer would write, with finite scales."""
    generator = np.random.default_rng(seed)
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
    data = generator.integers(0, 256, (rows, blocks, sizes[kind]), dtype=np.uint8)
    data[..., [1, 3] if kind == "Q4_1" else [1]] &= 0b10111011  # no infinite or NaN float16, nor one 8 d overflows
    expected = gguf.quants.dequantize(data.reshape(rows, -1), KINDS[kind])
    parts = REPACK[kind](torch.from_numpy(data))
    got = dequantize_weight(parts, Scheme(8 if kind == "Q8_0" else 4, 32))
    assert torch.equal(got, torch.from_numpy(expected))


# -------------------------------------------------------------------------------------- text, command


def test_the_built_in_text_is_split_without_a_common_paragraph():
    text = default_text()
    calibration, held_out = (part(text).content.split("\n\n") for part in (calibration_part, held_out_part))
    assert not set(calibration) & set(held_out)
    share = sum(map(len, calibration)) / sum(map(len, calibration + held_out))
    assert 0.68 < share < 0.72
    assert calibration_part(text).sha256 == text.sha256  # of the whole, for comparing runs


def test_another_pythons_text_is_taken_with_a_warning(monkeypatch):
    monkeypatch.setattr("gpt_fast.measure.texts.DEFAULT_SHA256", "0" * 64)
    with pytest.warns(UserWarning, match=r"has sha256 [0-9a-f]{12}, not 000000000000"):
        default_text()


@given(paragraphs=st.lists(st.text(alphabet="ab \n", max_size=12), max_size=12))
def test_splitting_loses_no_paragraph(paragraphs):
    content = "\n\n".join(paragraphs)
    first, second = split(content)
    whole = dict.fromkeys(p for p in content.split("\n\n") if p.strip())
    assert [p for part in (first, second) for p in part.split("\n\n") if p.strip()] == list(whole)


def test_windows_are_spread_and_begin_with_the_prefix():
    rows = windows(list(range(100)), length=11, limit=5, prefix=[-1])
    assert [row[:2] for row in rows] == [[-1, 0], [-1, 20], [-1, 40], [-1, 60], [-1, 80]]
    assert all(len(row) == 11 for row in rows)
    with pytest.raises(ValueError, match="the text has 5 tokens, fewer than one window of 11"):
        windows([1] * 5, length=11, limit=1, prefix=[])


def test_a_text_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "text"
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        file_text(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as UTF-8 text"):
        file_text(path)


@pytest.fixture(scope="module")
def byte_checkpoint(tmp_path_factory):
    model = random_model(small_config(**BYTES))
    return write_checkpoint(tmp_path_factory.mktemp("bytes"), model, tokenizer=True)


GPTQ = ["--mode", "int4-gptq", "--calibration_limit", "4", "--calibration_seq_length", "48"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "model_int8"),
        (["-q", "int4", "--groupsize", "128", "--label", "_mine_"], "model_mine_int4.g128"),
        ([*GPTQ, "--percdamp", "0.05", "--blocksize", "64"], "model_int4-gptq.g32"),
        ([*GPTQ, "--groupsize", "64", "--no-act_order", "--calibration_text", __file__], "model_int4-gptq.g64"),
        ([*GPTQ, "--groupsize", "256", "--calibration_tasks", "basics"], "model_int4-gptq.g256"),
    ],
)
def test_the_command_writes_what_it_says(flags, name, byte_checkpoint, capsys):
    main(["--checkpoint_path", str(byte_checkpoint), *flags])
    captured = capsys.readouterr()
    path = Path(captured.out.strip())
    assert path == byte_checkpoint / f"{name}.safetensors"
    assert "100%" in captured.err  # the bar
    first = digest(path)
    main(["--checkpoint_path", str(byte_checkpoint), *flags])
    assert digest(path) == first
    load_checkpoint(path, device="cpu")
    if "gptq" in name:
        calibration = quantization_of(path)["calibration"]
        assert (calibration["windows"], calibration["length"]) == (4, 48)
        assert calibration["act_order"] is ("--no-act_order" not in flags)
        assert len(calibration["text_sha256"]) == 64


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mode", "int4", "--groupsize", "33"],
            "error: groupsize: unknown for int4 (got 33, allowed 32, 64, 128, 256)",
        ),
        (
            ["--mode", "int8", "--groupsize", "32"],
            "error: --groupsize: has no effect: --mode int8 has a scale a row (allowed with int4 and int4-gptq)",
        ),
        (
            ["--gguf", "a.gguf", "--groupsize", "32"],
            "error: --groupsize: has no effect: --gguf takes the blocks of a.gg",
        ),
        (
            ["--gguf", "a.gguf", "--mode", "int8"],
            "error: --mode: has no effect: --gguf takes the blocks of a.gguf as th",
        ),
        (["--gguf", "a.gguf", "--embedding", "keep"], "error: --embedding: has no effect: --gguf takes the blocks of"),
        (["--gguf", "a.gguf", "--device", "cpu"], "error: --device: has no effect: --gguf takes the blocks of a.gguf"),
        (
            [*GPTQ, "--calibration_text", "a.txt", "--calibration_tasks", "basics"],
            "error: --calibration_tasks: has no effect: --calibration_text is read instead",
        ),
        ([*GPTQ, "--percdamp", "-1"], "error: --percdamp: out of range (got -1.0, allowed 0.0..1.0)"),
        (
            ["--percdamp", "0.01"],
            "error: --percdamp: has no effect: --mode int8 calibrates nothing (allowed with int4-g",
        ),
        (
            ["--mode", "int4", "--no-act_order"],
            "error: --act_order: has no effect: --mode int4 calibrates nothing (all",
        ),
        (
            ["--gguf", "a.gguf", "--percdamp", "0.1"],
            "error: --percdamp: has no effect: --gguf takes the blocks of a.gg",
        ),
        (["--device", "mps"], "error: --device: unknown device (got 'mps', allowed cpu, cuda, cuda:N)"),
        (["--device", "abacus"], "error: --device: unknown device (got 'abacus', allowed cpu, cuda, cuda:N)"),
        (
            [*GPTQ, "--calibration_seq_length", "9999999"],
            "error: --calibration_seq_length: out of range (got 9999999, allowed 8..64)",
        ),
        ([*GPTQ, "--calibration_text", "/nowhere"], "error: /nowhere: cannot be read as UTF-8 text"),
        (["--gguf", __file__], "is not a GGUF file"),
    ],
)
def test_the_command_refuses_in_one_line(flags, message, byte_checkpoint, capfd):
    with pytest.raises(SystemExit) as caught:
        main(["--checkpoint_path", str(byte_checkpoint), *flags])
    assert caught.value.code == 2 and message in capfd.readouterr().err.splitlines()[-1]


def test_gptq_needs_windows_that_fit_the_text(byte_checkpoint, tmp_path, capfd):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit):
        main(["--checkpoint_path", str(byte_checkpoint), *GPTQ, "--calibration_text", str(tmp_path / "short.txt")])
    assert "the text has 9 tokens, fewer than one window of 48" in capfd.readouterr().err


@pytest.mark.slow
def test_calibration_is_recorded_and_changes_the_file(tmp_path):
    directory = write_checkpoint(tmp_path, random_model(small_config()))
    digests = []
    for seed in (1, 2, 1):
        tokens = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(seed))
        path = quantize_checkpoint(directory, mode="int4-gptq", calibration=Calibration(tokens, "random", str(seed)))
        assert quantization_of(path)["calibration"]["text_sha256"] == str(seed)
        digests.append(digest(path))
    assert digests[0] == digests[2] != digests[1]


def test_a_wrong_path_is_one_line_and_no_bar(byte_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path, reason in (("model.pth", "no such file, give a file that"), ("config.json", "is no weights file")):
        with pytest.raises(SystemExit):
            main(["--checkpoint_path", str(byte_checkpoint / path)])
        error = capfd.readouterr().err
        assert error.startswith(f"error: {byte_checkpoint / path}: {reason}") and error.count("\n") == 1, error
