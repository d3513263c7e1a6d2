"""The bench: statistics, noise, turns, peers' output, the command from end to end on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.bench import __main__ as command
from gpt_fast.bench import long_prompt, report
from gpt_fast.bench.bandwidth import Bandwidth
from gpt_fast.bench.engine_target import EngineTarget, neighbours
from gpt_fast.bench.interleave import interleave
from gpt_fast.bench.over_http import HttpTarget
from gpt_fast.bench.peers import PEERS, PeerOptions, load_peer, openvino_genai, upstream
from gpt_fast.bench.peers.llama_build import parse_batched_bench, parse_llama_bench
from gpt_fast.bench.quality import quality_of
from gpt_fast.bench.recorder import Recorder, record
from gpt_fast.bench.remote import Remote
from gpt_fast.bench.sample import Case, Description, Sample, Segment, Unavailable
from gpt_fast.bench.summary import ratio, summarize
from gpt_fast.checkpoint.quality_gate import report_path, weights_sha256
from gpt_fast.files import write_json
from gpt_fast.measure import machine
from gpt_fast.measure.machine import CpuMeter, Reading, foreign_share, foreign_shares
from gpt_fast.measure.stats import percentile
from gpt_fast.ops.cpu import build
from support.echo_target import Echo
from support.paths import ROOT
from support.quantized import random_model, small_config, write_checkpoint
from support.round_server import RoundServer

CASE = Case(prompt_len=8, new_tokens=100)


def segment(seconds: float, *, foreign: float | None = 0.0, steps: int = 25, rows: int = 1) -> Segment:
    return Segment(steps * rows, steps, seconds, foreign, (seconds / steps,) * steps)


def sample(
    *segments: Segment, ttft: float = 0.5, foreign: float | None = 0.0, bandwidth: float | None = None
) -> Sample:
    return Sample(CASE, ttft, segments, foreign, bandwidth)


# ----------------------------------------------------------------------------------------- figures


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_monotone_and_within_the_values(values, percent):
    found = percentile(values, percent)
    assert min(values) <= found <= max(values)
    assert percentile(values, 0) == min(values) and percentile(values, 100) == max(values)
    assert percentile(values, percent / 2) <= found + 1e-6


def test_percentiles_lie_between_ranks():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20], 90) == pytest.approx(19)
    assert percentile([], 50) is None


def test_noisy_segments_are_dropped_and_counted():
    samples = [
        sample(segment(0.1), segment(5.0, foreign=0.11), segment(0.25), ttft=0.5),
        sample(segment(0.125, foreign=0.10), segment(9.0, foreign=0.9), ttft=9.0, foreign=0.5),
    ]
    figures = summarize(samples, Description(), 0.10)
    assert figures["decode_tokens_per_s"] == pytest.approx(25 / 0.125)  # median of 250, 200, 100
    assert figures["decode_tokens_per_s_p10"] == pytest.approx(120)
    assert (figures["segments"], figures["noisy_segments"], figures["noisy_prefills"]) == (5, 2, 1)
    assert figures["ttft_ms"] == 500 and figures["prefill_tokens_per_s"] == 8 / 0.5
    assert figures["tpot_ms_p50"] == pytest.approx(5) and figures["tpot_ms_p99"] == pytest.approx(10)
    assert figures["foreign_load"] == pytest.approx((0.11 + 0.10 + 0.9) / 5)


def test_nothing_quiet_is_no_figure_instead_of_a_wrong_one():
    figures = summarize([sample(segment(1.0, foreign=1.0), foreign=1.0)], Description(1000, 10), 0.10)
    keys = ("decode_tokens_per_s", "ttft_ms", "tpot_ms_p50", "gb_per_s", "percent_of_probed")
    assert [figures[key] for key in keys] == [None] * len(keys)


def test_unknown_load_is_kept():
    figures = summarize([sample(segment(1.0, foreign=None), foreign=None)], Description(), 0.10)
    assert figures["decode_tokens_per_s"] == 25 and figures["foreign_load"] is None


def test_bytes_are_weights_and_every_rows_cache_at_half_of_the_decode():
    description = Description(weight_bytes=1_000_000, kv_bytes=1000)
    case = Case(prompt_len=8, new_tokens=100, rows=4)
    assert description.bytes_per_step(case) == 1_000_000 + 4 * 1000 * 58
    taken = [Sample(case, 0.1, (segment(0.25, rows=4),), 0.0, bandwidth=1e9)]
    figures = summarize(taken, description, 0.10)
    assert figures["decode_tokens_per_s"] == 400  # 100 steps a second, four rows
    assert figures["gb_per_s"] == pytest.approx(1_232_000 * 100 / 1e9)
    assert figures["percent_of_probed"] == pytest.approx(12.32)
    assert figures["probed_gb_per_s"] == 1


def test_ratios_are_taken_round_by_round():
    ours = [sample(segment(0.1), ttft=1), sample(segment(0.1), ttft=1), sample(segment(0.1, foreign=0.5), ttft=1)]
    theirs = [sample(segment(0.2), ttft=2), sample(segment(0.4), ttft=4), sample(segment(0.8), ttft=8)]
    figures = ratio(ours, theirs, 0.10)
    assert (figures["decode"], figures["decode_min"], figures["decode_max"]) == (3.0, 2.0, 4.0)
    assert (figures["decode_rounds"], figures["prefill_rounds"], figures["prefill_max"]) == (2, 3, 8.0)


# ------------------------------------------------------------------------------------ foreign load


def test_foreign_load_is_the_machines_less_our_own(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert foreign_share(Reading(0, 10, 1), Reading(1, 13, 2)) == 0.5
    assert foreign_share(Reading(0, 10, 1), Reading(1, 10.9, 2)) == 0.0  # ticks round our own up
    assert foreign_share(Reading(0, None, 1), Reading(1, None, 2)) is None


def test_short_intervals_are_looked_at_within_a_window(monkeypatch):
    """Ticks of 10 ms: one interval of 50 ms got all three, its neighbours none."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    readings = [Reading(0.05 * i, busy, 0.0) for i, busy in enumerate([0, 0, 0.03, 0.03, 0.03])]
    assert foreign_shares(readings, window=0.05) == pytest.approx([0, 0.6, 0, 0])
    assert foreign_shares(readings, window=0.15) == pytest.approx([0.3, 0.2, 0.2, 0.3], abs=0.11)
    assert foreign_shares(readings, window=9) == pytest.approx([0.15] * 4)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_meter_counts_itself_its_children_and_others_that_are_named():
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    meter, before = CpuMeter(), CpuMeter().read()
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert 0.4 <= meter.read().own - before.own < 5
    other = subprocess.Popen([sys.executable, "-c", f"{burn}\nprint(1, flush=True)\ntime.sleep(60)"], stdout=-1)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        assert other.pid in machine.process_tree(os.getpid())
        assert CpuMeter().read().own - CpuMeter([other.pid]).read().own < -0.35
    finally:
        other.kill()
        other.communicate()
    assert machine.process_seconds(other.pid) == 0.0
    assert machine.peak_rss_bytes() > 1 << 20


