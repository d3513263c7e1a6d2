"""The fused CPU decoder against its plain PyTorch twin."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from ctypes import byref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.model import huge_pages
from gpt_fast.model.forward import Batch
from gpt_fast.ops import rounding
from gpt_fast.ops.cpu import CpuDecoder, build, decoder, pack, structs, unsupported
from gpt_fast.ops.cpu.structs import Linear, load_library
from gpt_fast.ops.cpu.tuning import DEFAULT
from gpt_fast.ops.cpu.weights import Packer
from gpt_fast.ops.int8 import expand_groups
from support import cpu_twin
from support.cpu_models import (
    MAX_SEQ_LEN,
    activations_unrounded,
    assert_rounded_alike,
    new_cache,
    random_tokens,
    relative_error,
    run_chunks,
    small_model,
)
from support.examples import examples, rest_slow
from support.quantized import quantized_model

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels")

FORMATS = ("bfloat16", "int8", "int4", "int8_groups")
ISAS = build.isas_here()


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def multiply(w_NK: torch.Tensor, x_MK: torch.Tensor, weights: str, group: int, isa: str | None = None) -> torch.Tensor:
    """gf_linear on a NaN-filled output: [M, N]."""
    linear = torch.nn.Linear(*reversed(w_NK.shape), bias=False)
    linear.weight.data = w_NK
    packed = Packer(weights, group).body(linear).stored(pack.Arena())
    out = torch.full((len(x_MK), -(-len(w_NK) // 32) * 32), torch.nan)
    scale = None if packed.scale is None else packed.scale.data_ptr()
    description = Linear(packed.format, packed.rows, packed.cols, packed.group, packed.q.data_ptr(), scale, None)
    rows, usual = x_MK.contiguous(), DEFAULT.struct()
    load_library(isa).gf_linear(byref(description), rows.data_ptr(), len(rows), out.data_ptr(), byref(usual))
    return out[:, : len(w_NK)]


def assert_product(got: torch.Tensor, w_NK: torch.Tensor, x_MK: torch.Tensor, weights: str, group: int) -> None:
    """`got` is the product of what the format makes of both, but for float32's roundings, of every output's own terms.

    A sum of K products is off by at most K roundings of the sum of their sizes, in whatever order it is taken; scales,
    minima and the twin's own numbers make a few more.
    """
    x, w = cpu_twin.round_activations(x_MK, weights).double(), cpu_twin.round_weight(w_NK, weights, group).double()
    sizes_NK = w.abs()
    if weights == "int4":  # codes * scale and the minimum are multiplied by themselves
        minimum_NK = expand_groups(rounding.int4_groups(w_NK, group)[2].float(), w.shape[1], group)
        sizes_NK = sizes_NK + 2 * minimum_NK.double().abs()
    bound_MN = (w.shape[1] + 8) * 2.0**-24 * (x.abs() @ sizes_NK.T)
    assert ((got.double() - x @ w.T).abs() <= bound_MN).all()


# ------------------------------------------------------------------------------------------ one matrix


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weights", FORMATS)
@examples(12)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 9),
    tail=st.integers(0, 31),
    x_rows=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_product_equals_twin(isa: str, weights: str, rows: int, groups: int, tail: int, x_rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    K = 32 * groups - tail
    w_NK, x_MK = torch.randn(rows, K, generator=generator), torch.randn(x_rows, K, generator=generator)
    x_MK[0, : K // 2] = 0
    assert_product(multiply(w_NK, x_MK, weights, 32, isa), w_NK, x_MK, weights, 32)


@pytest.mark.parametrize("weights", FORMATS)
def test_product_of_a_row_is_the_same_bits_in_any_batch(weights: str) -> None:
    w_NK, x_MK = torch.randn(80, 192), torch.randn(40, 192)
    together = multiply(w_NK, x_MK, weights, 64)
    alone = torch.cat([multiply(w_NK, row[None], weights, 64) for row in x_MK])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_int4_groups(group: int) -> None:
    w_NK, x_MK = torch.randn(33, 576), torch.randn(3, 576)  # 576 = 4.5 groups of 128
    assert_product(multiply(w_NK, x_MK, "int4", group), w_NK, x_MK, "int4", group)


def test_int4_refuses_an_unknown_group() -> None:
    with pytest.raises(ValueError, match="group must be one of"):
        pack.pack_int4(torch.zeros(16, 192, dtype=torch.uint8), torch.zeros(16, 4), torch.zeros(16, 4), group=48)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_weights_and_cache_lie_where_huge_pages_may_be() -> None:
    weights = huge_pages.empty(8 << 20)
    cache = huge_pages.zeros((2, 3 << 20), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert weights.data_ptr() % huge_pages.HUGE_PAGE == 0 and len(weights) == 8 << 20
    assert cache.shape == (2, 3 << 20) and not cache.any()
    areas = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) (\S+) .*?^VmFlags: (.*?)$",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    for tensor in (weights, cache):
        middle = tensor.data_ptr() + tensor.nbytes // 2
        ((access, flags),) = (
            (access, flags.split()) for start, end, access, flags in areas if int(start, 16) <= middle < int(end, 16)
        )
        assert access == "rw-p" and "hg" in flags  # private, huge pages wanted


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_fetching_pages_changes_no_value() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    cache, before = huge_pages.zeros((64 << 20,), dtype=torch.uint8, device=torch.device("cpu")), resident()
    cache[5], cache[-1] = 7, 9
    assert resident() - before < cache.nbytes / 2
    huge_pages.populate([cache, torch.zeros(3)]).join()
    assert resident() - before > cache.nbytes / 2
    assert (cache[5], cache[-1], cache.sum()) == (7, 9, 16)


# ------------------------------------------------------------------------------------------ the model

SHAPES = {
    "plain": {},
    "head_dim 80": dict(head_dim=80),
    "head_dim 96, one group": dict(head_dim=96, n_head=3, n_kv_head=3),
    "head_dim 128, 8 heads a group": dict(head_dim=128, n_head=8, n_kv_head=1),
    "head_dim 16, odd dim": dict(head_dim=16, n_head=5, n_kv_head=5, dim=70, intermediate_size=33),
    "biases": dict(qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "qk norm, partial rotary": dict(qk_norm=True, rope_dim=20),
    "tied, window in one layer": dict(tie_embeddings=True, sliding_window=37, sliding_layers=(1,)),
}


@pytest.mark.parametrize("isa", rest_slow(dict.fromkeys((ISAS[0], ISAS[-1])) if ISAS else ()))
@pytest.mark.parametrize("weights", decoder.WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_twin(shape: str, weights: str, isa: str) -> None:
    model = small_model(**SHAPES[shape])
    fused = CpuDecoder(model, weights=weights, threads=2, isa=isa)
    plain = cpu_twin.twin(model, weights=weights)
    tokens = random_tokens(model, 150)
    sizes = [100, 1, 5, 1, 43]
    cache, cache_plain, cache_exact = new_cache(model, fill=torch.nan), new_cache(model), new_cache(model)
    got = run_chunks(fused.forward, tokens, cache, sizes, slot=3)
    expected = run_chunks(plain, tokens, cache_plain, sizes, slot=3)
    with activations_unrounded():
        exact = run_chunks(plain, tokens, cache_exact, sizes, slot=3)
    assert_rounded_alike(got, expected, exact)
    assert_rounded_alike(*(c.k_LNHTD[:, 3, :, :150] for c in (cache, cache_plain, cache_exact)))
    assert torch.isnan(cache.k_LNHTD[:, :3]).all() and torch.isnan(cache.v_LNHTD[:, 3, :, 150:]).all()
    # Of short texts a tenth at most has a number that near to a tie, and the others differ in float32's last bits
    # only: that a third of 60 has one is less likely than 1 in 10^6.
    texts, positions = random_tokens(model, 60, 4), torch.arange(4).expand(60, 4)
    got, expected = (
        f(Batch(texts, positions, new_cache(model, slots=60), length=4))[:, -1] for f in (fused.forward, plain)
    )
    off_B = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert (off_B < 1e-5).sum() > 40


@pytest.mark.parametrize("isa", rest_slow(dict.fromkeys((ISAS[0], ISAS[-1])) if ISAS else ()))
@pytest.mark.parametrize("cache_type", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_narrow_caches_equal_twin(head_dim: int, cache_type: torch.dtype, isa: str) -> None:
    model = small_model(head_dim=head_dim)
    fused = CpuDecoder(model, weights="int8", threads=2, isa=isa)
    plain = cpu_twin.twin(model, weights="int8")
    tokens, sizes = random_tokens(model, 150), [100, 1, 5, 1, 43]
    cache, cache_plain = (new_cache(model, dtype=cache_type, fill=fill) for fill in (torch.nan, 0.0))
    got = run_chunks(fused.forward, tokens, cache, sizes, slot=3)
    expected = run_chunks(plain, tokens, cache_plain, sizes, slot=3)
    with activations_unrounded():
        assert_rounded_alike(got, expected, run_chunks(plain, tokens, new_cache(model), sizes, slot=3))
    # The first layer has no attention before it: a tie changes one position. A code is that near to a tie about once
    # in 10^4, so one position in 100 may have one among its inputs, and that 15 of 150 have is out of the question.
    written, expected = (c.k_LNHTD[0, 3, :, :150] for c in (cache, cache_plain))
    assert ((written == expected).float().mean((0, 2)) > 0.95).sum() > 135


@pytest.mark.parametrize("weights", decoder.WEIGHTS)
@pytest.mark.parametrize("window", [None, 50])
def test_a_rows_logits_are_the_same_bits_however_it_is_run(weights: str, window: int | None) -> None:
    model = small_model(sliding_window=window, sliding_layers=(0,) if window else ())
    tokens = random_tokens(model, 4, 150)
    fused = CpuDecoder(model, weights=weights, threads=1)
    cache = new_cache(model, dtype=torch.bfloat16)
    alone = torch.stack([run_chunks(fused.forward, row, cache, [1] * 150, slot=i) for i, row in enumerate(tokens)])
    for threads, sizes in ((1, [150]), (3, [130, 1, 5, 14]), (2, [17, 9, 8, 116])):
        other = CpuDecoder(model, weights=weights, threads=threads)
        chunked = run_chunks(other.forward, tokens[2], new_cache(model, dtype=torch.bfloat16), sizes, slot=1)
        assert torch.equal(chunked, alone[2])
    batch = fused.forward(
        Batch(tokens, torch.arange(150).expand(4, 150), new_cache(model, dtype=torch.bfloat16), length=150)
    )
    assert torch.equal(batch, alone)


def test_ragged_rows_in_permuted_slots_with_padding() -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int8", threads=2)
    cache = new_cache(model, fill=torch.nan)
    tokens = random_tokens(model, 3, 120)
    lengths, slots = [119, 3, 64], [2, 0, 3]
    for row, length, slot in zip(tokens, lengths, slots, strict=True):
        run_chunks(fused.forward, row[:length], cache, [length], slot=slot)
    step_tokens = torch.stack([row[n] for row, n in zip(tokens, lengths, strict=True)] + [torch.tensor(7)])[:, None]
    positions = torch.tensor([*lengths, cache.scratch])[:, None]
    got = fused.forward(Batch(step_tokens, positions, cache, length=128, slots_B=torch.tensor([*slots, 1])))
    for i, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
        alone = run_chunks(fused.forward, row[: length + 1], new_cache(model), [length + 1])
        assert torch.equal(got[i, 0], alone[-1])
    assert torch.equal(got[3], torch.zeros_like(got[3]))
    assert torch.isnan(cache.k_LNHTD[:, 1]).all()


def test_select_returns_one_token_of_each_row() -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int4", threads=2)
    tokens, positions = random_tokens(model, 2, 30), torch.arange(30).expand(2, 30).clone()
    every = fused.forward(Batch(tokens, positions, new_cache(model), length=30))
    positions[1, 11:] = MAX_SEQ_LEN  # a shorter row, padded
    chosen = fused.forward(Batch(tokens, positions, new_cache(model), length=30, select_B=torch.tensor([29, 10])))
    assert torch.equal(chosen, torch.stack((every[0, 29], every[1, 10])))


def test_all_padding_runs_nothing() -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int8", threads=2)
    scratch = torch.full((2, 1), MAX_SEQ_LEN)
    assert not fused.forward(Batch(torch.zeros_like(scratch), scratch, new_cache(model), length=8)).any()


def test_logits_are_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="bfloat16", threads=3)
    never_written = {torch.float32: torch.nan, torch.int64: -9}
    cache = new_cache(model)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: torch.full(shape, never_written[dtype], dtype=dtype))
    got = fused.forward(Batch(random_tokens(model, 3, 7), torch.arange(7).expand(3, 7), cache, length=7))
    assert got.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_best_is_the_argmax(isa: str) -> None:
    model = small_model(vocab_size=2010)
    model.output.weight[700] = model.output.weight[1999] = model.output.weight[5] * 30  # equal logits
    fused = CpuDecoder(model, weights="int8", threads=3, isa=isa)
    step = fused.start(
        Batch(random_tokens(model, 40, 1), torch.zeros(40, 1).long(), new_cache(model, slots=40), length=8)
    )
    assert torch.equal(step.best(), step.result().argmax(-1))
    assert (step.best() == 700).any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_finite_best_logit_has_no_token(value: float) -> None:
    model = small_model()
    model.tok_embeddings.weight[50] = value
    fused = CpuDecoder(model, weights="int8", threads=2)
    cache = new_cache(model)
    step = fused.start(Batch(torch.tensor([[3], [50], [4]]), torch.zeros(3, 1).long(), cache, length=8))
    follower = fused.start(Batch(torch.zeros(3, 1).long(), torch.ones(3, 1).long(), cache, length=8), after=step)
    assert step.best()[1] == -1 and step.best()[0] >= 0 and step.best()[2] >= 0
    assert follower.result()[[0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_steps_follow_each_other_on_their_own(threads: int) -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int4", threads=threads)
    first = random_tokens(model, 3, 1)
    cache, expected = new_cache(model), []
    tokens = first
    for at in range(60):
        expected.append(fused.forward(Batch(tokens, torch.full((3, 1), at), cache, length=MAX_SEQ_LEN)))
        tokens = expected[-1].argmax(-1)
    cache, step = new_cache(model), None
    rng = random.Random(threads)
    steps = []
    for at in range(60):
        step = fused.start(Batch(first, torch.full((3, 1), at), cache, length=MAX_SEQ_LEN), after=step)
        if rng.random() < 0.5:
            time.sleep(rng.random() * 1e-3)
        if steps:  # one runs, one waits
            assert torch.equal(steps[-1].result(), expected[at - 1])
        steps.append(step)
    assert torch.equal(steps[-1].result(), expected[-1])


def test_a_step_follows_only_the_one_that_runs() -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int8", threads=2)
    inputs = (torch.tensor([[3]]), torch.tensor([[0]]), new_cache(model))
    first = fused.start(Batch(*inputs, length=8))
    fused.start(Batch(*inputs, length=8))
    with pytest.raises(ValueError, match="after: is not the step that runs"):
        fused.start(Batch(*inputs, length=8), after=first)


def test_a_following_step_with_a_bad_position_is_refused() -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int8", threads=2)
    cache = new_cache(model)
    for _ in range(3):
        first = fused.start(Batch(torch.tensor([[3]]), torch.tensor([[0]]), cache, length=8))
        with pytest.raises(ValueError, match="positions_BS"):
            fused.start(Batch(torch.tensor([[3]]), torch.tensor([[9]]), cache, length=8), after=first).result()
        assert first.result().isfinite().all()


def test_growing_steps_reuse_one_decoder() -> None:
    model = small_model()
    fused, tokens = CpuDecoder(model, weights="int8", threads=2), random_tokens(model, 180)
    for size in (1, 40, 3, 180):
        got = run_chunks(fused.forward, tokens[:size], new_cache(model), [size])
        fresh = CpuDecoder(model, weights="int8", threads=1)
        assert torch.equal(got, run_chunks(fresh.forward, tokens[:size], new_cache(model), [size]))


def test_decoders_share_a_pool() -> None:
    model = small_model()
    first = CpuDecoder(model, weights="int8", threads=2)
    second = CpuDecoder(model, weights="bfloat16", threads=1, pool=first.pool)
    for fused in (first, second, first):
        assert run_chunks(fused.forward, random_tokens(model, 9), new_cache(model), [9]).isfinite().all()


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_modules_keep_their_codes(mode: str, tied: bool) -> None:
    model = small_model(tie_embeddings=tied, mlp_bias=True)
    quantized = quantized_model(model, mode=mode, groupsize=64, embedding="int8").eval()
    quantized.setup_rope(MAX_SEQ_LEN, torch.device("cpu"))
    fused = CpuDecoder(quantized, weights="int8", threads=2)
    tokens = random_tokens(model, 40)
    got = run_chunks(fused.forward, tokens, new_cache(model), [40])
    assert relative_error(got, run_chunks(quantized, tokens, new_cache(model), [40])) < 0.03  # activations in int8


def test_bfloat16_is_not_mixed_with_quantized_modules() -> None:
    model = quantized_model(small_model(), mode="int8", groupsize=64, embedding="keep")
    model.output = torch.nn.Linear(model.config.dim, model.config.vocab_size, bias=False)
    model.setup_rope(MAX_SEQ_LEN, torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be mixed"):
        CpuDecoder(model, weights="bfloat16", threads=1)


@pytest.mark.parametrize(
    ("token", "position", "slot", "select", "message"),
    [
        (301, 0, 0, 0, "tokens_BS"),
        (-1, 0, 0, 0, "tokens_BS"),
        (0, 8, 0, 0, "positions_BS"),
        (0, -1, 0, 0, "positions_BS"),
        (0, 0, 4, 0, "slots_B"),
        (0, 0, -1, 0, "slots_B"),
        (0, 0, 0, 1, "select_B"),
    ],
)
def test_bad_indices_are_refused(token: int, position: int, slot: int, select: int, message: str) -> None:
    model = small_model()
    fused = CpuDecoder(model, weights="int8", threads=1)
    with pytest.raises(ValueError, match=message):
        fused.forward(
            Batch(
                torch.tensor([[token]]),
                torch.tensor([[position]]),
                new_cache(model),
                length=8,
                slots_B=torch.tensor([slot]),
                select_B=torch.tensor([select]),
            ),
        )


def test_unsupported_names_the_reason() -> None:
    assert unsupported(small_model()) is None
    assert "n_expert=4" in str(unsupported(small_model(n_expert=4, n_expert_per_token=2)))
    assert "head_dim=24" in str(unsupported(small_model(head_dim=24)))
    model = quantized_model(small_model(), mode="int4", groupsize=32)
    model.layers[1].feed_forward.w2.scheme = SimpleNamespace(bits=4, groupsize=16)  # as a rank's share may have it
    assert unsupported(model) == "groups of 16 inputs: the CPU decoder needs multiples of 32"
    with pytest.raises(ValueError, match="weights: unknown format"):
        CpuDecoder(small_model(), weights="int3", threads=1)


# ------------------------------------------------------------------------------------------ the build


@pytest.mark.slow
def test_library_is_built_once_even_by_two_processes(tmp_path: Path) -> None:
    code = "from gpt_fast.ops.cpu.structs import load_library; load_library()"
    env = os.environ | {"GPT_FAST_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for process in [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]:
        assert process.wait(timeout=600) == 0  # two compilers at once, perhaps on a busy machine
    (library,) = tmp_path.iterdir()
    before = library.stat().st_mtime_ns
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=600)
    assert library.stat().st_mtime_ns == before


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in str(unsupported(small_model()))
    with pytest.raises(build.BuildError, match="no C"):
        build.load_library()


def test_a_failing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'x.cpp:1: error: no luck' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("GPT_FAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match="error: no luck"):
        build.load_library()
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unusable_cache_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT_FAST_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match="set GPT_FAST_CACHE"):
        build.load_library()


def test_processor_choice() -> None:
    avx2 = {"sse2", "avx2", "fma", "f16c"}
    assert build.supported_isas("x86_64", build.AVX512_VNNI | avx2) == ["avx512", "avx2"]
    assert build.supported_isas("x86_64", frozenset(avx2)) == ["avx2"]
    assert build.supported_isas("x86_64", frozenset({"sse2"})) == []
    assert build.supported_isas("aarch64", build.AVX512_VNNI | avx2) == []
    graviton2 = {"fp", "asimd", "evtstrm", "aes", "fphp", "asimdhp", "asimdrdm", "asimddp"}
    assert build.supported_isas("aarch64", frozenset(graviton2)) == ["neon"]
    assert build.supported_isas("aarch64", frozenset(graviton2 | {"i8mm", "bf16"})) == ["neon_i8mm", "neon"]
    assert build.supported_isas("aarch64", frozenset({"fp", "asimd"})) == []  # a Cortex-A72
    assert build.supported_isas("x86_64", frozenset(graviton2)) == []


def test_an_arm_processor_is_told_apart_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its system gives no model's name: what is tuned to one must not be taken for another."""
    told = {"Features": "asimd asimddp", "CPU implementer": "0x41", "CPU part": "0xd40", "CPU revision": "1"}
    monkeypatch.setattr(build, "cpuinfo", lambda: told)
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.processor() == "aarch64 (implementer 0x41, part 0xd40, revision 1)"
    assert build.isas_here() == ["neon"]


