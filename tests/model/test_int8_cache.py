"""The int8 KV cache: what it stores, what it takes, and that every path computes with it."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import ConfigError, EngineConfig, SamplingParams
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.runner import Runner
from gpt_fast.eval.divergence import window_figures
from gpt_fast.eval.score import Scorer
from gpt_fast.llm import Engine
from gpt_fast.load.checkpoint import load_checkpoint
from gpt_fast.load.sizes import build_cache
from gpt_fast.measure.texts import default_text, held_out_part, windows
from gpt_fast.model.cache import KVCache, quantize_heads
from gpt_fast.model.forward import Batch
from gpt_fast.ops.cpu import CpuDecoder, build
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator
from gpt_fast.text.load_tokenizer import load_tokenizer
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

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)


def cache_of(model, dtype=torch.int8, *, slots=3, max_seq_len=128):
    return KVCache(model.config, slots=slots, max_seq_len=max_seq_len, dtype=dtype, device=CPU)


# ------------------------------------------------------------------------------------------ elements


@given(seed=st.integers(0, 1000), size=st.floats(1e-30, 1e30))
def test_an_element_is_off_by_half_a_step_at_most(seed, size):
    x_BSHD = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale_BSH = quantize_heads(x_BSHD)
    assert codes.abs().amax(-1).eq(127).all()  # the whole range is used
    assert torch.equal(scale_BSH, x_BSHD.abs().amax(-1) / 127)
    # A quotient and a product of up to 127 are rounded once each: 127 half units in the last place on top of the half.
    half_a_step = 0.5 + 128 * torch.finfo(torch.float32).eps
    assert ((codes * scale_BSH[..., None] - x_BSHD).abs() <= scale_BSH[..., None] * half_a_step).all()


def test_heads_of_zeros_denormals_and_not_a_number():
    x_HD = torch.stack([torch.zeros(8), torch.full((8,), 1e-41), torch.ones(8), torch.ones(8)])
    x_HD[2, 3], x_HD[3, 3] = torch.nan, torch.inf
    codes, scale_H = quantize_heads(x_HD)
    back_HD = codes[:2] * scale_H[:2, None]
    assert not back_HD[0].any() and (back_HD[1] - x_HD[1]).abs().max() <= 1e-41
    assert not scale_H[2:].isfinite().any()  # the step that reads them is known to be ill


def test_reads_give_back_what_rows_out_of_order_wrote(tiny_model):
    cache = cache_of(tiny_model(), max_seq_len=8)
    k_BSHD, v_BSHD = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8)
    slots_B, positions_BS = torch.tensor([2, 0]), torch.tensor([[3, 4], [0, 1]])
    cache.write(1, slots_B, positions_BS, k_BSHD, v_BSHD)
    for x_BSHD, read_BHTD in zip((k_BSHD, v_BSHD), cache.read(1, slots_B, 2, 5), strict=True):
        expected_BHTD = torch.zeros(2, 2, 5, 8)
        expected_BHTD[0, :, 3:5], expected_BHTD[1, :, 0:2] = x_BSHD[0].transpose(0, 1), x_BSHD[1].transpose(0, 1)
        torch.testing.assert_close(read_BHTD, expected_BHTD, atol=x_BSHD.abs().max().item() / 250, rtol=0)
    in_order = cache.read(1, None, 3, 5)
    for all_BHTD, read_BHTD in zip(in_order, cache.read(1, slots_B, 2, 5), strict=True):
        assert torch.equal(all_BHTD[[2, 0]], read_BHTD) and not all_BHTD[1].any()
    assert not cache.k_LNHTD[0].any() and not cache.v_scale_LNHT[0].any()  # another layer


def test_copy_and_clear_take_the_scales_along(tiny_model):
    cache = cache_of(tiny_model(), max_seq_len=8)
    cache.write(0, torch.tensor([0, 1]), torch.arange(6).expand(2, 6), *torch.randn(2, 2, 6, 2, 8))
    before = cache.read(0, None, 3, 6)
    cache.copy_prefix(source=0, target=2, length=5)
    cache.clear(1)
    for old_BHTD, new_BHTD in zip(before, cache.read(0, None, 3, 6), strict=True):
        assert torch.equal(new_BHTD[2, :, :5], old_BHTD[0, :, :5]) and not new_BHTD[2, :, 5:].any()
        assert torch.equal(new_BHTD[0], old_BHTD[0]) and not new_BHTD[1].any()
    assert not cache.k_scale_LNHT[:, 1].any() and not cache.v_scale_LNHT[:, 1].any()


@pytest.mark.parametrize(("head_dim", "share"), [(64, 0.53125), (128, 0.515625)])
def test_bytes_are_half_of_bfloat16_and_the_scales(tiny_model, head_dim, share):
    model = tiny_model(head_dim=head_dim)
    int8, bf16 = (cache_of(model, dtype) for dtype in (torch.int8, torch.bfloat16))
    assert int8.nbytes == 2 * 2 * 3 * 2 * 129 * (head_dim + 4)  # k and v, layers, slots, heads, positions, bytes
    assert int8.nbytes / bf16.nbytes == share


# ------------------------------------------------------------------------------------- configuration


def test_the_choice_is_named_and_sized_scales_included(tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match=r"^kv_cache: unknown value \(got 'int4', allowed auto, .*, int8\)$"):
        EngineConfig(checkpoint_path="x", kv_cache="int4")
    with pytest.raises(ConfigError, match=r"^dtype: unknown value \(got 'int8'"):
        EngineConfig(checkpoint_path="x", dtype="int8")
    config = EngineConfig(checkpoint_path="x", kv_cache="int8", max_num_seqs=3)
    model = tiny_model().config
    need = cache_of(tiny_model()).nbytes
    monkeypatch.setattr("gpt_fast.load.sizes.free_memory", lambda device: need)
    assert build_cache(config, model, 128, torch.int8, CPU).nbytes == need
    monkeypatch.setattr("gpt_fast.load.sizes.free_memory", lambda device: need - 1)
    with pytest.raises(ConfigError, match=r"^max_num_seqs: 3 slots of 128 positions need"):
        build_cache(config, model, 128, torch.int8, CPU)


def test_a_drafts_cache_needs_room_beside_its_targets(tiny_model, monkeypatch):
    """Whose pages the system has not given yet, so that they still count as free."""
    target = cache_of(tiny_model())
    config = EngineConfig(checkpoint_path="x", max_num_seqs=3)
    monkeypatch.setattr("gpt_fast.load.sizes.free_memory", lambda device: 2 * target.nbytes)
    assert build_cache(config, target.config, 128, torch.int8, CPU, beside=target).slots == 3
    monkeypatch.setattr("gpt_fast.load.sizes.free_memory", lambda device: 2 * target.nbytes - 1)
    with pytest.raises(ConfigError, match=r"^max_num_seqs: 3 slots of 128 positions need"):
        build_cache(config, target.config, 128, torch.int8, CPU, beside=target)


def test_a_memory_budget_decides_how_many_slots_there_are(tiny_model):
    model, slot_gib = tiny_model().config, cache_of(tiny_model()).nbytes / 3 / 2**30

    def slots(budget: float, beside: KVCache | None = None) -> int:
        config = EngineConfig(checkpoint_path="x", max_num_seqs=5, kv_cache_gib=budget * slot_gib)
        return build_cache(config, model, 128, torch.int8, CPU, beside=beside).slots

    assert [slots(budget) for budget in (0, 1.01, 2.99, 4.01, 100)] == [5, 1, 2, 4, 5]
    assert slots(1.01, beside=cache_of(tiny_model())) == 3  # a draft's cache has its target's
    with pytest.raises(ConfigError, match=r"^kv_cache_gib: holds no slot of 128 positions; lower max_seq_len"):
        slots(0.99)


# --------------------------------------------------------------------------------------------- paths


@pytest.mark.slow
def test_logits_are_near_those_of_a_float_cache():
    model = small_model()
    tokens, sizes = random_tokens(model, 150), [100, 1, 5, 1, 43]
    got, expected = (run_chunks(model, tokens, new_cache(model, dtype=t), sizes) for t in (torch.int8, torch.float32))
    assert 0 < relative_error(got, expected) < 0.01


@pytest.mark.slow
@pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels")
def test_fused_rows_out_of_order_equal_plain_ones():
    model = small_model()
    fused, plain = CpuDecoder(model, weights="int8", threads=2).forward, cpu_twin.twin(model, weights="int8")
    tokens, slots_B = random_tokens(model, 2, 151), torch.tensor([3, 1])
    caches = [new_cache(model, dtype=torch.int8) for _ in range(2)]

    def run(forward, cache):
        before = forward(Batch(tokens[:, :150], torch.arange(150).expand(2, 150), cache, length=150, slots_B=slots_B))
        at = torch.full((2, 1), 150)
        return torch.cat((before, forward(Batch(tokens[:, 150:], at, cache, length=MAX_SEQ_LEN, slots_B=slots_B))), 1)

    with torch.inference_mode():
        got, expected = (run(*each) for each in zip((fused, plain), caches, strict=True))
        with activations_unrounded():
            assert_rounded_alike(got, expected, run(plain, new_cache(model)))
            run(plain, exact := new_cache(model, dtype=torch.int8))
    assert_rounded_alike(*(cache.v_scale_LNHT[:, [1, 3], :, :151] for cache in (*caches, exact)))


def runner_of(model, forward=None, **options):
    forward = model if forward is None else forward
    return Runner(decode=forward, prefill=forward, cache=cache_of(model), eos_ids=(1,), prefill_chunk=16, **options)


def answers(core, prompts):
    """The greedy tokens of each prompt; all run at once, each in a slot as one is free."""
    for i, prompt in enumerate(prompts):
        core.add(str(i), prompt, GREEDY)
    tokens = {str(i): [] for i in range(len(prompts))}
    while not core.idle:
        for event in core.step():
            tokens[event.request_id].append(event.token)
    return list(tokens.values())


def some_prompts(count, *, shared=40):
    rng = random.Random(0)
    prefix = [rng.randrange(2, 97) for _ in range(shared)]
    return [prefix + [rng.randrange(2, 97) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


@pytest.mark.slow
def test_a_shared_prefix_is_copied_with_its_scales(tiny_model):
    model, prompts = tiny_model(), some_prompts(7)
    core = EngineCore(runner_of(model))
    copied = []
    core.runner.cache.copy_prefix = lambda **of: copied.append(of) or KVCache.copy_prefix(core.runner.cache, **of)
    assert answers(core, prompts) == [answers(EngineCore(runner_of(model)), [p])[0] for p in prompts]
    assert copied


@pytest.mark.slow
@pytest.mark.parametrize("proposer", ["ngram", "draft"])
def test_speculation_changes_no_token(tiny_model, proposer):
    model, prompts = tiny_model(), some_prompts(5)
    proposes = NGramProposer(CPU) if proposer == "ngram" else DraftProposer(runner_of(tiny_model(seed=3)))
    speculator = Speculator({proposer: proposes}, Controller([3]), max_seq_len=128, always=Choice(proposer, 3))
    core = EngineCore(runner_of(model, speculator=speculator))
    assert answers(core, prompts) == answers(EngineCore(runner_of(model)), prompts)


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(tiny_model, fresh_compiler):
    from torch._dynamo.utils import counters

    counters.clear()
    model = tiny_model(n_layer=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # dynamo's guards are what is tested
    runner = runner_of(model, compiled)
    runner.warm_up()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert answers(EngineCore(runner), some_prompts(7)) == answers(EngineCore(runner_of(model)), some_prompts(7))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_compiled_code_equals_plain(tiny_model, fresh_compiler):
    model = tiny_model(n_layer=1)
    tokens, positions = torch.randint(0, 97, (3, 9)), torch.arange(9).expand(3, 9)
    caches = [cache_of(model) for _ in range(2)]
    with torch.inference_mode():
        got, expected = (
            forward(Batch(tokens, positions, cache, length=128, slots_B=torch.tensor([2, 0, 1])))
            for forward, cache in zip((torch.compile(model, fullgraph=True), model), caches, strict=True)
        )
    torch.testing.assert_close(got, expected, atol=1e-2, rtol=0)
    assert (caches[0].k_LNHTD.int() - caches[1].k_LNHTD.int()).abs().max() <= 1  # a tie may round the other way
    torch.testing.assert_close(caches[0].k_scale_LNHT, caches[1].k_scale_LNHT)


# -------------------------------------------------------------------------------- the default model


@pytest.mark.model
def test_the_default_models_predictions_hardly_change(default_checkpoint):
    loaded = load_checkpoint(default_checkpoint, device="cpu", dtype=torch.float32)
    loaded.model.setup_rope(256, CPU)
    tokens = load_tokenizer(default_checkpoint).encode(held_out_part(default_text()).content, add_bos=False)
    passages = windows(tokens, length=256, limit=4, prefix=[])
    int8, float32 = (
        Scorer(loaded.model, KVCache(loaded.config, slots=1, max_seq_len=256, dtype=dtype, device=CPU))
        for dtype in (torch.int8, torch.float32)
    )
    parts = [figures for passage in passages for figures in window_figures(int8, float32, passage)]
    nll_int8, nll_float32, kl = (torch.cat([getattr(p, name) for p in parts]) for name in ("nll_a", "nll_b", "kl"))
    change = nll_int8 - nll_float32
    error, kl_error = (float(x.std()) / len(x) ** 0.5 for x in (change, kl))
    print(f"{len(kl)} tokens: loss {change.mean():+.5f} +- {error:.5f}, mean KL {kl.mean():.5f} +- {kl_error:.5f}")
    assert 0 < kl.mean() < 0.002
    # In the mean over what the model expects, the loss grows by the KL; this text is a sample: 5 standard errors.
    assert abs(change.mean() - kl.mean()) < 5 * error


@pytest.mark.model
@pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without kernels")
def test_the_default_model_fused_says_the_same_with_proposals_and_nearly_the_same_as_with_floats(default_checkpoint):
    prompts = ["The capital of France is", "Once upon a time, in a small village by the sea,", "Water boils at"]
    params = [SamplingParams(max_new_tokens=16, ignore_eos=True)] * len(prompts)
    answers = []
    for options in ({"kv_cache": "float32"}, {}, {"speculate": "ngram"}):
        options = {"kv_cache": "int8", "dtype": "bfloat16", "max_seq_len": 128, "max_num_seqs": 3, **options}
        engine = Engine.load(str(default_checkpoint), device="cpu", **options)
        assert engine.description.path == "fused CPU decoder"
        assert engine.description.kv_cache == options["kv_cache"]
        answers.append([list(answer.tokens) for answer in engine.generate(prompts, params)])
    float32, int8, proposed = answers
    assert int8 == proposed
    assert [row[:4] for row in int8] == [row[:4] for row in float32]
