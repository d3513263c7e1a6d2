"""The GPU decoder and its loop, on the kernels' plain twins; what needs a GPU runs where there is one."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import EngineConfig, SamplingParams
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.graph_runner import GraphRunner
from gpt_fast.engine.runner import Runner
from gpt_fast.load import path as load_path
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.ops.gpu import decoder as gpu_decoder
from gpt_fast.ops.gpu.decoder import GpuDecoder, splits_for, unavailable, unsupported, weight_bytes
from gpt_fast.ops.gpu.graph import DecodeLoop
from gpt_fast.ops.gpu.ring import Ring
from gpt_fast.ops.gpu.state import Row
from gpt_fast.quantize.linear import pack
from gpt_fast.request import NO_TOKEN
from support.cpu_models import CPU, MAX_SEQ_LEN, small_model
from support.examples import examples
from support.quantized import quantized_model

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EOS = 7
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PARAMS = [
    SamplingParams(max_new_tokens=23, seed=3),
    SamplingParams(max_new_tokens=17, temperature=0.9, seed=4, top_k=40),
    SamplingParams(max_new_tokens=30, temperature=0.7, top_p=0.9, seed=5),
]
PROMPTS = [[5, 9, 3], [8, 8, 1, 2, 30], list(range(40, 60))]


@pytest.fixture(scope="module")
def model():
    return small_model().requires_grad_(False)


@pytest.fixture(scope="module")
def decoder(model):
    return GpuDecoder(model)


def new_cache(model, slots=4, max_seq_len=MAX_SEQ_LEN - 1, dtype=None):
    device, dtype = model.norm.weight.device, dtype or model.norm.weight.dtype
    cache = KVCache(model.config, slots=slots, max_seq_len=max_seq_len, dtype=dtype, device=device)
    torch.manual_seed(5)
    if dtype == torch.int8:
        cache.k_LNHTD.random_(-127, 128)
        cache.v_LNHTD.random_(-127, 128)
        cache.k_scale_LNHT.uniform_(0, 1 / 64)
        cache.v_scale_LNHT.uniform_(0, 1 / 64)
    else:
        cache.k_LNHTD.normal_()
        cache.v_LNHTD.normal_()
    return cache


def core_of(decode, model, max_seq_len=MAX_SEQ_LEN - 1, eos_ids=(EOS,), dtype=None):
    cache = new_cache(model, max_seq_len=max_seq_len, dtype=dtype)
    return EngineCore(Runner(decode=decode, prefill=model, cache=cache, eos_ids=eos_ids, prefill_chunk=32))


def answers(core, prompts, params):
    """Every request's tokens and why each ended."""
    tokens, reasons = [[] for _ in prompts], [""] * len(prompts)
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        core.add(str(i), prompt, one)
    while not core.idle:
        for event in core.step():
            tokens[int(event.request_id)].append(event.token)
            reasons[int(event.request_id)] = event.finish_reason
    return tokens, reasons


# --------------------------------------------------------------------------------------- one forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "size", "slots", "every"),
    [
        (1, 1, None, False),
        (4, 1, None, False),
        (2, 1, [3, 1], False),
        (1, 5, None, True),
        (2, 8, [2, 0], True),
        (3, 4, [1, 3, 0], False),
        (1, 16, [2], False),
        (4, 5, [1, 3, 0, 2], False),
        (4, 9, None, True),
    ],
)
@torch.inference_mode()
def test_forward_equals_plain_path(model, decoder, rows, size, slots, every):
    torch.manual_seed(rows * size)
    tokens_BS = torch.randint(0, model.config.vocab_size, (rows, size))
    positions_BS = torch.randint(0, 100, (rows, 1)) + torch.arange(size)
    select_B = None if every else torch.randint(0, size, (rows,))
    slots_B = None if slots is None else torch.tensor(slots)
    caches = [new_cache(model) for _ in range(2)]
    got, want = (
        forward(Batch(tokens_BS, positions_BS, cache, length=128, slots_B=slots_B, select_B=select_B))
        for forward, cache in zip((decoder, model), caches, strict=True)
    )
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(caches[0].k_LNHTD, caches[1].k_LNHTD, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(caches[0].v_LNHTD, caches[1].v_LNHTD, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "size", "slots"), [(1, 1, None), (2, 3, [3, 0]), (4, 5, [1, 3, 0, 2])])
@torch.inference_mode()
def test_int8_cache_equals_plain_path(model, decoder, rows, size, slots):
    """Keys, values and scales as KVCache has them; a code may fall to the other side of a rounding."""
    torch.manual_seed(rows * size)
    tokens_BS = torch.randint(0, model.config.vocab_size, (rows, size))
    positions_BS = torch.randint(0, 100, (rows, 1)) + torch.arange(size)
    slots_B = None if slots is None else torch.tensor(slots)
    caches = [new_cache(model, dtype=torch.int8) for _ in range(2)]
    got, want = (
        forward(Batch(tokens_BS, positions_BS, cache, length=128, slots_B=slots_B))
        for forward, cache in zip((decoder, model), caches, strict=True)
    )
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    for mine, theirs in zip(caches[0].buffers(), caches[1].buffers(), strict=True):
        atol = 1 if mine.dtype == torch.int8 else 1e-4
        torch.testing.assert_close(mine.float(), theirs.float(), atol=atol, rtol=1e-3)
    decoder.graphs.clear()


