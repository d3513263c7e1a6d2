"""The screen of a head: its bounds hold, and the best token is the one that the whole head gives."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from gpt_fast.model.forward import Batch
from gpt_fast.ops.cpu import CpuDecoder, build, pack
from gpt_fast.ops.cpu.pack import Arena
from gpt_fast.ops.cpu.screen import build_screen, is_worth_it
from gpt_fast.ops.cpu.structs import Linear, load_library
from gpt_fast.ops.cpu.tuning import DEFAULT
from gpt_fast.ops.cpu.weights import Packer
from support import cpu_twin
from support.cpu_models import new_cache, random_tokens, small_model
from support.examples import examples, rest_slow

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels"),
    pytest.mark.usefixtures("one_torch_thread"),
]

FORMATS = ("int8", "int8_groups", "bfloat16")
ISAS = build.isas_here()


@pytest.fixture(autouse=True, scope="module")
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Told(NamedTuple):
    """A head's outputs, what its screen says of them, and the copy's weights."""

    output_N: torch.Tensor
    estimate_N: torch.Tensor
    margin_N: torch.Tensor
    copy_NK: torch.Tensor


def tell(w_NK: torch.Tensor, x_K: torch.Tensor, weights: str, isa: str | None = None) -> Told:
    library, (N, K) = load_library(isa), w_NK.shape
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = w_NK
    packed = Packer(weights, 32).head(linear).stored(Arena())
    scale = None if packed.scale is None else packed.scale.data_ptr()
    head = Linear(packed.format, N, K, packed.group, packed.q.data_ptr(), scale, None)
    screen, kept = build_screen(library, head, x_K.square(), arena=Arena(), threads=2)
    out = torch.full((3, -(-N // 32) * 32), torch.nan)
    output, estimate, margin = out
    library.gf_linear(byref(head), x_K.data_ptr(), 1, output.data_ptr(), byref(DEFAULT.struct()))
    library.gf_screen(byref(head), byref(screen), x_K.data_ptr(), estimate.data_ptr(), margin.data_ptr())
    return Told(*out[:, :N], unpack(kept[0], kept[1], N, K))


LEVELS = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]).float()


def unpack(q: torch.Tensor, scale: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The matrix that packed levels stand for (linear.h says how they lie)."""
    G, rows = -(-K // 32), -(-N // 32) * 32
    q_TGjr = q.view(-1, G, 2, 4, 16, 4).transpose(1, 2).flatten(0, 1)  # [T, G, 4, 16, 4]
    codes = torch.stack((q_TGjr & 15, q_TGjr >> 4), 3).permute(0, 4, 1, 2, 3, 5).flatten(0, 1).flatten(1)
    row_scale, group_scale = scale[: 4 * rows].view(torch.float32), scale[4 * rows :].view(torch.int8)
    scale_NG = group_scale.view(-1, G, 2, 16).permute(0, 2, 3, 1).flatten(0, 2) * row_scale[:, None]
    return (LEVELS[codes.long()] * scale_NG.repeat_interleave(32, 1))[:N, :K]


def level_copy(w_NK: torch.Tensor) -> torch.Tensor:
    """The copy's plain twin: a group's largest weight is the first level, its scale 8 bits of the row's."""
    w_NGg = w_NK.unflatten(1, (-1, 32))
    scale_NG1 = w_NGg.gather(2, w_NGg.abs().argmax(2, keepdim=True)) / LEVELS[0]
    unit_N11 = scale_NG1.abs().amax(1, keepdim=True) / 127
    scale_NG1 = (scale_NG1 / unit_N11).round() * unit_N11
    codes = torch.bucketize(w_NGg / scale_NG1, (LEVELS[1:] + LEVELS[:-1]) / 2)
    return (LEVELS[codes] * scale_NG1).flatten(1)


def head_and_input(seed: int, N: int, K: int, *, outliers: float, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of sizes that differ by e^spread, and inputs a few of which are `outliers` times the others.

    No row is so large that its scale, a 127th of its largest weight, is past half precision's 65,504.
    """
    generator = torch.Generator().manual_seed(seed)
    size_N1 = (spread * torch.randn(N, 1, generator=generator)).exp().clamp(max=1e6)
    w_NK = torch.randn(N, K, generator=generator).clamp(-8, 8) * size_N1
    x_K = torch.randn(K, generator=generator)
    x_K[torch.randint(K, (5,), generator=generator)] *= outliers
    return w_NK, x_K


@pytest.mark.parametrize("isa", rest_slow(ISAS))
@pytest.mark.parametrize("weights", FORMATS)
@examples(25)
@given(
    N=st.integers(1, 200),
    K=st.integers(1, 300),
    outliers=st.sampled_from([0.0, 1.0, 100.0, 1e6]),
    spread=st.sampled_from([0.0, 0.5, 4.0]),
    seed=st.integers(0, 999),
)
@example(N=151, K=254, outliers=0.0, spread=4.0, seed=948)  # a scale beyond half precision
def test_no_output_lies_outside_its_margin(
    isa: str, weights: str, N: int, K: int, outliers: float, spread: float, seed: int
) -> None:
    w_NK, x_K = head_and_input(seed, N, K, outliers=outliers, spread=spread)
    told = tell(w_NK, x_K, weights, isa)
    off_N = (told.output_N.double() - told.estimate_N.double()).abs()
    unbounded_N = told.margin_N.isinf()  # a row that its format cannot hold is never ruled out
    assert ((off_N <= told.margin_N.double()) | unbounded_N).all()
    assert (told.output_N.isfinite() <= ~unbounded_N).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_estimate_and_margin_equal_their_twin(weights: str) -> None:
    w_NK, x_K = head_and_input(3, 500, 576, outliers=30.0, spread=0.3)
    told = tell(w_NK, x_K, weights)
    w_NK = cpu_twin.round_weight(w_NK, weights, 32)
    off, expected = ((w_NK - copy).norm(dim=1) for copy in (told.copy_NK, level_copy(w_NK)))
    apart_N = (off / expected - 1).abs()
    assert apart_N.median() < 1e-3 and apart_N.max() < 0.05  # a tie may choose another weight as a group's largest
    coarse_K = cpu_twin.round_activations(x_K, "int8")
    seen_K = cpu_twin.round_activations(x_K, weights)
    outliers = x_K.square().topk(32).indices
    error_NK, rest_K = w_NK - told.copy_NK, coarse_K.clone()
    rest_K[outliers] = 0
    estimate_N = told.copy_NK @ coarse_K + error_NK[:, outliers] @ coarse_K[outliers]
    rounding = float(error_NK.abs().max() / 254 * coarse_K[outliers].abs().sum())  # of the kept errors, to int8
    assert torch.allclose(told.estimate_N, estimate_N, atol=1.01 * rounding)
    error_NK[:, outliers] = 0
    norm_N = F.pad(w_NK.norm(dim=1), (0, 12)).view(-1, 16).amax(1).repeat_interleave(16)[:500]  # of a tile
    margin_N = error_NK.norm(dim=1) * rest_K.norm() + norm_N * (seen_K - coarse_K).norm()
    assert ((told.margin_N >= margin_N) & (told.margin_N < 1.1 * margin_N + 0.1)).all()


@pytest.mark.parametrize("weights", FORMATS)
def test_little_of_a_large_head_is_left_when_the_best_stands_out(weights: str) -> None:
    w_NK, x_K = head_and_input(5, 4096, 576, outliers=30.0, spread=0.2)
    w_NK[1234] += 0.3 * w_NK[1234].norm() * x_K.sign() / 24
    told = tell(w_NK, x_K, weights)
    least = told.output_N.max()
    candidates = int(((told.estimate_N + told.margin_N) >= least).sum())
    assert 1 <= candidates < 4096 / 20


# ------------------------------------------------------------------------------------------ the model


def best_tokens(fused: CpuDecoder, tokens_BS: torch.Tensor, *, best_only: bool) -> torch.Tensor:
    """[B, S], with one S a step, so that a row is screened."""
    B, S = tokens_BS.shape
    model_cache = new_cache(fused.model, slots=B)  # type: ignore[attr-defined]
    found = []
    for at in range(S):
        positions = torch.full((B, 1), at)
        step = fused.start(Batch(tokens_BS[:, at : at + 1], positions, model_cache, length=S), best_only=best_only)
        assert step.result().shape[-1] == (0 if best_only else fused.config.vocab_size)
        found.append(step.best())
    return torch.cat(found, 1)


def decoder(model: torch.nn.Module, weights: str, isa: str | None = None) -> CpuDecoder:
    fused = CpuDecoder(model, weights=weights, threads=3, isa=isa)
    fused.model = model  # type: ignore[attr-defined]
    return fused


@pytest.mark.parametrize("isa", rest_slow(ISAS))
@pytest.mark.parametrize("weights", [*FORMATS, "int4"])
@pytest.mark.parametrize("rows", [1, 4, 7, 9])
def test_best_is_the_whole_heads(weights: str, rows: int, isa: str) -> None:
    model = small_model(vocab_size=3001)
    fused = decoder(model, weights, isa)
    tokens = random_tokens(model, rows, 40)
    whole, screened = (best_tokens(fused, tokens, best_only=only) for only in (False, True))
    assert torch.equal(whole, screened)
    assert len(whole.unique()) > 10


@pytest.mark.parametrize("weights", FORMATS)
def test_the_lowest_of_equal_logits_wins(weights: str) -> None:
    model = small_model(vocab_size=3001)
    best = best_tokens(decoder(model, weights), random_tokens(model, 1, 1), best_only=False)
    row = model.output.weight[int(best)].clone()
    for twin in (2999, 1700, 700, 701):
        model.output.weight[twin] = row
    fused = decoder(model, weights)
    found = [best_tokens(fused, random_tokens(model, 1, 30), best_only=only) for only in (False, True)]
    assert torch.equal(*found) and (found[1] == min(700, int(best))).any()


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_noticed(weights: str, value: float) -> None:
    model = small_model(vocab_size=3001)
    fine = decoder(model, weights)
    model.output.weight[2000, 7] = value
    fused, tokens = decoder(model, weights), random_tokens(model, 2, 20)
    whole, screened = (best_tokens(fused, tokens, best_only=only) for only in (False, True))
    assert torch.equal(whole, screened)
    assert not torch.equal(whole, best_tokens(fine, tokens, best_only=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_token_that_overflows_has_no_best(value: float) -> None:
    model = small_model(vocab_size=3001)
    model.tok_embeddings.weight[50] = value
    fused = decoder(model, "int8")
    found = best_tokens(fused, torch.tensor([[3], [50], [4]]), best_only=True)[:, 0]
    assert found[1] == -1 and found[0] >= 0 and found[2] >= 0


def test_padding_rows_and_chosen_tokens() -> None:
    model = small_model(vocab_size=3001)
    fused, cache = decoder(model, "int8"), new_cache(model)
    tokens, positions = random_tokens(model, 2, 30), torch.arange(30).expand(2, 30).clone()
    positions[1, 11:] = cache.scratch
    batch = Batch(tokens, positions, cache, length=30, select_B=torch.tensor([29, 10]))
    whole, screened = (fused.start(batch, best_only=b).best() for b in (False, True))
    assert torch.equal(whole, screened)
    step = fused.start(Batch(tokens[:, :1], torch.full((2, 1), cache.scratch), cache, length=8), best_only=True)
    assert step.best().tolist() == [[0], [0]]


def test_a_small_share_or_4_bits_are_not_worth_a_screen() -> None:
    head = Linear(format=pack.INT8_ROW, rows=1000, cols=100)
    assert is_worth_it(head, step_bytes=500_000)
    assert not is_worth_it(head, step_bytes=2_000_000)
    assert not is_worth_it(Linear(format=pack.INT4, rows=1000, cols=100), step_bytes=100_000)