def test_a_processor_without_a_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert build.unavailable() == (
        "this riscv64 processor has none of the instruction sets avx512_bf16, avx512, avx2_vnni, avx2, neon_i8mm, neon"
    )


def test_the_librarys_key_is_of_its_own_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    names = {path.relative_to(sources.resolve()).as_posix() for path in build.sources_of(build.LIBRARY_SOURCE)}
    assert names >= {"decoder.cpp", "decoder.h", "simd.h", "simd/avx512.h", "simd/avx2.h", "simd/x86.h", "simd/neon.h"}
    before = build.source_key("avx2")
    (sources / "check.cpp").write_text("// changed")
    assert build.source_key("avx2") == before
    (sources / "simd" / "x86.h").write_text("// changed")
    assert build.source_key("avx2") != before


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_in_the_compile_is_warned_of(isa: str, tmp_path: Path) -> None:
    build.compile_sources(tmp_path / "decoder.so", isa, [build.LIBRARY_SOURCE], ["-fsyntax-only", "-Werror"])


def test_ctypes_twins_lie_as_the_structures_do() -> None:
    count = ctypes.c_int()
    fields = load_library().gf_layout(byref(count))
    twins = (
        structs.Linear,
        structs.Screen,
        structs.LayerWeights,
        structs.ModelWeights,
        structs.Fetch,
        structs.Tuning,
        structs.StepInput,
    )
    expected = []
    for twin in twins:
        expected.append((twin.__name__, "", 0, ctypes.sizeof(twin)))
        for name, *_ in twin._fields_:
            place = getattr(twin, name)
            expected.append((twin.__name__, name, place.offset, place.size))
    got = [(f.structure.decode(), f.name.decode(), f.offset, f.size) for f in fields[: count.value]]
    assert got == expected


@pytest.mark.nightly
@pytest.mark.slow
def test_sanitizers_find_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gpt_fast.ops.cpu", "--sanitize"], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count(": fine") == 2 * (12 + 8 + 4)  # formats by caches, pools, formats on ranks
