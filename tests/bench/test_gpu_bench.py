"""The GPU bench without a GPU: every code path on the kernels' twins, tiny, and what it does when things fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from gpt_fast.bench.gpu import command, models, roofline, rows
from gpt_fast.model.forward import Batch
from support.paths import ROOT

pytestmark = [pytest.mark.usefixtures("one_torch_thread"), pytest.mark.slow]  # interprets Triton


# As much of meta-pytorch/gpt-fast as the adapter touches, in its own words.
GENERATE = """
import torch
def decode_one_token(model, x, input_pos, **sampling_kwargs):
    return model(x, input_pos).argmax(-1).to(torch.int)
def decode_n_tokens(model, cur_token, input_pos, num_new_tokens, callback=lambda _: _, **sampling_kwargs):
    assert sampling_kwargs == {"temperature": 0.8, "top_k": 200}, sampling_kwargs
    for _ in range(num_new_tokens):
        cur_token = decode_one_token(model, cur_token, input_pos, **sampling_kwargs)
        input_pos += 1
"""
MODEL = """
import dataclasses, torch
@dataclasses.dataclass
class ModelArgs:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; dim: int; intermediate_size: int
    n_local_heads: int; rope_base: float; norm_eps: float
class Transformer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.tok_embeddings = torch.nn.Embedding(config.vocab_size, config.dim)
        self.output = torch.nn.Linear(config.dim, config.vocab_size, bias=False)
    def setup_caches(self, max_batch_size, max_seq_length):
        self.positions = max_seq_length
    def forward(self, x, input_pos):
        assert int(input_pos[-1]) < self.positions and self.output.weight.dtype == torch.bfloat16
        return self.output(self.tok_embeddings(x))
