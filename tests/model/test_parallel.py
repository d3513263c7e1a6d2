"""Tensor parallelism on real torchrun ranks: sharded models against whole ones, evaluation, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from gpt_fast.config import ConfigError
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.eval.__main__ import main
from gpt_fast.model.parallel import Ranks, is_sharded, shard
from support.quantized import quantized_model, random_model, small_config, write_checkpoint
from support.ranks import CASES, ODD_CASES, run_program, run_ranks, samples

pytestmark = pytest.mark.slow  # starts torchrun's ranks

BYTES = {"vocab_size": 258, "max_position": 1024, "head_dim": 32, "intermediate_size": 192}
ROUNDED = (
    "bfloat16",
    "int8_bfloat16",
    "int8_cache",
    "odd_int8_tied",
    "three_kv_heads_int8",
)  # a sum over ranks rounds differently


# ------------------------------------------------------------------------------------ small models


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_program(2, "small_models", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_sharded_logits_are_the_whole_models(case, two_ranks):
    first, second = (found[case] for found in two_ranks)
    assert first["sha256"] == second["sha256"]  # to the bit the same on every rank
    if case in ROUNDED:  # even where no rounding agrees, they are sqrt(2) times as far apart as from float32's logits
        assert first["apart"] < 1.5 * first["rounding"]
    else:
        assert first["difference"] < 1e-5  # float32's last digits: 6e-7 here


@pytest.mark.parametrize("case", CASES)
def test_rank_0_leads_the_others_to_the_whole_models_tokens(case, two_ranks):
    whole, first = two_ranks[0][case]["tokens"]
    assert two_ranks[1][case]["tokens"][1] == []
    assert [len(tokens) for tokens in first] == [len(tokens) for tokens in whole]
    assert [len(tokens) for tokens in whole] == [6, 11, 16, 21, 26, 31]
    if case not in ROUNDED:
        assert first == whole


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_share_only(case, two_ranks):
    changes, *_ = CASES[case]
    norms = 5 * 96 + (2 * 2 * 32 if changes.get("qk_norm") else 0)
    whole, share = two_ranks[0][case]["elements"]
    replicated = norms + (2 * 4 * 96 if "n_expert" in changes else 0) + (2 * 2 * 96 if "mlp_bias" in changes else 0)
    assert share <= (whole + replicated) / 2 + whole * 0.02  # scales a row are not cut by columns


def test_a_ranks_cache_has_its_heads_only():
    model = random_model(small_config())
    shard(model, Ranks(1, 2))
    assert is_sharded(model) and not is_sharded(random_model(small_config()))
    assert (model.config.n_head, model.config.n_kv_head, model.config.intermediate_size) == (2, 1, 80)
    assert (model.config.dim, model.config.vocab_size) == (96, 96)


# -------------------------------------------------------------------------------------- any shape


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly), 4])
def odd_shapes(request, tmp_path_factory):
    return run_program(request.param, "odd_models", tmp_path_factory.mktemp("odd"))


@pytest.mark.parametrize("case", ODD_CASES)
def test_sizes_that_ranks_do_not_divide_give_the_whole_models_logits_and_tokens(case, odd_shapes):
    ranks = [found[case] for found in odd_shapes]
    assert len({found["sha256"] for found in ranks}) == 1
    whole, led = ranks[0]["tokens"]
    assert [len(tokens) for tokens in led] == [len(tokens) for tokens in whole]
    if case in ROUNDED:
        assert ranks[0]["apart"] < 1.5 * ranks[0]["rounding"]
    else:
        assert ranks[0]["difference"] < 1e-5 and led == whole


@pytest.mark.parametrize(("mode", "groupsize"), [("int8", 0), ("int4", 32), ("int4", 128)])
def test_the_ranks_parts_of_odd_matrices_make_up_the_whole(mode, groupsize):
    """Exactly: each weight of a layer is one rank's, but for the repeated rows of keys and values."""
    config = small_config(n_head=7, n_kv_head=1, head_dim=24, intermediate_size=166)
    whole = quantized_model(random_model(config), mode=mode, groupsize=groupsize)
    shares = []
    for rank in range(3):
        shares.append(quantized_model(random_model(config), mode=mode, groupsize=groupsize))
        shard(shares[-1], Ranks(rank, 3))
    layers, layer = [share.layers[0] for share in shares], whole.layers[0]
    columns = torch.cat([part.attention.wo.dequantize() for part in layers], dim=1)
    assert torch.equal(columns, layer.attention.wo.dequantize())
    for name, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
        parts = [part.feed_forward.get_submodule(name).dequantize() for part in layers]
        assert torch.equal(torch.cat(parts, dim=dim), layer.feed_forward.get_submodule(name).dequantize())
    qkv = [part.attention.wqkv.dequantize() for part in layers]
    assert torch.equal(
        torch.cat([part[: -2 * 24] for part in qkv] + [qkv[0][-2 * 24 :]]), layer.attention.wqkv.dequantize()
    )
    assert [part.attention.wqkv.repeated for part in layers] == [0, 48, 48]


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 2, "n_kv_head": 1}, r"n_head: has none for some of 3 ranks \(got 2, allowed 2 ranks at most\)"),
        ({"intermediate_size": 2}, r"intermediate_size: has none for some of 3 ranks \(got 2, "),
        ({"vocab_size": 2}, r"vocab_size: has none for some of 3 ranks \(got 2, "),
    ],
)
def test_more_ranks_than_there_are_parts_are_refused_by_name(changes, message):
    model = random_model(small_config(**changes))
    for rank in range(3):
        with pytest.raises(ConfigError, match=message):
            shard(model, Ranks(rank, 3))