@torch.inference_mode()
def test_padding_tokens_disturb_nobody(model, decoder):
    cache, alone = new_cache(model), new_cache(model)
    tokens_BS, positions_BS = torch.tensor([[3, 4, 0]]), torch.tensor([[50, 51, cache.scratch]])
    got = decoder(Batch(tokens_BS, positions_BS, cache, length=64))
    want = model(Batch(tokens_BS[:, :2], positions_BS[:, :2], alone, length=64))
    torch.testing.assert_close(got[:, :2], want, atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_part_of_each_head_may_rotate():
    model = small_model(rope_dim=32).requires_grad_(False)
    inputs = torch.tensor([[3, 4]]), torch.tensor([[50, 51]])
    got, want = (forward(Batch(*inputs, new_cache(model), length=64)) for forward in (GpuDecoder(model), model))
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@torch.inference_mode()
def test_logits_outlive_the_next_step(model, decoder):
    cache, at = new_cache(model), torch.tensor([[20]])
    first = decoder(Batch(torch.tensor([[3]]), at, cache, length=64))
    kept = first.clone()
    decoder(Batch(torch.tensor([[90]]), at + 1, cache, length=64))
    assert torch.equal(first, kept)


@torch.inference_mode()
def test_each_cache_has_its_own_graphs(model):
    decoder, inputs = GpuDecoder(model), (torch.tensor([[3]]), torch.tensor([[20]]))
    want = [model(Batch(*inputs, new_cache(model, max_seq_len=n), length=30)) for n in (40, 60)]
    got = [decoder(Batch(*inputs, new_cache(model, max_seq_len=n), length=30)) for n in (40, 60)]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert len({key[0] for key in decoder.graphs}) == 2


@torch.inference_mode()
def test_many_tokens_take_the_other_path(model):
    calls = []

    def prefill(batch):
        calls.append(batch.tokens_BS.shape)
        return model(batch)

    decoder, cache = GpuDecoder(model, prefill=prefill), new_cache(model)
    decoder(Batch(torch.zeros(1, 17, dtype=torch.long), torch.arange(17)[None], cache, length=128))
    decoder(Batch(torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None], cache, length=128))
    decoder(Batch(torch.zeros(4, 16, dtype=torch.long), torch.arange(16).repeat(4, 1), cache, length=128))
    assert calls == [(1, 17)]
    decoder(Batch(torch.zeros(5, 16, dtype=torch.long), torch.arange(16).repeat(5, 1), new_cache(model, 5), length=128))
    assert calls == [(1, 17), (5, 16)]


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_quantized_modules_keep_their_codes(mode, tied):
    model = quantized_model(small_model(dim=128, intermediate_size=160, tie_embeddings=tied), mode=mode, groupsize=32)
    model.setup_rope(MAX_SEQ_LEN, CPU)
    inputs = torch.randint(0, 301, (1, 5)), 30 + torch.arange(5)[None]
    want = model(Batch(*inputs, new_cache(model), length=64))
    decoder = GpuDecoder(model)
    assert decoder.head.kind == ("int8g" if tied and mode == "int4" else mode)
    torch.testing.assert_close(decoder(Batch(*inputs, new_cache(model), length=64)), want, atol=2e-3, rtol=1e-3)
    pack(model)  # the path for many tokens goes on
    torch.testing.assert_close(model(Batch(*inputs, new_cache(model), length=64)), want, atol=2e-2, rtol=1e-2)