def test_paths_of_this_machine_stay_out_of_a_result():
    arguments = [
        "--peer",
        "llama.cpp=/home/me/build/bin",
        "--out",
        "/tmp/x.json",
        "--gguf",
        "build/m.gguf",
        "--repeat=3",
    ]
    told = machine.description("bench", arguments)
    assert told["command"] == "bench --peer llama.cpp=bin --out x.json --gguf build/m.gguf --repeat=3"
    assert told["python"] and told["cpus"]


# ------------------------------------------------------------------------------------ taking turns


def test_targets_take_turns_each_beside_its_own_probe():
    order, rate = [], iter(range(100))

    def target(name):
        def run(case):
            order.append((name, case.round, case.rows))
            return sample(segment(0.1))

        return run

    cases = [Case(8, 10, rows) for rows in (1, 2)]
    results = interleave({"a": target("a"), "b": target("b")}, cases, repeat=2, probe=lambda: float(next(rate)))
    assert order == [(n, r, rows) for rows in (1, 2) for r in (0, 1, 2) for n in "ab"]
    first = results.samples[(8, 10, 1)]
    assert [s.bandwidth for s in first["a"]] == [0, 2] and [s.bandwidth for s in first["b"]] == [1, 3]


def test_a_target_that_cannot_do_a_case_is_left_out_of_it_with_one_note():
    def narrow(case):
        if case.rows > 1:
            raise Unavailable("one row only")
        return sample(segment(0.1))

    runs = {"wide": lambda case: sample(segment(0.1)), "narrow": narrow}
    results = interleave(runs, [Case(8, 10, rows) for rows in (1, 2, 3)], repeat=1, probe=lambda: None)
    assert [list(taken) for taken in results.samples.values()] == [["wide", "narrow"], ["wide"], ["wide"]]
    assert results.notes == ["one row only"]


