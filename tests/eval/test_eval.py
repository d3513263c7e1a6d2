"""Scores against plain logits, quality reports and the gate that reads them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch

from gpt_fast.checkpoint.quality_gate import check_quality, report_path
from gpt_fast.config import ConfigError, EngineConfig, SamplingParams
from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.eval.__main__ import main, parser
from gpt_fast.eval.divergence import Side, common_prefix, compare, weight_sqnrs_db
from gpt_fast.eval.quality_report import plot, table
from gpt_fast.eval.score import TOKENS_PER_FORWARD, Scorer
from gpt_fast.files import write_json
from gpt_fast.llm import Engine
from gpt_fast.model.cache import KVCache
from support.paths import ROOT
from support.quantized import CPU, logits_of, quantized_model, random_model, small_config, write_checkpoint

BYTES = {"vocab_size": 257, "max_position": 1024}


def scorer_of(model, *, rows=4, max_seq_len=64):
    model.setup_rope(max_seq_len, CPU)
    return Scorer(model, KVCache(model.config, slots=rows, max_seq_len=max_seq_len, dtype=torch.float32, device=CPU))


@pytest.fixture(scope="module")
def model():
    return random_model(small_config())


def plain_score(model, tokens, count):
    logprobs = logits_of(model, torch.tensor([tokens]))[0].log_softmax(-1)
    targets = range(len(tokens) - count, len(tokens))
    total = sum(float(logprobs[t - 1, tokens[t]]) for t in targets)
    return total, all(int(logprobs[t - 1].argmax()) == tokens[t] for t in targets)


# --------------------------------------------------------------------------------------------- scores


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_forward", [TOKENS_PER_FORWARD, 12])
def test_ragged_rows_score_as_each_alone(model, tokens_per_forward, monkeypatch):
    monkeypatch.setattr("gpt_fast.eval.score.TOKENS_PER_FORWARD", tokens_per_forward)
    generator = random.Random(0)
    rows = []
    for _ in range(11):
        tokens = [generator.randrange(96) for _ in range(generator.randrange(2, 60))]
        rows.append((tokens, generator.randrange(1, len(tokens))))
    finished = []
    scores = scorer_of(model).score(rows, done=finished.append)
    assert sum(finished) == 11
    for (tokens, count), score in zip(rows, scores, strict=True):
        expected, greedy = plain_score(model, tokens, count)
        assert score.logprob == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert score.greedy == greedy


def test_greedy_is_true_for_the_models_own_continuation(model):
    scorer = scorer_of(model)
    prompts = [[5, 6, 7], [90, 2, 40]]
    continued = scorer.continue_greedily(prompts, 20)
    assert [len(row) for row in continued] == [20, 20]
    for prompt, row in zip(prompts, continued, strict=True):
        assert scorer.score([(prompt + row, 20)])[0].greedy
        assert not scorer.score([(prompt + row[:-1] + [(row[-1] + 1) % 96], 20)])[0].greedy


def test_a_row_may_be_one_longer_than_the_cache(model):
    tokens = [i % 96 for i in range(65)]
    expected, _ = plain_score(model, tokens, 64)
    assert scorer_of(model).score([(tokens, 64)])[0].logprob == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------- quality


def side_of(model):
    scorer = scorer_of(model, rows=8, max_seq_len=128)
    return Side(model, scorer, plain=scorer)


def compared(ours, source, windows):
    return compare(side_of(ours), side_of(source), windows, weight_sqnrs_db(ours, source))


def some_windows(count=3, length=96):
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.slow
def test_a_model_against_itself_differs_in_nothing(model):
    report, tokens = compared(model, random_model(small_config()), some_windows())
    assert report["tokens"] == len(tokens.kl) == 3 * 95
    assert report["perplexity_ratio"] == 1 and report["perplexity_ratio_error"] == 0
    assert report["mean_kl"] == report["p99_kl"] == 0
    assert report["top1_agreement"] == 1 and report["greedy_divergence"] == [64, 64, 64]
    assert report["layers"] == [{"layer": i, "weight_sqnr_db": None, "hidden_sqnr_db": None} for i in range(2)]


@pytest.mark.slow
def test_figures_are_those_of_the_logits(model):
    quantized = quantized_model(model, mode="int4", groupsize=128)
    windows = some_windows()
    report, _ = compared(quantized, model, windows)
    a, b = (logits_of(m, torch.tensor(windows))[:, :-1].log_softmax(-1) for m in (quantized, model))
    targets = torch.tensor(windows)[:, 1:, None]
    assert report["perplexity"] == pytest.approx(math.exp(-a.gather(-1, targets).mean()), rel=1e-4)
    assert report["perplexity_against"] == pytest.approx(math.exp(-b.gather(-1, targets).mean()), rel=1e-4)
    change = (b - a).gather(-1, targets)
    error = report["perplexity_ratio"] * float(change.std()) / math.sqrt(change.numel())
    assert report["perplexity_ratio_error"] == pytest.approx(error, rel=1e-2)
    kl = (b.exp() * (b - a)).sum(-1)
    assert report["mean_kl"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert report["p99_kl"] == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-2)
    assert report["top1_agreement"] == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    assert all(15 < layer["weight_sqnr_db"] < 25 for layer in report["layers"])
    assert all(layer["hidden_sqnr_db"] < 40 for layer in report["layers"])


@pytest.mark.slow
def test_worse_weights_give_a_worse_report(model):
    reports = [
        compared(quantized_model(model, mode=mode, groupsize=size), model, some_windows())[0]
        for mode, size in (("int8", 0), ("int4", 32), ("int4", 128))
    ]
    for better, worse in itertools.pairwise(reports):
        assert better["mean_kl"] < worse["mean_kl"]
        assert better["layers"][1]["hidden_sqnr_db"] > worse["layers"][1]["hidden_sqnr_db"]


def test_the_point_of_divergence():
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2], [3, 2]) == 0
    assert common_prefix([1, 2], [1, 2]) == 2


# ----------------------------------------------------------------------------------- command and gate


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quality")
    write_checkpoint(directory, random_model(small_config(**BYTES)), tokenizer=True)
    return quantize_checkpoint(directory, mode="int8"), quantize_checkpoint(directory, mode="int4", groupsize=128)


FLAGS = ["--windows", "2", "--seq_length", "128"]


@pytest.mark.slow
def test_the_command_shows_records_and_prints_json_last(checkpoints, capsys, tmp_path):
    int8, _ = checkpoints
    picture = tmp_path / "quality.png"
    main(["--quality", str(int8), *FLAGS, "--plot", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert lines[0] == "model_int8.safetensors against model.safetensors, 254 tokens of pydoc_data.topics"
    assert report["windows"] == 2 and report["length"] == 128 and report["dtype"] == "float32"
    assert report["kv_cache"] == report["against_kv_cache"] == "float32"  # weights alone, not as served
    assert report["path"] == report["against_path"] == "plain (kernels: plain)"
    assert report["bytes"] == int8.stat().st_size < report["against_bytes"]
    assert json.loads(report_path(int8).read_text()) == report
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_two_quantized_files_can_be_compared_on_a_text_of_ones_own(checkpoints, capsys):
    int8, int4 = checkpoints
    main(["--quality", str(int4), "--against", str(int8), *FLAGS, "--text", __file__])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["text"] == Path(__file__).name and report["against"] == "model_int8.safetensors"
    assert report["perplexity_ratio"] != 1


@pytest.mark.slow
def test_the_gate(checkpoints):
    int8, _ = checkpoints
    main(["--quality", str(int8), *FLAGS])
    check_quality(int8, {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.1, "max_p99_kl": 1, "min_top1_agreement": 0.2})
    report = json.loads(report_path(int8).read_text())
    for threshold, limit, figure in [
        ("max_mean_kl", report["mean_kl"] * 0.9, "mean_kl"),
        ("max_perplexity_ratio", 0.5, "perplexity_ratio"),
        ("min_top1_agreement", 1.01, "top1_agreement"),
    ]:
        with pytest.raises(
            ConfigError, match=rf"quality\.{threshold}: .*{figure} is worse \(got .*, allowed at"
        ) as caught:
            check_quality(int8, {threshold: limit})
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_cache_of_int8_has_a_report_and_a_gate_of_its_own(checkpoints, capsys):
    int8, _ = checkpoints
    source = int8.with_name("model.safetensors")
    main(["--quality", str(source), "--kv_cache", "int8", *FLAGS])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kv_cache"] == "int8" and report["against_kv_cache"] == "float32"
    assert 0 < report["mean_kl"] < 1e-3
    # A token's log-probability moves by some sqrt(2 KL), and a random model's tokens may all move the same way.
    assert abs(math.log(report["perplexity_ratio"])) < 5 * math.sqrt(2 * report["mean_kl"])
    assert json.loads(source.with_name("model.kv_int8.quality.json").read_text()) == report
    check_quality(source, {"max_mean_kl": 1e-3}, kv_cache="int8")
    with pytest.raises(ConfigError, match=r"no model\.quality\.json: make it with .* --quality \S+`$"):
        check_quality(source, {"max_mean_kl": 1e-3})
    with pytest.raises(ConfigError, match=r"no model_int8\.kv_int8\.quality\.json: make it .* --kv_cache int8`$"):
        check_quality(int8, {"max_mean_kl": 1e-3}, kv_cache="int8")


@pytest.mark.slow
def test_a_format_is_judged_as_served_against_float32(checkpoints, capsys):
    int8, _ = checkpoints
    main(["--quality", str(int8), "--dtype", "bfloat16", "--against_dtype", "float32", "--kernels", "auto", *FLAGS])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["dtype"], report["against_dtype"]) == ("bfloat16", "float32")
    assert report["path"] == "fused CPU decoder" or report["path"].startswith("plain (")
    assert 0 < report["mean_kl"] < 0.01 and report["layers"][0]["hidden_sqnr_db"] > 20


@pytest.mark.slow
def test_an_engine_loads_only_what_its_gate_lets_through(checkpoints):
    int8, _ = checkpoints
    main(["--quality", str(int8), *FLAGS])
    sizes = {"max_seq_len": 64, "max_num_seqs": 1, "device": "cpu"}
    handler = {"checkpoint_path": str(int8), "quality": {"min_top1_agreement": 0.2}, **sizes}
    engine = Engine.load(**dataclasses.asdict(EngineConfig.from_mapping(handler, where="handler")))
    assert len(engine.generate(["a"], [SamplingParams(max_new_tokens=3, ignore_eos=True)])[0].tokens) == 3
    with pytest.raises(ConfigError, match=r"quality\.max_mean_kl: model_int8\.quality\.json: mean_kl is worse"):
        Engine.load(str(int8), quality={"max_mean_kl": 0.0}, **sizes)
    with pytest.raises(ConfigError, match=r"quality: no model_int8\.kv_int8\.quality\.json"):
        Engine.load(str(int8), quality={"max_mean_kl": 1.0}, kv_cache="int8", **sizes)
    with pytest.raises(ConfigError, match=r"^quality: must map thresholds to numbers \(got 0\.1\)$"):
        Engine.load(str(int8), quality=0.1, **sizes)


def test_the_documented_figures_are_the_recorded_ones():
    """benchmarks/quality.json is what docs/quantization.md shows, each row with a command that exists."""
    root = ROOT
    page = (root / "docs" / "quantization.md").read_text(encoding="utf-8")
    rows = json.loads((root / "benchmarks" / "quality.json").read_text(encoding="utf-8"))
    assert len(rows) > 10
    for row in rows.values():
        start, flags = row["command"].split("gpt_fast.eval ")
        assert start == "python -m " and parser().parse_args(flags.split()).quality is not None
        shown = [f"{row['perplexity']:.4f}", f"{row['perplexity_ratio']:.4f}", f"{100 * row['top1_agreement']:.1f} %"]
        assert " | ".join(shown[:2]) in page and shown[2] in page, row["command"]


@pytest.mark.slow
def test_the_gate_refuses_what_it_cannot_know(checkpoints, tmp_path):
    int8, int4 = checkpoints
    with pytest.raises(ConfigError, match=r"quality\.max_loss: unknown key \(allowed max_perplexity_ratio, "):
        check_quality(int8, {"max_loss": 1})
    with pytest.raises(ConfigError, match=r"quality\.max_mean_kl: must be a number in range \(got 'low'"):
        check_quality(int8, {"max_mean_kl": "low"})
    report_path(int4).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"no model_int4\.g128\.quality\.json: make it with `python -m gpt_fast.eval"):
        check_quality(int4, {"max_mean_kl": 1.0})
    main(["--quality", str(int8), *FLAGS])
    report = json.loads(report_path(int8).read_text())
    write_json(report, report_path(int4))
    with pytest.raises(
        ConfigError, match=r"model_int4\.g128\.quality\.json reports on other weights than model_int4\.g128"
    ):
        check_quality(int4, {"max_mean_kl": 1.0})
    del report["mean_kl"]
    write_json(report, report_path(int8))
    with pytest.raises(ConfigError, match=r"has no mean_kl"):
        check_quality(int8, {"max_mean_kl": 1.0})
    report_path(int8).write_text("{")
    with pytest.raises(ConfigError, match=r"is not readable JSON"):
        check_quality(int8, {"max_mean_kl": 1.0})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int8"], "error: dtype: unknown value (got 'int8', allowed auto, float32, bfloat16, float16)"),
        (["--kv_cache", "int4"], "error: kv_cache: unknown value (got 'int4', allowed auto, "),
        (["--kernels", "fast"], "error: kernels: unknown value (got 'fast', allowed auto, plain)"),
        (["--against_dtype", "half"], "error: dtype: unknown value (got 'half'"),
        (["--windows", "0"], "error: windows: must be a whole number in range (got 0, allowed 1.."),
        (
            ["--seq_length", "2048"],
            "error: seq_length: is beyond the model's positions (got 2048, allowed at most 1024)",
        ),
        (["--tasks", "basics"], "error: --tasks: has no effect: --quality is given"),
        (["--text", "/nowhere"], "error: /nowhere: cannot be read as UTF-8 text"),
        (["--against", "/nowhere"], "error: /nowhere"),
    ],
)
def test_the_command_refuses_in_one_line(flags, message, checkpoints, capsys):
    assert message in refusal(capsys, "--quality", str(checkpoints[0]), *FLAGS, *flags)


def refusal(capsys, *arguments):
    """The one line of a command that ends with status 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main([*arguments])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_another_model_is_no_reference(checkpoints, tmp_path, capsys):
    other = write_checkpoint(tmp_path, random_model(small_config(**BYTES, n_layer=1)), tokenizer=True)
    line = refusal(capsys, "--quality", str(checkpoints[0]), "--against", str(other), *FLAGS)
    assert line.startswith("error: against: is another model")


@pytest.mark.slow
def test_the_table_and_plot_say_where_nothing_differs(model, tmp_path):
    report, tokens = compared(model, model, some_windows(1))
    files = {"checkpoint": "a", "against": "b", "bytes": 1, "against_bytes": 2, "text": "t"}
    assert table(files | report).splitlines()[-1].split() == ["1", "exact", "exact"]
    plot(files | report, tokens, tmp_path / "same.png")
    assert (tmp_path / "same.png").stat().st_size > 1000
