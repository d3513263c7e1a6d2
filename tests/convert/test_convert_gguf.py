"""GGUF: every block format against a scalar decoder, every architecture's logits, and damaged files refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.gguf import GgufSource, config_from_gguf, gguf_job
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import load_checkpoint
from support.paths import ROOT
from support.tiny_models import SIZES, logits, make, tokenizer_json

ARCH = {
    "llama-gqa": "llama",
    "llama-mha-tied": "llama",
    "llama-biases": "llama",
    "llama3": "llama",
    "mixtral": "llama",
    "llama-linear": "llama",
    "qwen2-tied": "qwen2",
    "qwen3": "qwen3",
    "qwen2-yarn": "qwen2",
    "phi3": "phi3",
    "phi3-long": "phi3",
}


def some_tokenizer(metadata: Mapping[str, Any]) -> bytes:
    return tokenizer_json()


def permute(tensor: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's query and key rows."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def write_model(family: str, path: Path, *, change: Callable[[gguf.GGUFWriter], None] | None = None) -> torch.nn.Module:
    """A family's tiny model as llama.cpp would store it, in float32, by gguf's own table of names."""
    model, arch = make(family), ARCH[family]
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if arch == "phi3" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if "num_local_experts" in config.to_dict():
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_chat_template("{{ messages }}")
    add_rope(writer, model)
    add_tensors(writer, model, arch)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_rope(writer: gguf.GGUFWriter, model: torch.nn.Module) -> None:
    rope = model.config.rope_parameters
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        scaled = model.model.rotary_emb.inv_freq.double()
        plain = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
        writer.add_tensor("rope_freqs.weight", (plain / scaled).float().numpy())
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(model.model.rotary_emb.attention_scaling)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], dtype=np.float32))


def add_tensors(writer: gguf.GGUFWriter, model: torch.nn.Module, arch: str) -> None:
    config = model.config
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        array = tensor.numpy()
        if arch == "llama" and ".self_attn.q_proj" in name:
            array = permute(array, config.num_attention_heads)
        if arch == "llama" and ".self_attn.k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(array, 2, axis=1)
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_gate_exps.weight", np.ascontiguousarray(gate))
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_up_exps.weight", np.ascontiguousarray(up))
        elif name.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", array)
        else:
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, name
            writer.add_tensor(theirs, np.ascontiguousarray(array))


@pytest.mark.parametrize("family", ARCH)
def test_logits_are_transformers(family: str, tmp_path: Path) -> None:
    reference = write_model(family, tmp_path / "m.gguf")
    convert(
        gguf_job(tmp_path / "m.gguf", make_tokenizer=some_tokenizer), tmp_path / "out", dtype="float32", progress=False
    )
    loaded = load_checkpoint(tmp_path / "out", device="cpu")
    tokens = torch.randint(0, loaded.config.vocab_size, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(tokens).logits
    got = logits(loaded, tokens)
    assert (got - want).abs().max().item() < 1e-4
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    assert loaded.config.eos_ids == (2, 7) and loaded.config.bos_id == 1
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


# ------------------------------------------------------------------------------------------ block formats


def half(data: bytes) -> float:
    return float(np.frombuffer(data, dtype=np.float16)[0])


def decode_q4_k(block: bytes) -> list[float]:
    """ggml's layout: d, dmin, 12 bytes of packed 6-bit scales and mins, 128 bytes of nibbles."""
    d, dmin, packed, quants = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    scales, mins = [], []
    for j in range(8):
        if j < 4:
            scales.append(packed[j] & 63)
            mins.append(packed[j + 4] & 63)
        else:
            scales.append((packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4)
            mins.append((packed[j + 4] >> 4) | (packed[j] >> 6) << 4)
    out = []
    for j in range(8):
        chunk = quants[32 * (j // 2) : 32 * (j // 2) + 32]
        out += [d * scales[j] * ((q >> 4) if j % 2 else (q & 15)) - dmin * mins[j] for q in chunk]
    return out


def decode_q6_k(block: bytes) -> list[float]:
    """ggml's layout: 128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d."""
    low, high, scales, d = block[:128], block[128:192], struct.unpack("16b", block[192:208]), half(block[208:])
    out = [0.0] * 256
    for part in range(2):
        for i in range(32):
            ql, qh = low[64 * part :], high[32 * part + i]
            values = (ql[i] & 15, ql[i + 32] & 15, ql[i] >> 4, ql[i + 32] >> 4)
            for k, value in enumerate(values):
                q = (value | ((qh >> 2 * k) & 3) << 4) - 32
                out[128 * part + 32 * k + i] = d * scales[8 * part + 2 * k + i // 16] * q
    return out


def decode_q4_0(block: bytes) -> list[float]:
    d, quants = half(block[:2]), block[2:]
    return [d * ((q & 15) - 8) for q in quants] + [d * ((q >> 4) - 8) for q in quants]


def decode_q4_1(block: bytes) -> list[float]:
    d, m, quants = half(block[:2]), half(block[2:4]), block[4:]
    return [d * (q & 15) + m for q in quants] + [d * (q >> 4) + m for q in quants]


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * q for q in struct.unpack("32b", block[2:])]


DECODERS = {"Q4_0": decode_q4_0, "Q4_1": decode_q4_1, "Q8_0": decode_q8_0, "Q4_K": decode_q4_k, "Q6_K": decode_q6_k}
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # where float16 values stand


@pytest.mark.parametrize("kind", DECODERS)
def test_block_formats_decode_exactly(kind: str, tmp_path: Path) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[quant]
    rows, blocks = 6, 2
    data = np.random.default_rng(0).integers(0, 256, (rows, blocks, nbytes), dtype=np.uint8)
    for offset in HALVES[kind]:
        scale = np.random.default_rng(1).normal(size=(rows, blocks, 1)).astype(np.float16)
        data[:, :, offset : offset + 2] = scale.view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("t", data.reshape(rows, -1), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "q.gguf")
    want = torch.tensor([[v for b in row for v in DECODERS[kind](b.tobytes())] for row in data])
    assert source.infos["t"].shape == (rows, blocks * elements)
    torch.testing.assert_close(source.read("t"), want.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(source.read("t", (2, 5)), source.read("t")[2:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_formats_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.randn(4, 3, 8).to(dtype)
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    raw = values.view(torch.uint8).numpy().reshape(4, 3, -1)
    writer = gguf.GGUFWriter(tmp_path / "p.gguf", "llama")
    writer.add_tensor("t", raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "p.gguf")
    assert torch.equal(source.read("t"), values.float())
    assert torch.equal(source.read("t", (3, 7)), values.float().flatten(0, 1)[3:7])


# ---------------------------------------------------------------------------------------------- refusals


def refuse(path: Path, out: Path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        convert(gguf_job(path, make_tokenizer=some_tokenizer), out, dtype="float32", progress=False)
    assert not out.exists()
    return str(caught.value)


def test_truncated_at_any_offset_is_refused_by_name(tmp_path: Path) -> None:
    write_model("llama-gqa", tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for number in range(40):
        cut.write_bytes(data[: number * (len(data) - 1) // 39])
        assert "cut.gguf" in refuse(cut, tmp_path / "out")
    cut.write_bytes(data[:-40])
    assert "tensor " in refuse(cut, tmp_path / "out")


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    write_model("llama-gqa", path)
    data = path.read_bytes()
    return path.with_name("fuzzed.gguf"), data, 4000


@given(st.integers(0, 3999), st.binary(min_size=1, max_size=9))
def test_a_corrupt_header_never_crashes(header: tuple[Path, bytes, int], offset: int, junk: bytes) -> None:
    path, data, _ = header
    path.write_bytes(data[:offset] + junk + data[offset + len(junk) :])
    try:
        source = GgufSource(path)
        for name in source.infos:
            source.read(name)
    except (CheckpointError, ConfigError) as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda w: w.add_uint32("llama.unheard_of", 3), "llama.unheard_of"),
        (lambda w: w.add_float32("llama.logit_scale", 2.0), "llama.logit_scale"),
        (lambda w: w.add_tensor("blk.0.extra.weight", np.zeros(4, np.float32)), "blk.0.extra.weight"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "rope.scaling.type"),
    ],
)
def test_unknown_keys_and_tensors_are_refused_by_name(change: Any, names: str, tmp_path: Path) -> None:
    write_model("llama-gqa", tmp_path / "m.gguf", change=change)
    assert names in refuse(tmp_path / "m.gguf", tmp_path / "out")


def test_a_window_llama_cpp_would_not_apply_is_refused(tmp_path: Path) -> None:
    write_model("qwen3", tmp_path / "m.gguf", change=lambda w: w.add_sliding_window(32))
    assert "qwen3.attention.sliding_window" in refuse(tmp_path / "m.gguf", tmp_path / "out")


def test_a_window_makes_llama_mistral(tmp_path: Path) -> None:
    write_model("llama-gqa", tmp_path / "m.gguf", change=lambda w: w.add_sliding_window(32))
    config = config_from_gguf(GgufSource(tmp_path / "m.gguf"))
    assert (config["architectures"], config["sliding_window"]) == (["MistralForCausalLM"], 32)


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "mamba" in refuse(tmp_path / "m.gguf", tmp_path / "out")


def test_nan_is_refused_by_tensor_name(tmp_path: Path) -> None:
    write_model("llama-gqa", tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    offset = source.tensors["blk.1.attn_k.weight"].offset
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[offset : offset + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "m.gguf").write_bytes(data)
    assert "blk.1.attn_k.weight" in refuse(tmp_path / "m.gguf", tmp_path / "out")


def test_config_is_what_the_metadata_says(tmp_path: Path) -> None:
    write_model("llama3", tmp_path / "m.gguf")
    job = gguf_job(tmp_path / "m.gguf", make_tokenizer=some_tokenizer)
    convert(job, tmp_path / "out", dtype="bfloat16", progress=False)
    config = load_model_config(tmp_path / "out")
    assert (config.dim, config.n_layer, config.norm_eps) == (SIZES["hidden_size"], 3, 1e-6)
    assert config.rope_base == 500000.0 and config.rope_scaling is not None
    assert load_checkpoint(tmp_path / "out", device="cpu").model.norm.weight.dtype == torch.bfloat16


def rope_of(path: Path, family: str = "llama-gqa", **keys: Any) -> Any:
    """config.json's rope section of a file with these keys under rope.scaling (rope_: under rope)."""

    def change(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            name = f"llama.rope.{key.removeprefix('rope_')}" if key.startswith("rope_") else f"llama.rope.scaling.{key}"
            add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}
            add[type(value)](name, value)

    write_model(family, path, change=change)
    return config_from_gguf(GgufSource(path)).get("rope_scaling")


YARN: Any = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "beta_slow": 1.0}


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp's type where none is named
        ({"rope_scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "linear", "factor": 1.0, "finetuned": True}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "yarn", "factor": 8.0, "original_context_length": 128}, {**YARN, "beta_fast": 32.0}),
        ({"type": "yarn", "factor": 8.0, "original_context_length": 128, "yarn_beta_fast": 16.0, "yarn_ext_factor": 1.0,
          "attn_factor": 1.0}, {**YARN, "beta_fast": 16.0}),
    ],
)  # fmt: skip
def test_rope_keys(keys: dict[str, Any], want: Any, tmp_path: Path) -> None:
    assert rope_of(tmp_path / "m.gguf", **keys) == want


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("llama-gqa", {"type": "yarn", "factor": 8.0, "attn_factor": 0.7}, r"rope\.scaling\.attn_factor"),
        ("llama-gqa", {"type": "yarn", "factor": 8.0, "yarn_ext_factor": 0.5}, r"rope\.scaling\.yarn_ext_factor"),
        ("llama-gqa", {"type": "yarn", "factor": 8.0, "yarn_log_multiplier": 0.1}, "yarn_log_multiplier: unknown key"),
        ("llama-gqa", {"alpha": 1000.0}, r"rope\.scaling\.alpha: unknown key"),
        ("llama-gqa", {"type": "longrope"}, r"rope\.scaling\.type: is not supported without its factor tensors"),
        ("llama-gqa", {"type": "ntk", "factor": 2.0}, r"rope\.scaling\.type: .*'ntk'"),
        ("llama3", {"factor": 2.0}, r"rope\.scaling\.factor: stands beside factor tensors"),
    ],
)
def test_rope_keys_that_cannot_be_kept_are_named(family: str, keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        rope_of(tmp_path / "m.gguf", family, **keys)


SMOLLM2 = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
SMOLLM2_GGUF = ROOT / "build" / "downloads" / "SmolLM2-135M-Instruct.gguf"


@pytest.mark.model
def test_smollm2_greedy_tokens_are_transformers() -> None:
    """The published Q4_1 file, read by transformers and by us: the same greedy tokens."""
    import tokenizers
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        SMOLLM2_GGUF.parent, gguf_file=SMOLLM2_GGUF.name, dtype=torch.float32
    ).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json"))
    loaded = load_checkpoint(SMOLLM2, device="cpu")
    for prompt in ("<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n", "def fib(n):"):
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        tokens = torch.tensor([ids])
        with torch.no_grad():
            tokens = reference.generate(tokens, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
            want = reference(tokens).logits
        got = logits(loaded, tokens, steps=16)
        assert got[0, len(ids) - 1 : -1].argmax(-1).tolist() == tokens[0, len(ids) :].tolist()
        assert (got - want).abs().max().item() < 1e-3  # logits here reach 30: 1e-3 is float32's last digits