def test_a_peers_failure_is_a_note_and_ours_an_error():
    def fails(case):
        raise RuntimeError("out of memory")

    def works(case):
        return sample(segment(0.1))

    results = interleave({"ours": works, "peer": fails}, [CASE], repeat=1, probe=lambda: None)
    assert list(results.samples[CASE.shape]) == ["ours"] and results.notes == ["peer: out of memory"]
    with pytest.raises(RuntimeError, match="out of memory"):
        interleave({"ours": fails, "peer": works}, [CASE], repeat=1, probe=lambda: None)


def test_no_two_rounds_or_rows_share_a_prompt():
    prompts = [tuple(p) for r in range(20) for p in Case(16, 1, rows=8, round=r).prompts()]
    assert len(set(prompts)) == len({p[:4] for p in prompts}) == 160
    assert all(100 <= token < 1000 for p in prompts for token in p)
    assert max(max(p) for p in Case(50, 1, vocabulary=20).prompts()) < 20


# ---------------------------------------------------------------------------------------- recording


def test_a_decode_is_cut_into_segments_and_a_rest_is_left_out():
    recorder = Recorder(CpuMeter(), segment_steps=4)
    recorder.start()
    recorder.first_token()
    for index in range(10):
        recorder.step(index / 1000, tokens=3)
    taken = recorder.sample(CASE)
    assert [(s.tokens, s.steps) for s in taken.segments] == [(12, 4), (12, 4)]
    assert taken.segments[1].seconds == pytest.approx((4 + 5 + 6 + 7) / 1000)
    assert taken.segments[1].gaps == (0.004, 0.005, 0.006, 0.007)