# --------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = random_model(small_config(**BYTES))
    return write_checkpoint(tmp_path_factory.mktemp("parallel"), model, tokenizer=True)


SAMPLED = """task: sampled
dataset_path: json
dataset_kwargs: {data_files: {test: sampled.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {do_sample: true, temperature: 0.9, until: ["none"], max_gen_toks: 40}
"""


def same_answers(ours, theirs, *, within):
    """Two runs answer each document alike: the same texts, log-likelihoods, choices where `within` leaves one."""
    assert ours.keys() == theirs.keys()
    for task in ours:
        assert ours[task].keys() == theirs[task].keys()
        for mine, other in zip(ours[task].values(), theirs[task].values(), strict=True):
            if isinstance(mine[0], str):
                assert mine == other
                continue
            scores, others = (torch.tensor([float(r[0]) for r in rows]) for rows in (mine, other))
            torch.testing.assert_close(scores, others, rtol=0, atol=within)
            assert float(others.max() - others[scores.argmax()]) < 2 * within


def evaluated(count, directory, asked):
    """(by `count` ranks, by this process alone), each a list of samples."""
    (directory / "evaluation.json").write_text(json.dumps(asked))
    return run_program(count, "evaluation", directory)[0], [samples(None, **each) for each in asked]


def test_every_kind_of_task_is_answered_alike(checkpoint, tmp_path, one_torch_thread):
    (tmp_path / "sampled.yaml").write_text(SAMPLED)
    (tmp_path / "sampled.jsonl").write_text("".join(f'{{"q": "{"word " * n}", "a": "x"}}\n' for n in range(1, 13)))
    int4 = quantize_checkpoint(checkpoint, mode="int4", groupsize=64)
    tasks = ["basics", "basics_generate", str(tmp_path / "sampled.yaml")]
    options = {"dtype": "float32", "kv_cache": "float32", "max_num_seqs": 5, "limit": 12, "tasks": tasks}
    asked = [{"checkpoint_path": str(path), **options} for path in (checkpoint, int4)]
    for ours, theirs in zip(*evaluated(2, tmp_path, asked), strict=True):
        assert sorted(ours) == ["basics", "basics_generate", "sampled"]
        assert len({answer for (answer,) in ours["sampled"].values()}) == 12
        same_answers(ours, theirs, within=1e-3)


