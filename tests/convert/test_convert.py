"""Conversion from every file format: the same bytes out; memory, drafts and the commands."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_fast.checkpoint.manifest import verify_manifest
from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.draft import draft_job
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.names import half_to_interleaved
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import load_checkpoint
from support.examples import rest_slow
from support.paths import ROOT
from support.tiny_models import SIZES, logits, make, save, tokenizer_json
from support.tokenizer_files import SIZE, sentencepiece_file

TOKENS = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(3))


def run_convert(source: Path, out: Path, **options: Any) -> Path:
    convert(open_job(source), out, progress=False, **options)
    return out


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def save_bin(family: str, directory: Path, *, shards: int = 1) -> None:
    """The family as old torch.save files; transformers 5's in-memory names, lm_head kept where tied."""
    model = make(family)
    directory.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({name: tensors[name] for name in tensors if where[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def meta_state(family: str) -> dict[str, torch.Tensor]:
    """The family's weights under Meta's names and in Meta's RoPE order, by the rule of Meta's own files."""
    model = make(family)
    config, state = model.config, model.state_dict()
    rename = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "",
    }  # fmt: skip
    out = {}
    for name, tensor in state.items():
        for theirs, metas in rename.items():
            name = name.replace(theirs, metas)
        heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        out[name] = tensor.clone()
    return out


def save_meta(directory: Path, *, shards: int, embedding_dim: int = 1, **params: Any) -> None:
    """Meta's release of llama-gqa, cut for `shards` tensor-parallel ranks."""
    directory.mkdir(parents=True)
    values = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "norm_eps": 1e-6, "multiple_of": 96,
              "vocab_size": -1, "max_seq_len": 1024, "ffn_dim_multiplier": 0.7, **params}  # fmt: skip
    (directory / "params.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    state = meta_state("llama-gqa")
    for rank in range(shards):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in state.items():
            last = name.split(".")[-2]
            dim = {"wo": 1, "w2": 1, "tok_embeddings": embedding_dim}.get(last, None if "norm" in last else 0)
            part[name] = tensor if dim is None else tensor.chunk(shards, dim)[rank].clone()
        torch.save(part, directory / f"consolidated.{rank:02d}.pth")


# --------------------------------------------------------------------------------- formats and determinism


@pytest.mark.slow
def test_same_bytes_twice_and_from_any_sharding(tmp_path: Path) -> None:
    save("llama3", tmp_path / "one")
    save("llama3", tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    shuffle_shards(tmp_path / "many", tmp_path / "shuffled")
    want = digests(run_convert(tmp_path / "one", tmp_path / "a"))
    for source, out in (("one", "b"), ("many", "c"), ("shuffled", "d")):
        assert digests(run_convert(tmp_path / source, tmp_path / out)) == want
    assert set(want) == {"config.json", "generation_config.json", "manifest.json", "model.safetensors"}


def shuffle_shards(source: Path, out: Path) -> None:
    """The same tensors in shards of other names and another order."""
    shutil.copytree(source, out)
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    names = sorted(tensors, key=lambda name: hashlib.sha256(name.encode()).digest())
    where = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in reversed(names) if where[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("family", rest_slow(["llama-gqa", "llama-mha-tied", "mixtral", "phi3"]))
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_give_the_safetensors_bytes(family: str, shards: int, tmp_path: Path) -> None:
    save(family, tmp_path / "hf")
    save_bin(family, tmp_path / "bin", shards=shards)
    a, b = run_convert(tmp_path / "hf", tmp_path / "a"), run_convert(tmp_path / "bin", tmp_path / "b")
    assert digests(a)["model.safetensors"] == digests(b)["model.safetensors"]


@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 1), (2, 1), (2, 0)])
def test_meta_files_give_the_hf_weights(shards: int, embedding_dim: int, tmp_path: Path) -> None:
    reference = save("llama-gqa", tmp_path / "hf")
    save_meta(tmp_path / "meta", shards=shards, embedding_dim=embedding_dim)
    run_convert(tmp_path / "hf", tmp_path / "a")
    run_convert(tmp_path / "meta", tmp_path / "b")
    assert digests(tmp_path / "a")["model.safetensors"] == digests(tmp_path / "b")["model.safetensors"]
    with torch.no_grad():
        want = reference(TOKENS).logits
    assert (logits(load_checkpoint(tmp_path / "b", device="cpu"), TOKENS) - want).abs().max() < 1e-4


def test_meta_params_must_state_what_the_file_does_not(tmp_path: Path) -> None:
    save_meta(tmp_path / "a", shards=1, max_seq_len=None)
    save_meta(tmp_path / "b", shards=1, use_scaled_rope=True)
    save_meta(tmp_path / "c", shards=1, use_scaled_rope=True, rope_scale_factor=32)
    save_meta(tmp_path / "d", shards=1, window=3)
    for source, name in (("a", "max_seq_len"), ("b", "rope_scale_factor"), ("d", "window")):
        with pytest.raises(ConfigError, match=name):
            open_job(tmp_path / source)
    assert open_job(tmp_path / "c").model_config.rope_scaling.factor == 32


def test_meta_shards_must_agree(tmp_path: Path) -> None:
    save_meta(tmp_path / "m", shards=3)
    (tmp_path / "m" / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: no such file"):
        open_job(tmp_path / "m")
    torch.save({"norm.weight": torch.ones(48)}, tmp_path / "m" / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth: tensor .* is not in both"):
        open_job(tmp_path / "m")


def gpt_fast_state(family: str) -> dict[str, torch.Tensor]:
    """gpt-fast's model.pth: Meta's names with wq, wk, wv joined."""
    state = meta_state(family)
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"layers.{layer}.attention."
        state[prefix + "wqkv.weight"] = torch.cat([state.pop(prefix + w + ".weight") for w in ("wq", "wk", "wv")])
    return state


def test_gpt_fast_pth_gives_the_hf_bytes(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "hf")
    torch.save(gpt_fast_state("llama-gqa"), tmp_path / "hf" / "model.pth")
    run_convert(tmp_path / "hf", tmp_path / "a")
    run_convert(tmp_path / "hf" / "model.pth", tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


@pytest.mark.slow
def test_gpt_fast_int8_pth_keeps_its_values(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "hf")
    state = gpt_fast_state("llama-gqa")
    quantized, exact = {}, {}
    for name, tensor in state.items():
        exact[name] = tensor
        if tensor.dim() == 2 and "embeddings" not in name:
            scales = (tensor.abs().amax(1) / 127).bfloat16()
            weight = (tensor / scales.float()[:, None]).round().clamp(-128, 127)
            quantized |= {name: weight.to(torch.int8), name.replace("weight", "scales"): scales}
            exact[name] = weight * scales.float()[:, None]
        else:
            quantized[name] = tensor
    torch.save(quantized, tmp_path / "hf" / "model_int8.pth")
    torch.save(exact, tmp_path / "hf" / "model.pth")
    for name, out in (("model_int8.pth", "a"), ("model.pth", "b")):
        script("convert_hf_checkpoint.py", "--source", tmp_path / "hf" / name, "--checkpoint_dir", tmp_path / out)
    loaded = load_checkpoint(tmp_path / "a" / "model_int8.safetensors", device="cpu")
    want = logits(load_checkpoint(tmp_path / "b", device="cpu"), TOKENS)
    assert loaded.quantization is not None and loaded.model.output.weight.dtype == torch.int8
    assert (logits(loaded, TOKENS) - want).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-tied"])
def test_output_shards_with_an_index_when_large(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / "hf")
    one = load_checkpoint(run_convert(tmp_path / "hf", tmp_path / "a"), device="cpu")
    run_convert(tmp_path / "hf", tmp_path / "b", shard_bytes=60_000)
    many = load_checkpoint(tmp_path / "b" / "model.safetensors", device="cpu")
    files = list((tmp_path / "b").glob("model-*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 70_000
    for (name, a), b in zip(one.model.state_dict().items(), many.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_casts_once(dtype: str, tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "hf")
    run_convert(tmp_path / "hf", tmp_path / "a")
    run_convert(tmp_path / "hf", tmp_path / "b", dtype=dtype)
    exact, cast = (load_file(tmp_path / out / "model.safetensors") for out in ("a", "b"))
    for name, tensor in exact.items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), cast[name]), name


def test_converting_again_replaces_all_of_it(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "a")
    save("qwen3", tmp_path / "b")
    run_convert(tmp_path / "a", tmp_path / "out", shard_bytes=60_000)
    run_convert(tmp_path / "b", tmp_path / "out")
    run_convert(tmp_path / "b", tmp_path / "want")
    assert digests(tmp_path / "out") == digests(tmp_path / "want")
    verify_manifest(tmp_path / "out")


def test_interleave_undoes_half_split() -> None:
    rows = torch.arange(12)
    assert half_to_interleaved(rows, 2, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert half_to_interleaved(rows, 2, 4).tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]


# ---------------------------------------------------------------------------------------------- memory

PEAK = """
import sys
from pathlib import Path
import gpt_fast.convert.hf, gpt_fast.convert.run, gpt_fast.load.checkpoint, torch
torch.set_num_threads(1)
torch.aminmax(torch.ones(9))
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
Path('/proc/self/clear_refs').write_text('5')  # the peak is now what is resident
before = status('VmHWM')
{call}
print(status('VmHWM') - before)
"""
CONVERT = (
    "gpt_fast.convert.run.convert(gpt_fast.convert.hf.open_job(Path(sys.argv[1])), Path(sys.argv[2]), progress=False)"
)
LOAD = "kept = gpt_fast.load.checkpoint.load_checkpoint(Path(sys.argv[2]), device='cpu')"


def peak_bytes(call: str, *arguments: Path) -> int:
    """How far a call raises a fresh process's peak resident size."""
    command = [sys.executable, "-c", PEAK.format(call=call), *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def save_large(directory: Path, *, shards: int) -> int:
    """About 300 MB of random Llama in float32; the largest shard's bytes."""
    directory.mkdir()
    sizes = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 512}
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps({**fixed, **sizes, **heads}))
    shapes = {"model.embed_tokens": (16000, 1024), "lm_head": (16000, 1024), "model.norm": (1024,)}
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + "self_attn." + w: (1024 if w in "qo" else 256, 1024) for w in "qkvo"}
        shapes |= {
            prefix + "mlp.gate": (2816, 1024),
            prefix + "mlp.up": (2816, 1024),
            prefix + "mlp.down": (1024, 2816),
        }
        shapes |= {prefix + "input_layernorm": (1024,), prefix + "post_attention_layernorm": (1024,)}
    names = {
        name: name + ("_proj" if name.split(".")[-2] in ("self_attn", "mlp") else "") for name in shapes if "." in name
    }
    tensors = {names.get(name, name) + ".weight": torch.randn(shape) for name, shape in shapes.items()}
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return max((directory / file).stat().st_size for file in set(where.values()))


@pytest.mark.slow
def test_peak_memory_of_conversion_and_loading(tmp_path: Path) -> None:
    shard = save_large(tmp_path / "hf", shards=3)
    total = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert total > 290e6
    converting = peak_bytes(CONVERT, tmp_path / "hf", tmp_path / "out")
    loading = peak_bytes(LOAD, tmp_path / "hf", tmp_path / "out")
    print(f"{total=} {shard=} {converting=} {loading=}")
    largest_tensor = 16000 * 1024 * 4
    assert converting < 2 * largest_tensor + 50e6 < 1.3 * shard + 1e9  # a tensor and its mapped source, no more
    assert total * 0.9 < loading < 1.2 * total


# ---------------------------------------------------------------------------------------------- drafts


def write_tokenizer(directory: Path, **change: Any) -> None:
    (directory / "tokenizer.json").write_bytes(tokenizer_json(**change))


@pytest.mark.slow
def test_draft_takes_the_target_tokenizer(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "target_hf")
    save("llama-mqa", tmp_path / "draft_hf")
    write_tokenizer(tmp_path / "target_hf")
    write_tokenizer(tmp_path / "draft_hf")
    (tmp_path / "target_hf" / "chat_template.jinja").write_text("x")
    target = run_convert(tmp_path / "target_hf", tmp_path / "target")
    script("convert_ckpt.py", "--checkpoint_dir", tmp_path / "draft_hf", "--target_dir", target,
           "--out_dir", tmp_path / "draft")  # fmt: skip
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "draft" / name).read_bytes() == (target / name).read_bytes()
    assert load_checkpoint(tmp_path / "draft", device="cpu").config.n_kv_head == 1


def test_draft_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "target_hf")
    write_tokenizer(tmp_path / "target_hf")
    target = run_convert(tmp_path / "target_hf", tmp_path / "target")
    save("llama-mqa", tmp_path / "draft")
    write_tokenizer(tmp_path / "draft", special=("<a>", "<s>", "<other>"))
    with pytest.raises(CheckpointError, match=r"token 2 is '<other>', but in .* it is '</s>'"):
        draft_job(tmp_path / "draft", target)
    write_tokenizer(tmp_path / "draft")
    assert draft_job(tmp_path / "draft", target).model_config.n_kv_head == 1
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    (tmp_path / "draft" / "config.json").write_text(json.dumps({**config, "vocab_size": 161}))
    with pytest.raises(CheckpointError, match=r"vocab_size is 161, but .* has 160"):
        draft_job(tmp_path / "draft", target)


def test_drafts_are_held_to_added_tokens_and_to_other_kinds_of_tokenizer(tmp_path: Path) -> None:
    """A SentencePiece model and added tokens on both sides; the same vocabulary as tokenizer.json is the same."""
    from transformers import AutoTokenizer

    names = ("<|im_start|>", "<|im_end|>", "<tool>")
    for directory in (tmp_path / "target_hf", tmp_path / "draft"):
        make("llama-gqa", vocab_size=SIZE + 3).save_pretrained(directory)
        (directory / "tokenizer.model").write_bytes(sentencepiece_file())
        (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
        (directory / "added_tokens.json").write_text(json.dumps({name: SIZE + n for n, name in enumerate(names)}))
    target = run_convert(tmp_path / "target_hf", tmp_path / "target")
    assert draft_job(tmp_path / "draft", target).side_files["added_tokens.json"]
    AutoTokenizer.from_pretrained(tmp_path / "draft").save_pretrained(tmp_path / "json")
    shutil.copy(tmp_path / "json" / "tokenizer.json", tmp_path / "draft" / "tokenizer.json")
    assert draft_job(tmp_path / "draft", target).side_files["added_tokens.json"]
    (tmp_path / "draft" / "tokenizer.json").unlink()
    swapped = {"<|im_end|>": SIZE, "<|im_start|>": SIZE + 1, "<tool>": SIZE + 2}
    (tmp_path / "draft" / "added_tokens.json").write_text(json.dumps(swapped))
    with pytest.raises(CheckpointError, match=r"token 420 is '<\|im_end\|>', but in .* it is '<\|im_start\|>'"):
        draft_job(tmp_path / "draft", target)
    (tmp_path / "draft" / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"token 420 is none, but in .* it is '<\|im_start\|>'"):
        draft_job(tmp_path / "draft", target)


# ---------------------------------------------------------------------------------------------- commands


def script(name: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=check, capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_convert_command_reads_hf_and_writes_beside_it(tmp_path: Path) -> None:
    save("llama-gqa", tmp_path / "model" / "hf")
    script("convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path / "model", "--dtype", "bfloat16")
    assert load_checkpoint(tmp_path / "model", device="cpu").model.norm.weight.dtype == torch.bfloat16
    failed = script("convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path / "nothing", check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("convert_hf_checkpoint: ")
    assert "Traceback" not in failed.stderr
    named = script("convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path, "--model_name", "7B", check=False)
    assert named.returncode == 2 and "--model_name" in named.stderr