def test_a_decode_shorter_than_a_segment_is_one(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("gpt_fast.bench.recorder.time.perf_counter", lambda: clock[0])

    def pass_time(seconds):
        clock[0] += seconds

    taken = record(Case(8, 4), lambda: pass_time(5.0), lambda _: pass_time(2.0))
    assert [(s.tokens, s.steps, s.seconds) for s in taken.segments] == [(3, 3, 6.0)]
    assert taken.ttft == 5.0


# ----------------------------------------------------------------------- targets in other processes


@pytest.mark.slow
def test_a_target_lives_in_a_process_of_its_own():
    remote = Remote(Echo, value=1)
    assert remote.call("get", 2) == 3 and remote.start_seconds > 0
    with pytest.raises(Unavailable, match="not this one"):
        remote.call("fail")
    assert remote.call("get", 3) == 4
    assert 1 << 20 < remote.peak_rss() < 1 << 34
    remote.close()
    assert not remote.process.is_alive()


@pytest.mark.slow
def test_a_target_that_cannot_be_had_says_why():
    with pytest.raises(Unavailable, match=r"^echo: install an echo$"):
        Remote(Echo, value="absent")
    with pytest.raises(RuntimeError, match=r"^OSError: two$"):
        Remote(Echo, value="broken")
    remote = Remote(Echo, value=1)
    with pytest.raises(RuntimeError, match="ended with code 7"):
        remote.call("end")
    remote.close()


# ------------------------------------------------------------------------------------- the bandwidth


@pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without AVX2")
def test_the_probe_reads_every_byte_and_gives_a_rate():
    probe = Bandwidth(nbytes=3 << 20, threads=3)
    assert probe.method().startswith("C++")
    assert 1e8 < probe.probe() < 1e13


def test_the_probe_does_without_a_compiler(monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: None)
    probe = Bandwidth(nbytes=3 << 20, threads=1)
    assert probe.method().startswith("torch") and 1e7 < probe.probe() < 1e13
    with pytest.raises(Unavailable, match="switched off"):
        Bandwidth(nbytes=0, threads=2)


# --------------------------------------------------------------------------------------------- peers

LLAMA_BENCH = """ggml: a line that some builds print first
[
  {"build_commit": "abc1234", "model_type": "llama 1B Q4_1", "model_size": 98000000, "n_prompt": 32, "n_gen": 200,
   "flash_attn": true, "samples_ns": [ 800000000 ], "samples_ts": [ 250.0 ]}
]
"""
BATCHED = """
main: n_kv_max = 928, n_batch = 2048, n_ubatch = 512, flash_attn = 1, n_threads = 2, n_threads_batch = 2

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|    32 |    200 |    2 |    464 |    0.040 |  1600.00 |    1.600 |   250.00 |    1.640 |   282.93 |
|    32 |    200 |    4 |    928 |    0.080 |  1600.00 |    2.000 |   400.00 |    2.080 |   446.15 |
"""


def test_llama_bench_output():
    assert parse_llama_bench(LLAMA_BENCH)["samples_ns"] == [800000000]
    for output in ("", "error: no model", "[]", '[{"n_gen": 1}]'):
        with pytest.raises(ValueError, match="expected one test"):
            parse_llama_bench(output)


def test_llama_batched_bench_output():
    assert parse_batched_bench(BATCHED, Case(32, 200, 4)) == (0.08, 2.0)
    with pytest.raises(ValueError, match="no row for"):
        parse_batched_bench(BATCHED, Case(32, 200, 8))


def fake_tool(path: Path, output: str) -> None:
    """A program that notes its arguments in a file beside it and prints `output`."""
    path.write_text(f'#!/bin/sh\necho "$@" >> {path}.calls\ncat <<"END"\n{output}\nEND\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("name", "decode", "repack"),
    [("llama.cpp", "-p 0 -n 200 -d 32", ""), ("ik_llama.cpp", "-p 0 -n 0 -gp 32,200", "-rtr")],
)
def test_builds_of_llama_cpp_are_asked_for_the_same_case(tmp_path, name, decode, repack):
    fake_tool(tmp_path / "llama-bench", LLAMA_BENCH)
    fake_tool(tmp_path / "llama-batched-bench", BATCHED)
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(996))
    target = load_peer(name, PeerOptions(tmp_path, gguf, tmp_path, 2, 256, kv_elements=100))
    taken = target.run(Case(32, 200))
    assert (taken.ttft, taken.segments[0].seconds, taken.segments[0].tokens) == (0.8, 0.8, 200)
    assert target.describe().weight_bytes == 1000 and target.describe().kv_bytes == 200
    calls = (tmp_path / "llama-bench.calls").read_text().splitlines()
    assert "-p 32 -n 0" in calls[1] and decode in calls[2]
    assert all(f"-m {gguf} -t 2 -r 1 -o json" in call and repack in call for call in calls)
    batch = target.run(Case(32, 200, 4))
    assert (batch.ttft, batch.segments[0].seconds, batch.segments[0].tokens) == (0.08, 2.0, 800)
    call = (tmp_path / "llama-batched-bench.calls").read_text()
    assert "-c 928 -npp 32 -ntg 200 -npl 4 -tb 2" in call and repack in call


