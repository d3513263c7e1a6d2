"""A rank reads its share of a checkpoint only, and that share is what `shard` makes of the whole model."""

from __future__ import annotations

import json

import pytest
import torch

from gpt_fast.checkpoint.safetensors_file import CheckpointError, SafetensorsFile
from gpt_fast.config import EngineConfig
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.load.checkpoint import load_checkpoint
from gpt_fast.load.sizes import build_cache
from gpt_fast.model.empty import empty_model
from gpt_fast.model.parallel import Ranks, shard
from support.examples import rest_slow
from support.quantized import FAMILIES, random_model, small_config, write_checkpoint
from support.ranks import run_program

SHAPE = {"vocab_size": 259, "head_dim": 32, "n_head": 6, "n_kv_head": 2, "intermediate_size": 162}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["int8", None, "int4"])
@pytest.mark.parametrize("dtype", rest_slow([torch.bfloat16, None]))
def test_a_share_read_from_the_file_is_the_share_of_the_whole_model(tmp_path, family, mode, dtype):
    model = random_model(small_config(**SHAPE | FAMILIES[family]))
    path = write_checkpoint(tmp_path / "whole", model, tokenizer=True)
    if mode is not None:
        path = quantize_checkpoint(path, mode=mode, **({"groupsize": 64} if mode == "int4" else {}))
    for ranks in (Ranks(0, 3), Ranks(2, 3)):
        want = load_checkpoint(path, device="cpu", dtype=dtype).model
        shard(want, ranks)
        loaded = load_checkpoint(path, device="cpu", dtype=dtype, ranks=ranks)
        got, expected = loaded.model.state_dict(), want.state_dict()
        assert loaded.config == loaded.model.config == want.config
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
        assert (
            loaded.model.output.weight is loaded.model.tok_embeddings.embedding.weight
        ) == model.config.tie_embeddings


def test_what_is_not_finite_in_a_share_is_named_as_the_file_names_it(tmp_path):
    model = random_model(small_config(**SHAPE))
    model.tok_embeddings.weight[200, 3] = float("inf")
    write_checkpoint(tmp_path, model, tokenizer=True)
    load_checkpoint(tmp_path, device="cpu", ranks=Ranks(0, 3))
    with pytest.raises(CheckpointError, match=r"tensor tok_embeddings.weight: holds a value that is not finite"):
        load_checkpoint(tmp_path, device="cpu", ranks=Ranks(2, 3))


def test_ranks_with_fewer_kv_heads_have_no_more_slots(tmp_path):
    """kv_cache_gib holds 5 slots of two KV heads, and would hold 10 of one: a plan names the slots of all ranks."""
    path = write_checkpoint(
        tmp_path, random_model(small_config(**SHAPE | {"n_head": 6, "n_kv_head": 3})), tokenizer=True
    )
    slot = 2 * 2 * 2 * 65 * 32 * 4  # keys and values of 2 layers, 2 heads, 64 positions and a scratch one, float32
    config = EngineConfig(checkpoint_path=str(path), kv_cache_gib=5.5 * slot / 2**30, max_num_seqs=100)
    for rank, heads in ((0, 2), (1, 1)):
        loaded = load_checkpoint(path, device="cpu", ranks=Ranks(rank, 2))
        cpu = torch.device("cpu")
        cache = build_cache(config, loaded.config, 64, torch.float32, cpu, largest=loaded.largest)
        assert (cache.slots, cache.k_LNHTD.shape[2]) == (5, heads)


def test_released_tensors_are_read_again(tmp_path):
    write_checkpoint(tmp_path, random_model(small_config(**SHAPE)), tokenizer=True)
    file = SafetensorsFile(tmp_path / "model.safetensors")
    tensors = {name: file.tensor(name) for name in file.entries}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in file.entries:
        file.release(name)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.slow
def test_a_ranks_memory_is_its_shares(tmp_path):
    """A load that brought in the whole file, or held a copy beside its share, would take twice the share."""
    write_checkpoint(tmp_path / "first", random_model(small_config(vocab_size=258)), tokenizer=True)
    sizes = {"vocab_size": 4096, "n_layer": 6, "n_head": 12, "n_kv_head": 3, "dim": 1024, "head_dim": 64}
    model = empty_model(small_config(**sizes, intermediate_size=4096)).to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    write_checkpoint(tmp_path / "large", model, tokenizer=True)
    (tmp_path / "memory.json").write_text(json.dumps(str(tmp_path / "large")))
    for rank in run_program(2, "memory", tmp_path):
        assert rank["share"] > 80e6
        assert rank["after"] - rank["before"] < 1.2 * rank["share"] + 32e6