"""


def dry_run(capsys, *arguments):
    """The result, and all that was printed before it."""
    command.main(["--dry-run", *arguments])
    *lines, last = capsys.readouterr().out.splitlines()
    return json.loads(last), lines


def test_every_row_of_our_own(capsys, tmp_path):
    out, picture = tmp_path / "new" / "gpu.json", tmp_path / "roofline.png"
    kinds = ["ceilings", "decode", "allocated", "verify", "prefill", "sampler"]
    result, lines = dry_run(
        capsys, "--only", *kinds, "--formats", "bf16", "int4", "--out", str(out), "--plot", str(picture)
    )
    assert not [row for row in result["rows"] if "error" in row]
    count = {kind: sum(row["kind"] == kind for row in result["rows"]) for kind in kinds[1:]}
    assert count == {"decode": 8, "allocated": 2, "verify": 12, "prefill": 4, "sampler": 2}
    assert result["ceilings"]["read_gb_s"] > 0 and result["ceilings"]["graph_node_us"] > 0
    for row in result["rows"]:
        if row["kind"] == "decode":
            assert row["tokens_per_s"] == pytest.approx(row["rows"] / row["us_per_step"] * 1e6)
            assert row["gb_s"] == pytest.approx(row["gb_per_step"] / row["us_per_step"] * 1e6)
            assert row["percent_of_ceiling"] == pytest.approx(100 * row["gb_s"] / result["ceilings"]["read_gb_s"])
            assert row["host_us_per_token"] > 0 and row["kernels_per_step"] is None
    assert any("percent" not in line and "tiny  " in line for line in lines)
    assert json.loads(out.read_text()) == result and [path.name for path in out.parent.iterdir()] == ["gpu.json"]
    assert picture.stat().st_size > 5000


def test_bytes_are_the_formats(capsys):
    result, _ = dry_run(capsys, "--only", "decode", "--formats", "bf16", "int8", "int4")
    read = {row["format"]: row["gb_per_step"] for row in result["rows"] if (row["rows"], row["context"]) == (1, 4)}
    assert read["bf16"] > 3.5 * read["int8"] and read["int8"] > 1.4 * read["int4"]  # bf16 is float32 in a dry run


def test_one_ranks_share_has_rows_of_its_own(capsys):
    result, lines = dry_run(capsys, "--only", "decode", "cold", "--formats", "bf16", "--tp", "1", "2", "4")
    found = [row for row in result["rows"] if row["kind"] == "decode"]
    assert [row.get("tp") for row in found] == [None] * 4 + [2] * 4 + [4] * 4
    whole, half, quarter = (found[i]["gb_per_step"] for i in (0, 4, 8))
    assert whole / 2 <= half < 0.55 * whole and quarter < 0.6 * half
    assert [row["kind"] for row in result["rows"] if "tp" not in row].count("cold") == 1 == len(result["rows"]) - 12
    assert any("bf16, 1 of 2 ranks" in line for line in lines)


def test_int8_caches_have_rows_of_their_own(capsys):
    result, lines = dry_run(
        capsys, "--only", "decode", "verify", "prefill", "--formats", "int8", "fp8", "--kv_cache", "auto", "int8"
    )
    assert not [row for row in result["rows"] if "error" in row]
    for form in ("int8", "fp8"):
        by_cache = [
            [row for row in result["rows"] if row["format"] == form and row.get("kv_cache") == cached]
            for cached in (None, "int8")
        ]
        assert [row["kind"] for row in by_cache[0]] == [row["kind"] for row in by_cache[1]] and by_cache[0]
        full, small = (
            row["gb_per_step"]
            for rows_ in by_cache
            for row in rows_
            if row["kind"] == "decode" and (row["rows"], row["context"]) == (2, 40)
        )
        config, positions = models.TINY["tiny"], 2 * 42
        saved = config.kv_bytes_per_token(4) - config.kv_bytes_per_token(1) * (1 + 4 / config.head_dim)
        assert full - small == pytest.approx(saved * positions / 1e9)
    assert any("fp8, int8 KV" in line for line in lines)


def test_a_failing_row_says_why_and_the_rest_go_on(capsys, monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(rows, "prefill", broken)
    out = tmp_path / "gpu.json"
    seen = []
    monkeypatch.setattr(command, "write_json", lambda result, path: seen.append((path, len(result["rows"]))))
    result, lines = dry_run(capsys, "--only", "prefill", "verify", "sampler", "--formats", "bf16", "--out", str(out))
    errors = [row["error"] for row in result["rows"] if "error" in row]
    assert errors == ["RuntimeError: no such thing"] * 2
    assert sum(row["kind"] == "verify" for row in result["rows"]) == 6
    assert "prefill tiny bf16 rows 1 prompt 20: error: RuntimeError: no such thing" in lines
    assert seen == [(out, count + 1) for count in range(len(result["rows"]))]  # after every row


def test_a_model_that_cannot_be_made_is_a_row(capsys, monkeypatch):
    def full(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(command, "random_model", full)
    result, _ = dry_run(capsys, "--only", "decode", "--formats", "bf16", "int8")
    assert [(row["kind"], row["error"]) for row in result["rows"]] == [("model", "MemoryError: none left")] * 2


def test_peers_and_cold_start_in_a_process_of_its_own(tmp_path):
    (tmp_path / "generate.py").write_text(GENERATE)
    (tmp_path / "model.py").write_text(MODEL)
    options = ["--gpu", "--dry-run", "--only", "decode", "peers", "cold", "--formats", "bf16", "--peer_dir"]
    ordered = [sys.executable, "-m", "gpt_fast.bench", *options, str(tmp_path)]
    done = subprocess.run(ordered, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    found = {row["kind"]: row for row in result["rows"]}
    assert not [row for row in result["rows"] if "error" in row]
    assert {"decode", "cold", "peer transformers", "peer gpt-fast"} == set(found)
    cold = found["cold"]
    assert 0 < cold["imports_s"] < cold["weights_s"] < cold["warm_s"] < cold["first_token_s"]
    alone = [row for row in result["rows"] if row["kind"] == "decode" and row["rows"] == 1]
    for row in alone:
        rates = [
            peer["tokens_per_s"]
            for peer in result["rows"]
            if peer["kind"].startswith("peer") and peer["context"] == row["context"]
        ]
        assert row["over_peer"] == pytest.approx(row["tokens_per_s"] / max(rates))


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"^2$"):
        command.main([])
    assert capsys.readouterr().err.startswith("error: no CUDA device")


@pytest.mark.parametrize("name", models.SHAPES)
def test_shapes_have_the_published_sizes(name):
    """Parameters a step reads, in millions, of the published models."""
    with torch.device("meta"):
        model = models.Transformer(models.SHAPES[name])
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    read = matrices - (0 if models.SHAPES[name].tie_embeddings else model.tok_embeddings.weight.numel())
    expected = {
        "llama-2-7b": 6607,
        "llama-2-70b": 68713,
        "llama-3.1-8b": 7505,
        "llama-3.2-1b": 1236,
        "smollm2-135m": 134.5,
    }[name]
    assert read / 1e6 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_keep_the_signal(form, tied):
    config = models.shape(300, 2, 4, 2, 256, 512, tied=tied)
    model = models.random_model(config, form, torch.device("cpu"), torch.float32)
    subject = rows.Subject(model)
    logits = subject.decoder(Batch(torch.tensor([[3]]), torch.tensor([[5]]), subject.cache(1, 64), length=64))
    assert logits.isfinite().all() and 0.1 < logits.std() < 10


def test_ratios_only_count_the_same_case():
    case = {"model": "m", "format": "int8", "rows": 1, "context": 8}
    ours = {"kind": "decode", **case, "tokens_per_s": 30.0}
    others = [
        {"kind": "peer a", **case, **changed, "tokens_per_s": rate}
        for changed, rate in [({}, 10.0), ({}, 20.0), ({"context": 9}, 40.0), ({"format": "bf16"}, 50.0)]
    ]
    failed = {"kind": "peer b", **case, "error": "x"}
    table = [ours, *others, failed]
    roofline.finish(table, None)
    assert ours["over_peer"] == 1.5