@torch.inference_mode()
def test_fp8_is_near():
    model = small_model(dim=128, intermediate_size=160).requires_grad_(False)
    inputs = torch.randint(0, 301, (1, 5)), 30 + torch.arange(5)[None]
    want = model(Batch(*inputs, new_cache(model), length=64))
    got = GpuDecoder(model, fp8=True)(Batch(*inputs, new_cache(model), length=64))
    assert 0 < (got - want).norm() / want.norm() < 0.1


@torch.inference_mode()
def test_no_float_weight_is_held_twice():
    model = small_model().requires_grad_(False)
    decoder = GpuDecoder(model)
    held = {layer.gate_up.weight.untyped_storage().data_ptr() for layer in decoder.layers}
    for layer in model.layers:
        for linear in (layer.feed_forward.w1, layer.feed_forward.w3):
            assert linear.weight.untyped_storage().data_ptr() in held
    embedding = model.tok_embeddings.weight.nbytes
    assert weight_bytes(decoder) == sum(p.nbytes for p in model.parameters()) - embedding


# -------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_expert=4, n_expert_per_token=2), "n_expert=4"),
        (dict(head_dim=40), "head_dim=40"),
        (dict(sliding_window=16, sliding_layers=(0,)), "sliding_window=16"),
        (dict(qk_norm=True), "qk_norm"),
        (dict(qkv_bias=True), "biases"),
        (dict(head_dim=160), "head_dim=160"),
    ],
)
def test_unsupported_names_the_reason(changes, message):
    model = small_model(**changes)
    assert message in unsupported(model)
    with pytest.raises(ValueError, match=message):
        GpuDecoder(model)