def test_a_tool_that_fails_is_one_line(tmp_path):
    (tmp_path / "llama-bench").write_text("#!/bin/sh\necho first >&2\necho 'no such model' >&2\nexit 3\n")
    (tmp_path / "llama-bench").chmod(0o755)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(RuntimeError, match=r"^llama-bench ended with 3: no such model$"):
        load_peer("llama.cpp", PeerOptions(tmp_path, tmp_path / "m.gguf", tmp_path, 1, 64))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_there_says_what_to_give(name, tmp_path):
    with pytest.raises(Unavailable, match=r"--gguf FILE|--peer \S+=PATH"):
        load_peer(name, PeerOptions(None, None, tmp_path, 1, 64))
    (tmp_path / "m.gguf").touch()
    if name in ("ik_llama.cpp", "llama.cpp", "gpt-fast", "build"):
        with pytest.raises(Unavailable, match=r"build it|git clone|git worktree add"):
            load_peer(name, PeerOptions(tmp_path, tmp_path / "m.gguf", tmp_path, 1, 64))


def test_openvinos_figures_are_in_milliseconds():
    def mean(value):
        return lambda: SimpleNamespace(mean=value)

    metrics = SimpleNamespace(get_num_generated_tokens=lambda: 101, get_ttft=mean(250.0), get_tpot=mean(5.0))
    taken = openvino_genai.to_sample(Case(32, 101), metrics, 0.05)
    assert (taken.ttft, taken.ttft_foreign) == (0.25, 0.05)
    assert taken.segments == (Segment(100, 100, 0.5, 0.05),)
    with pytest.raises(RuntimeError, match="made 101 tokens"):
        openvino_genai.to_sample(Case(32, 100), metrics, 0.05)


def test_upstreams_sampler_is_replaced_by_argmax():
    import torch

    logits = torch.tensor([[[0.0, 9.0, 0.0], [0.0, 1.0, 2.0]]])
    assert upstream.greedy(logits, temperature=0.8, top_k=200)[0].tolist() == [[2]]


OTHER_ENGINE = """
from types import SimpleNamespace

class Engine:
    def __init__(self):
        self.left = {}

    @classmethod
    def load(cls, **options):
        if options["device"] == "abacus":
            raise ValueError("device: no abacus\\nhere")
        print("not an answer")
        return cls()

    def add(self, name, prompt, params):
        assert len(prompt) in (1, 8) and params.ignore_eos
        self.left[name] = params.max_new_tokens

    def step(self):
        self.left = {name: left - 1 for name, left in self.left.items()}
        return [SimpleNamespace(request_id=n, finish_reason=None if v else "length") for n, v in self.left.items()]

    def abort(self, name):
        self.left.pop(name)
"""


def other_checkout(folder: Path) -> Path:
    """One whose engine answers at once and needs no torch."""
    (folder / "gpt_fast").mkdir(parents=True)
    (folder / "gpt_fast" / "__init__.py").write_text(OTHER_ENGINE)
    (folder / "gpt_fast" / "config.py").write_text("from types import SimpleNamespace as SamplingParams\n")
    return folder


def test_another_build_of_ours_runs_from_its_own_checkout(tmp_path):
    other = other_checkout(tmp_path / "other")
    target = load_peer("build", PeerOptions(other, None, tmp_path, 1, 64, engine={"device": "cpu"}))
    taken = target.run(Case(8, 60, rows=3))
    assert [(s.tokens, s.steps, len(s.gaps)) for s in taken.segments] == [(75, 25, 25)] * 2  # 59 steps after the first
    assert taken.ttft > 0 and taken.segments[0].seconds == sum(taken.segments[0].gaps) > 0
    assert [(s.tokens, s.steps) for s in target.run(Case(8, 5, rows=2)).segments] == [(8, 4)]
    assert target.describe().facts == {"commit": None} and target.describe().weight_bytes is None
    assert 0 < target.describe().load_seconds < target.start_seconds()
    target.close()
    assert target.process.returncode == 0


def test_another_build_s_refusal_is_one_line(tmp_path):
    other = other_checkout(tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"^build: ValueError: device: no abacus$"):
        load_peer("build", PeerOptions(other, None, tmp_path, 1, 64, engine={"device": "abacus"}))
    target = load_peer("build", PeerOptions(other, None, tmp_path, 1, 64, engine={"device": "cpu"}))
    with pytest.raises(RuntimeError, match=r"^build: AssertionError"):
        target.run(Case(9, 5))
    target.process.kill()
    with pytest.raises(RuntimeError, match=r"^build: its process ended with code -9$"):
        target.run(Case(8, 5))