@pytest.mark.model
def test_three_ranks_answer_as_one_process_does(default_checkpoint, tmp_path):
    """bfloat16 beside integers, whose float32 ops are slow: logits of 16 and more are rounded to eighths."""
    shared = {"tasks": ["basics"], "kv_cache": "float32", "max_num_seqs": 40}
    int4, int8 = default_checkpoint / "model_int4.g32.safetensors", quantized_beside(default_checkpoint, tmp_path)
    kinds = [(default_checkpoint, "float32", 20, 1e-3), (int8, "bfloat16", 8, 0.4), (int4, "bfloat16", 8, 0.4)]
    asked = [{"checkpoint_path": str(path), "dtype": dtype, "limit": n, **shared} for path, dtype, n, _ in kinds]
    for ours, theirs, (_, _, limit, within) in zip(*evaluated(3, tmp_path, asked), kinds, strict=True):
        assert len(ours["basics"]) == limit
        same_answers(ours, theirs, within=within)  # also the choice, unless two are as near as that


def quantized_beside(checkpoint, directory):
    """The checkpoint in int8, in a directory of its own that has the source's files by reference."""
    new = directory / "checkpoint"
    new.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "manifest.json":
            (new / file.name).symlink_to(file)
    shutil.copy(checkpoint / "manifest.json", new)
    (new / "model_int8.safetensors").unlink(missing_ok=True)
    return quantize_checkpoint(new, mode="int8")


def test_the_command_scores_with_ranks_and_one_of_them_speaks(checkpoint, capsys):
    flags = ["--checkpoint_path", str(checkpoint), "--tasks", "basics", "basics_perplexity", "--limit", "6",
             "--dtype", "float32", "--device", "cpu"]  # fmt: skip
    done = run_ranks(2, "-m", "gpt_fast.eval", *flags)
    assert done.returncode == 0, done.stderr
    main(flags)
    ours, theirs = (json.loads(text.splitlines()[-1]) for text in (done.stdout, capsys.readouterr().out))
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr.count("scoring:   0%") == 2  # a bar a task, of one rank
    assert ours["path"] == "plain (tensor parallel: float32 and float16 have no fused path)"
    assert not theirs["path"].startswith("plain (tensor")
    for task in ("basics", "basics_perplexity"):
        assert ours["results"][task] == pytest.approx(theirs["results"][task], rel=1e-4)


def test_quality_with_ranks_is_that_of_one_process(checkpoint, capsys):
    int8 = quantize_checkpoint(checkpoint, mode="int8")
    flags = ["--quality", str(int8), "--windows", "2", "--seq_length", "128", "--device", "cpu"]
    done = run_ranks(2, "-m", "gpt_fast.eval", *flags)
    assert done.returncode == 0, done.stderr
    main(flags)
    ours, theirs = (json.loads(text.splitlines()[-1]) for text in (done.stdout, capsys.readouterr().out))
    assert ours["path"] == ours["against_path"] == theirs["path"] == "plain (kernels: plain)"
    for key in ("perplexity", "perplexity_ratio", "mean_kl", "top1_agreement"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-2 if key == "mean_kl" else 1e-5)
    assert ours["greedy_divergence"] == theirs["greedy_divergence"]
    for mine, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert mine["weight_sqnr_db"] == pytest.approx(other["weight_sqnr_db"], abs=1e-6)
        assert mine["hidden_sqnr_db"] == pytest.approx(other["hidden_sqnr_db"], abs=0.1)
    assert [line for line in done.stdout.splitlines() if line.startswith("recorded in")] == [
        f"recorded in {int8.with_name('model_int8.quality.json')}"
    ]