def test_unavailable_devices(monkeypatch):
    assert unavailable(CPU) is None
    assert "mps" in unavailable(torch.device("mps"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in unavailable(torch.device("cuda"))


def test_path_choice_says_why_not(model):
    config = EngineConfig(checkpoint_path="x")
    path = load_path.gpu_path(config, small_model().requires_grad_(False).bfloat16(), 1)
    assert path.name == "fused GPU decoder" and isinstance(path.decode, GpuDecoder)
    bfloat16 = {"slots": 2, "max_seq_len": 40, "dtype": torch.bfloat16, "device": CPU}
    runner = path.runner(
        decode=path.decode,
        prefill=path.prefill,
        cache=KVCache(model.config, **bfloat16),
        eos_ids=(EOS,),
        prefill_chunk=16,
        speculator=None,
    )
    assert isinstance(runner, GraphRunner)
    assert load_path.gpu_path(EngineConfig(checkpoint_path="x", kv_cache="int8"), model, 1).name == "fused GPU decoder"
    narrow = EngineConfig(checkpoint_path="x", kv_cache="bfloat16")
    odd = quantized_model(small_model(dim=80), mode="int4", groupsize=32)
    odd.setup_rope(MAX_SEQ_LEN, CPU)
    experts = small_model(n_expert=4, n_expert_per_token=2)
    for options, unfit, why in (
        (config, experts, "n_expert"),
        (narrow, model, "kv_cache=bfloat16"),
        (config, odd, "32 inputs"),
    ):
        with pytest.raises(load_path.Refused, match=why):
            load_path.gpu_path(options, unfit, 1)


@given(longest=st.integers(1, 40_000), rows=st.integers(1, 40), size=st.integers(1, 8), length=st.integers(1, 40_000))
@examples(200)
def test_a_warm_up_meets_every_reach(decoder, longest, rows, size, length):
    assert decoder.reach(rows, size, min(length, longest)) in decoder.reaches(rows, size, longest)


def test_splits_fill_the_gpu_and_are_never_tiny():
    assert splits_for(1, programs=8, processors=132) == 1
    assert splits_for(128, programs=8, processors=132) == 2
    assert splits_for(32768, programs=8, processors=132) == 32
    assert splits_for(32768, programs=512, processors=132) == 1


def test_warm_up_captures_all_that_requests_need(model):
    decoder = GpuDecoder(model)
    core = core_of(decoder, model)
    core.runner.warm_up()
    before = set(decoder.graphs)
    answers(core, PROMPTS, PARAMS)
    assert set(decoder.graphs) == before


# ------------------------------------------------------------------------------------- the engine


def test_engine_says_the_same_with_an_int8_cache(model, decoder):
    greedy = [SamplingParams(max_new_tokens=20, ignore_eos=True)] * len(PROMPTS)
    plain = answers(core_of(model, model, dtype=torch.int8), PROMPTS, greedy)
    cores = core_of(decoder, model, dtype=torch.int8), burst_core(decoder, model, dtype=torch.int8)
    for core in cores:
        assert core.runner.cache.k_scale_LNHT is not None and answers(core, PROMPTS, greedy) == plain


def test_engine_says_the_same(model, decoder):
    assert answers(core_of(decoder, model), PROMPTS, PARAMS) == answers(core_of(model, model), PROMPTS, PARAMS)


# --------------------------------------------------------------------------------------- the loop


def begin(decoder, model, prompts, params, *, rows=4, steps=3, max_seq_len=MAX_SEQ_LEN - 1, eos_ids=(EOS,), ring=None):
    """A loop whose cache holds the prompts, its rows with their first tokens, and those tokens."""
    runner = core_of(decoder, model, max_seq_len).runner
    loop = DecodeLoop(decoder, runner.cache, rows=rows, steps=steps, eos_ids=eos_ids, ring=ring)
    starts = []
    for slot, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        core = core_of(model, model, max_seq_len, eos_ids)
        params_of_first = dataclasses.replace(one, max_new_tokens=1)
        first = answers(core, [prompt], [params_of_first])[0][0][0]
        with torch.inference_mode():
            runner.forward(model, [prompt], [0], [slot], size=32)
        limit = min(len(prompt) + one.max_new_tokens, max_seq_len)
        starts.append(
            Row(
                slot,
                first,
                len(prompt),
                limit,
                one.temperature,
                one.top_k,
                one.top_p,
                one.seed or 0,
                not one.ignore_eos,
            )
        )
    return loop, starts


def said(loop, starts):
    tokens = [[row.token] for row in starts]
    for fresh in loop.run(starts):
        for row, more in zip(tokens, fresh, strict=True):
            row += more
    return tokens


@pytest.mark.parametrize("steps", [1, 3, 8, 64])
def test_loop_says_what_the_engine_says(model, decoder, steps):
    want, _ = answers(core_of(model, model), PROMPTS, PARAMS)
    loop, starts = begin(decoder, model, PROMPTS, PARAMS, steps=steps)
    assert said(loop, starts) == want
    assert loop.tokens == sum(map(len, want)) - len(want)
    assert loop.host_seconds > 0
    assert said(loop, starts[:1]) == want[:1]  # again, with fewer rows


@given(steps=st.integers(1, 6), lengths=st.lists(st.integers(2, 14), min_size=1, max_size=3), seed=st.integers(0, 9))
@examples(15)
def test_loop_stops_exactly(model, decoder, steps, lengths, seed):
    """At an end-of-sequence id, at max_new_tokens or at the end of the slot, whichever is first."""
    prompts = [[seed + i] * (1 + 3 * i) for i in range(len(lengths))]
    free = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in lengths]
    plain, _ = answers(core_of(model, model, 13), prompts, free)
    eos_ids = sorted({plain[0][-1], plain[-1][len(plain[-1]) // 2]})  # tokens that will come
    params = [SamplingParams(max_new_tokens=n, ignore_eos=i == 1) for i, n in enumerate(lengths)]
    want, _ = answers(core_of(model, model, 13, eos_ids), prompts, params)
    loop, starts = begin(decoder, model, prompts, params, steps=steps, max_seq_len=13, eos_ids=eos_ids)
    open_rows = [i for i, row in enumerate(starts) if row.room > 0 and (row.token not in eos_ids or not row.eos)]
    if open_rows:
        got = said(loop, [starts[i] for i in open_rows])
        assert got == [want[i] for i in open_rows]


def test_loop_leaves_other_slots_and_later_positions_alone(model, decoder):
    loop, starts = begin(decoder, model, PROMPTS[:2], PARAMS[:2])
    before = loop.cache.k_LNHTD.clone()
    said(loop, starts)
    changed = (loop.cache.k_LNHTD != before).any(dim=4).any(dim=2).any(dim=0)  # [slots, positions]
    for row in starts:
        assert not changed[row.slot, : row.position].any()
        assert not changed[row.slot, row.limit - 1 : loop.cache.scratch].any()
    assert not changed[3].any()


def test_a_row_of_nan_ends_and_the_others_go_on(model, decoder):
    want, _ = answers(core_of(model, model), PROMPTS, PARAMS)
    loop, starts = begin(decoder, model, PROMPTS, PARAMS)
    loop.cache.k_LNHTD[:, 1, :, 0] = torch.nan
    got = said(loop, starts)
    assert got[1] == [starts[1].token, NO_TOKEN]
    assert [got[0], got[2]] == [want[0], want[2]]


def test_more_rows_than_the_kernels_hold(model, decoder):
    cache = new_cache(model, slots=18, max_seq_len=40)
    loop = DecodeLoop(decoder, cache, rows=18, steps=2, eos_ids=[])
    starts = [Row(slot=i, token=3 + i, position=10 + i % 3, limit=20) for i in range(18)]
    many = said(loop, starts)
    few = DecodeLoop(decoder, new_cache(model, slots=18, max_seq_len=40), rows=2, steps=2, eos_ids=[])
    assert many[16:] == said(few, starts[16:])
    with pytest.raises(ValueError, match="row i must be slot i"):
        next(loop.run(starts[::-1]))


def test_bad_rows_are_refused(model, decoder):
    loop, starts = begin(decoder, model, PROMPTS[:1], PARAMS[:1])
    for rows in ([], starts * 5, [starts[0]._replace(limit=4)], [starts[0]._replace(limit=MAX_SEQ_LEN)]):
        with pytest.raises(ValueError, match="row"):
            next(loop.run(rows))


# --------------------------------------------------------------------------------------- the ring


class SlowCopies:
    """Copies that only happen when they are waited for: the worst a device may do."""

    def __init__(self):
        self.log = []

    def __call__(self, target, source):
        self.log.append("copy")
        return partial(self.finish, target, source.clone())

    def finish(self, target, source):
        self.log.append("wait")
        target.copy_(source)


def test_reader_waits_and_reads_one_replay_late(model, decoder):
    want, _ = answers(core_of(model, model), PROMPTS, PARAMS)
    copies = SlowCopies()
    loop, starts = begin(decoder, model, PROMPTS, PARAMS, ring=Ring((3, 4), pinned=False, copy=copies))
    assert said(loop, starts) == want
    order = [kind for i, kind in enumerate(copies.log) if kind != copies.log[i - 1] or i == 0 or kind == "copy"]
    assert order[:4] == ["copy", "copy", "wait", "copy"]  # the second replay is under way before the first is read


def test_ring_never_shows_what_was_not_written():
    broken = Ring((2, 1), pinned=False, copy=lambda target, source: lambda: None)
    broken.publish(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(RuntimeError, match="before it was written"):
        broken.take()


def test_ring_waits_for_the_copy():
    ring = Ring((1, 1), pinned=False, copy=SlowCopies())
    ring.publish(torch.tensor([[4]]))
    assert ring.take() == [[4]]


def test_ring_never_overwrites_what_was_not_read():
    ring = Ring((1, 1), pinned=False, depth=2)
    for value in (1, 2):
        ring.publish(torch.tensor([[value]]))
    with pytest.raises(RuntimeError, match="waits to be read"):
        ring.publish(torch.tensor([[3]]))
    assert [ring.take(), ring.take()] == [[[1]], [[2]]]


# ------------------------------------------------------------------------------ where there is a GPU


@pytest.fixture(scope="module")
def on_cuda():
    """The small model on the GPU, in float32."""
    device = torch.device("cuda")
    model = small_model().requires_grad_(False).to(device)
    model.setup_rope(MAX_SEQ_LEN, device)
    return model, GpuDecoder(model)


@CUDA
@pytest.mark.gpu
def test_cuda_engine_says_the_same(on_cuda):
    model, decoder = on_cuda
    greedy = [SamplingParams(max_new_tokens=23)] * len(PROMPTS)
    assert answers(core_of(decoder, model), PROMPTS, greedy) == answers(core_of(model, model), PROMPTS, greedy)


@CUDA
@pytest.mark.gpu
def test_cuda_loop_never_synchronizes(on_cuda):
    model, decoder = on_cuda
    greedy = [SamplingParams(max_new_tokens=23)] * len(PROMPTS)
    want, _ = answers(core_of(model, model), PROMPTS, greedy)
    loop, starts = begin(decoder, model, PROMPTS, greedy)
    loop.warm_up()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert said(loop, starts) == want
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.gpu
@torch.inference_mode()
def test_cuda_verify_of_five(on_cuda):
    model, decoder = on_cuda
    inputs = torch.arange(5, device="cuda")[None], 30 + torch.arange(5, device="cuda")[None]
    got, want = (forward(Batch(*inputs, new_cache(model), length=64)) for forward in (decoder, model))
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    assert torch.equal(got.argmax(-1), want.argmax(-1))


@CUDA
@pytest.mark.gpu
def test_cuda_step_of_the_state_equals_twin():
    from gpt_fast.ops.gpu.state import State, advance_launch, advance_reference

    device, eos_E = torch.device("cuda"), torch.tensor([3, 4], device="cuda")
    results = []
    for step in (advance_reference, lambda *args, **kwargs: advance_launch(*args, **kwargs).run()):
        torch.manual_seed(0)
        state, out_B = State.empty(13, device), torch.full((13,), -9, device=device)
        state.inputs.positions_M.random_(0, 6)
        state.limit_B.random_(3, 9)
        state.eos_B.copy_(torch.rand(13, device=device) > 0.5)
        step(torch.randint(-1, 5, (13,), device=device), state, eos_E, out_B, scratch=5)
        results.append((*state.inputs, *state[1:], out_B))
    assert all(map(torch.equal, *results))


def test_processors_are_assumed_where_none_are(decoder):
    assert decoder.processors == gpu_decoder.PROCESSORS


# ------------------------------------------------------------------------------ bursts in the engine


def burst_core(decoder, model, *, slots=4, steps=3, max_seq_len=MAX_SEQ_LEN - 1, dtype=None):
    cache = new_cache(model, slots=slots, max_seq_len=max_seq_len, dtype=dtype)
    return EngineCore(
        GraphRunner(
            decoder=decoder, steps=steps, decode=decoder, prefill=model, cache=cache, eos_ids=(EOS,), prefill_chunk=16
        )
    )


ODD = [
    SamplingParams(max_new_tokens=12, repetition_penalty=1.3),
    SamplingParams(max_new_tokens=12, logprobs=2),
    SamplingParams(max_new_tokens=15, temperature=0.8, min_p=0.05, seed=1),
    SamplingParams(max_new_tokens=20, min_tokens=9),
    SamplingParams(max_new_tokens=25, stop_token_ids=(130,)),
]


@pytest.mark.slow
@pytest.mark.parametrize("params", [PARAMS, [*PARAMS, *ODD], ODD])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_bursts_say_what_steps_say(model, decoder, params, slots):
    prompts = [[11 + i, 5, 9][: 1 + i % 3] * (1 + 4 * i) for i in range(len(params))]
    core = burst_core(decoder, model, slots=slots)
    want = answers(core_of(model, model), prompts, params)
    assert answers(core, prompts, params) == want
    assert answers(core, prompts[::-1], params[::-1])[0] == want[0][::-1]  # again, over what the first left


@pytest.mark.slow
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20), st.booleans()), min_size=1, max_size=6),
    steps=st.integers(1, 5),
)
@examples(25)
def test_bursts_among_arrivals_and_aborts(model, decoder, arrivals, steps):
    """Requests that come and go at any time never see each other."""
    core = burst_core(decoder, model, slots=2, steps=steps)
    said, wanted = {}, {}
    for i, (when, length, aborted) in enumerate(arrivals):
        prompt, params = [20 + i] * (1 + when), SamplingParams(max_new_tokens=length)
        wanted[str(i)] = answers(core_of(model, model), [prompt], [params])[0][0]
        for _ in range(when):
            note(said, core.step())
        core.add(str(i), prompt, params)
        if aborted and i:
            core.abort(str(i - 1))
    while not core.idle:
        note(said, core.step())
    core.scheduler.check_integrity()
    for name, tokens in wanted.items():
        cut = int(name) + 1 < len(arrivals) and arrivals[int(name) + 1][2]
        got = said.get(name, [])
        assert got == tokens[: len(got)] and (cut or got == tokens)


def note(said, events):
    for event in events:
        said.setdefault(event.request_id, []).append(event.token)


def test_more_rows_than_a_burst_holds_go_step_by_step(model, decoder):
    core, params = burst_core(decoder, model, slots=18), SamplingParams(max_new_tokens=6, ignore_eos=True)
    prompts = [[30 + i, 4] for i in range(18)]
    want = answers(core_of(model, model), prompts, [params] * 18)
    assert answers(core, prompts, [params] * 18) == want


def test_bursts_bring_several_tokens(model, decoder):
    core = burst_core(decoder, model, steps=4)
    core.add("a", PROMPTS[0], SamplingParams(max_new_tokens=9, ignore_eos=True))
    counts = [len(core.step()) for _ in range(3)]
    assert counts == [1, 4, 4] and core.idle