# ------------------------------------------------------------------------------------------- quality


def test_quality_comes_from_the_report_of_these_weights(tiny_checkpoint):
    weights = tiny_checkpoint / "model.safetensors"
    assert quality_of(weights) == "no report"
    values = {"perplexity": 11.0, "perplexity_against": 10.0, "mean_kl": 0.05, "against": "m", "text": "t"}
    path = report_path(weights)
    write_json({"sha256": weights_sha256(weights), "dtype": "bfloat16", **values}, path)
    try:
        assert quality_of(weights) == quality_of(weights, dtype="bfloat16") == values
        assert quality_of(weights, dtype="float32") == "no report"
        assert quality_of(weights, kv_cache="int8") == "no report"
        assert report.quality_text(values) == "perplexity 11.000 (source 10.000), KL 0.0500"
        write_json({"sha256": "another", **values}, path)
        assert quality_of(weights) == "outdated report"
        path.write_text("{")
        assert quality_of(weights) == "unreadable report"
    finally:
        path.unlink()


def test_a_stream_beside_a_prompt_is_compared_with_itself():
    rounds = [
        long_prompt.Round([0.002] * 200, [0.003] * 50 + [0.004], alone=1.0, beside=2.0, foreign=0.1),
        long_prompt.Round([0.002] * 199 + [0.1], [0.003] * 49, alone=3.0, beside=4.0),
    ]
    told = long_prompt.figures(rounds, 4096)
    assert (told["usual_ms_p50"], told["during_ms_p50"], told["over_usual"]) == pytest.approx((2, 3, 1.5))
    assert 2 == told["usual_ms_p90"] <= told["usual_ms_p99"] < 100 and 3 < told["during_ms_p99"] < 4
    assert (told["alone_s"], told["beside_s"], told["foreign_load"], told["rounds"]) == (2, 3, 0.1, 2)


# --------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory) -> Path:
    model = random_model(small_config(vocab_size=257, max_position=512))
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", model, tokenizer=True)


@pytest.mark.slow
def test_the_command_from_end_to_end(tiny_checkpoint, tmp_path):
    """Engine, server, this checkout as another build, an absent peer; tables, a picture, a file, JSON last."""
    with RoundServer() as server:
        measured = "--prompt_len 8 16 --batch_size 1 3 --max_new_tokens 30 --repeat 2 --long_prompt 40 --starts 2"
        machine = "--verify --threads 1 --probe_gib 0.002 --foreign_limit 99 --busy 1"
        targets = ["--engine", "--http", server.url, "--peer", "ik_llama.cpp", "--peer", f"build={ROOT}"]
        files = ["--out", str(tmp_path / "out" / "r.json"), "--plot", str(tmp_path / "r.png")]
        arguments = ["--checkpoint_path", str(tiny_checkpoint), *targets, *measured.split(), *machine.split(), *files]
        run = subprocess.run(
            [sys.executable, "-m", "gpt_fast.bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert run.returncode == 0, run.stderr
    *table, last = run.stdout.splitlines()
    result = json.loads(last)
    assert result == json.loads((tmp_path / "out" / "r.json").read_text())
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert [(c["prompt_len"], c["batch_size"]) for c in result["cases"]] == [(8, 1), (8, 3), (16, 1), (16, 3)]
    for case in result["cases"]:
        engine, http = case["targets"]["engine"], case["targets"]["http"]
        assert engine["decode_tokens_per_s"] > 0 and http["decode_tokens_per_s"] > 0 and engine["ttft_ms"] > 0
        assert engine["tpot_ms_p50"] <= engine["tpot_ms_p90"] <= engine["tpot_ms_p99"]
        assert engine["percent_of_probed"] > 0 and http["gb_per_s"] is None
        assert (engine["segments"], http["segments"], engine["noisy_segments"]) == (2, 2, 0)
        assert case["ratios"]["http"]["decode_rounds"] == 2
        assert case["targets"]["engine beside 1 busy"]["decode_tokens_per_s"] > 0
        other = case["targets"]["build"]
        assert other["decode_tokens_per_s"] > 0 and other["segments"] == 2 and other["tpot_ms_p50"] > 0
        assert case["ratios"]["build"]["decode_rounds"] == case["ratios"]["build"]["prefill_rounds"] == 2
    told = result["targets"]["engine"]
    assert told["recompiles"] == 0 and told["peak_rss_mb"] > 10 and told["quality"] == "no report"
    assert len(told["starts"]) == 2 and min(told["starts"]) < told["start_seconds"] < max(told["starts"])
    assert sum("2 starts)" in line for line in table) == 2
    assert len(result["targets"]["build"]["starts"]) == 2 and result["targets"]["build"]["peak_rss_mb"] > 10
    assert result["targets"]["build"]["commit"] == result["commit"]
    assert list(told["verify_ms"]) == [str(m) for m in range(1, 9)] and told["verify_ms"]["1"]["ratio"] == 1
    beside = told["long_prompt"]
    assert (beside["prompt_len"], beside["rounds"]) == (40, 2) and beside["alone_s"] > 0 and beside["beside_s"] > 0
    assert beside["over_usual"] == beside["during_ms_p50"] / beside["usual_ms_p50"] > 0
    assert beside["usual_ms_p50"] <= beside["usual_ms_p99"] and beside["during_ms_p50"] <= beside["during_ms_p99"]
    assert any("beside a prompt of 40 tokens" in line for line in table)
    assert result["http_over_engine"] > 0 and told["torch"] and result["python"]
    assert result["notes"] == ["ik_llama.cpp: give --peer ik_llama.cpp=PATH (the folder of its llama-bench)"]
    assert sum("engine / http" in line for line in table) == 4
    assert str(tmp_path) not in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_bench_that_is_told_to_stop_leaves_no_process(tiny_checkpoint):
    arguments = ["--checkpoint_path", str(tiny_checkpoint), "--engine", "--threads", "1", "--repeat", "100000"]
    bench = subprocess.Popen([sys.executable, "-m", "gpt_fast.bench", *arguments], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(tree := machine.process_tree(bench.pid)) < 3:
        assert time.monotonic() < deadline and bench.poll() is None
        time.sleep(0.05)
    bench.terminate()
    assert bench.wait(timeout=60) == 143
    while any(Path(f"/proc/{pid}").exists() for pid in tree):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_busy_neighbour_is_ended_and_is_no_strangers_load(tiny_checkpoint):
    options = {"checkpoint_path": str(tiny_checkpoint), "max_seq_len": 64, "threads": 1}
    target = EngineTarget(**options)
    children = set(machine.process_tree(os.getpid()))
    taken = target.run(Case(8, 50, vocabulary=257), busy=2)
    assert set(machine.process_tree(os.getpid())) <= children
    assert taken.segments[0].steps == 25
    with neighbours(1) as pids:
        time.sleep(0.5)
        meter, strangers = CpuMeter(pids), CpuMeter()
        before = meter.read().own - strangers.read().own
        time.sleep(0.5)
        assert meter.read().own - strangers.read().own > before > 0
    assert machine.process_seconds(pids[0]) == 0.0


def test_the_server_is_asked_for_the_same_case():
    with RoundServer() as server:
        target = HttpTarget(server.url)
        taken = target.run(Case(8, 20, rows=2, vocabulary=200))
    assert taken.segments[0].tokens == 2 * 19 and taken.segments[0].steps == 19
    assert 0 < taken.ttft < 30 and taken.segments[0].seconds > 0
    if sys.platform.startswith("linux"):
        assert os.getpid() in target.meter.pids  # the server's CPU time is no stranger's


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "nothing to measure"),
        (["--engine", "--prompt_len", "0"], "must be a whole number (got '0', allowed 1 or more)"),
        (["--peer", "vllm"], "unknown peer"),
        (["--engine", "--plot", "figure.txt"], "unknown format (got 'figure.txt', allowed a name in .png, .svg, .pdf)"),
        (["--engine"], "config.json: no such file"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, line, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        command.main(["--checkpoint_path", str(tmp_path), *arguments])
    assert line in capsys.readouterr().err
