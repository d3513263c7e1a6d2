"""The engine over real tiny models: a request's tokens are its own, whatever runs beside it or ran before it."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import SamplingParams
from gpt_fast.engine.chunk_budget import JoinedBudget
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.overlap_runner import OverlapRunner
from gpt_fast.engine.runner import Runner, bucket_of, buckets
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.ops.cpu import CpuDecoder
from gpt_fast.request import NO_TOKEN, SampledToken, StepPlan
from support.company import EOS, VOCAB, answer, check_company, random_requests, run, tokens_of
from support.examples import examples


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(n_layer=2)


# ------------------------------------------------------------------------------------- company


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 8), reuse=st.booleans())
@examples(25)
def test_tokens_do_not_depend_on_company(model, make_core, seed, slots, reuse):
    """Requests join and leave in random order, some are aborted: each gets what it gets alone on a fresh engine."""
    rng = random.Random(seed)
    check_company(
        random_requests(rng, 8), make_core(model, slots=slots, reuse_prefix=reuse), lambda: make_core(model), rng
    )


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4), threads=st.integers(1, 3), reuse=st.booleans())
@examples(40)
def test_steps_that_begin_before_they_are_planned_change_no_token(tiny_model, seed, slots, threads, reuse):
    """On the fused decoder the next step begins before this one's tokens are known; some guesses prove wrong."""
    model = tiny_model(n_layer=2, head_dim=16)
    rng = random.Random(seed)

    def core(slots, reuse_prefix=True):
        fused = CpuDecoder(model, weights="int8", threads=threads)
        cache = KVCache(model.config, slots=slots, max_seq_len=120, dtype=torch.float32, device=torch.device("cpu"))
        runner = OverlapRunner(
            decode=fused, prefill=fused, cache=cache, eos_ids={EOS, 7, 8}, prefill_chunk=32, budget=JoinedBudget([32])
        )
        return EngineCore(runner, reuse_prefix=reuse_prefix)

    requests = random_requests(rng, 8)
    for name, (prompt, _) in requests.items():
        if rng.random() < 0.8:
            limits = SamplingParams(max_new_tokens=rng.randrange(1, 40), ignore_eos=rng.random() < 0.3)
            requests[name] = (prompt, limits)
    check_company(requests, core(slots, reuse), lambda: core(1), rng)


@pytest.mark.slow
def test_prefix_reuse_changes_no_token(model, make_core):
    rng = random.Random(1)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(40)]]
    params = SamplingParams(max_new_tokens=8, temperature=0.9, seed=3, ignore_eos=True)
    warm = make_core(model, slots=2)
    for turn in range(4):
        prompt = prompts[-1]
        warm.add("turn", prompt, params)
        reused = warm.scheduler.waiting[-1]
        out = tokens_of(run(warm)["turn"])
        assert out == answer(make_core(model, reuse_prefix=False), prompt, params)
        assert (reused.reused > 0) == (turn > 0)
        prompts.append([*prompt, *out, 5, 6])


@pytest.mark.slow
def test_after_an_abort_the_slot_is_free_and_the_next_request_equals_a_fresh_engines(model, make_core):
    rng = random.Random(2)
    prompt = [rng.randrange(2, VOCAB) for _ in range(50)]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    for steps in (0, 1, 2, 4, 10):  # waiting, in the middle of the prompt, decoding
        core = make_core(model, slots=1)
        core.add("gone", prompt, params)
        for _ in range(steps):
            core.step()
        assert core.abort("gone") and core.idle and not core.abort("gone")
        assert len(core.scheduler.free) == 1
        for other in (prompt, prompt[:20] + [9] * 20):
            assert answer(core, other, params) == answer(make_core(model), other, params)


# ------------------------------------------------------------------------------------- the ends


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 127])
def test_prompts_of_every_length_fill_the_context(model, make_core, length):
    core = make_core(model)
    core.add("a", [2 + i % 90 for i in range(length)], SamplingParams(max_new_tokens=1000, ignore_eos=True))
    events = run(core)["a"]
    assert len(events) == 128 - length
    assert [e.finish_reason for e in events] == [None] * (len(events) - 1) + ["length"]


def test_prompts_that_do_not_fit_are_refused(model, make_core):
    core = make_core(model)
    for prompt in ([], [5] * 128, [5] * 1000):
        with pytest.raises(ValueError, match="prompt"):
            core.add("a", prompt, SamplingParams())
    assert core.idle and core.step() == []


@pytest.mark.parametrize("token", [-1, VOCAB, 1 << 40])
def test_tokens_outside_the_vocabulary_are_refused_before_they_reach_the_model(model, make_core, token):
    """One such id inside a step would fail every request of the batch."""
    core = make_core(model)
    with pytest.raises(ValueError, match="prompt"):
        core.add("a", [5, token, 6], SamplingParams())
    with pytest.raises(ValueError, match="logit_bias"):
        core.add("a", [5, 6], SamplingParams(logit_bias={token: 1.0}))
    assert core.idle


def test_one_new_token(model, make_core):
    core = make_core(model)
    core.add("a", [5, 6, 7], SamplingParams(max_new_tokens=1, ignore_eos=True))
    (event,) = run(core)["a"]
    assert event.finish_reason == "length"


def wants_eos(after):
    """Sampling parameters under which the model answers EOS as soon as `min_tokens` allows."""
    return SamplingParams(max_new_tokens=20, min_tokens=after, logit_bias={EOS: 100.0})


@pytest.mark.parametrize("after", [0, 1, 5])
def test_end_of_sequence_stops_and_min_tokens_holds_it_back(model, make_core, after):
    core = make_core(model)
    core.add("a", [5, 6, 7], wants_eos(after))
    core.add("b", [5, 6, 7, 8], SamplingParams(max_new_tokens=12, ignore_eos=True, logit_bias={EOS: 100.0}))
    events = run(core)
    assert EOS not in tokens_of(events["a"])[:after]
    assert tokens_of(events["a"])[after:] == [EOS]
    assert events["a"][-1].finish_reason == "stop"
    assert tokens_of(events["b"]) == [EOS] * 12
    assert events["b"][-1].finish_reason == "length"


def test_every_end_of_sequence_id_stops(model, make_core):
    for eos in (3, 4):
        core = make_core(model, eos_ids=(3, 4))
        core.add("a", [5, 6], SamplingParams(max_new_tokens=5, logit_bias={eos: 100.0}))
        assert [(e.token, e.finish_reason) for e in run(core)["a"]] == [(eos, "stop")]


@pytest.mark.slow
@given(seed=st.integers(0, 1000), n=st.integers(1, 20), m=st.integers(1, 20), temperature=st.sampled_from([0, 1.0]))
@examples(20)
def test_a_shorter_answer_is_a_prefix_of_the_longer(model, make_core, seed, n, m, temperature):
    prompt = [random.Random(seed).randrange(2, VOCAB) for _ in range(10)]
    short, long = (
        answer(make_core(model), prompt, SamplingParams(max_new_tokens=k, temperature=temperature, seed=seed))
        for k in (n, n + m)
    )
    assert short == long[: len(short)] and (len(short) == n or short == long)


# ------------------------------------------------------------------------------------- sampling


@pytest.mark.slow
def test_a_seed_fixes_the_answer_and_seeds_differ(model, make_core):
    prompt = [5, 6, 7, 8]
    core = make_core(model, slots=8)
    for i in range(20):
        core.add(f"same{i}", prompt, SamplingParams(max_new_tokens=16, temperature=1.0, seed=11, ignore_eos=True))
        core.add(f"seed{i}", prompt, SamplingParams(max_new_tokens=16, temperature=1.0, seed=i, ignore_eos=True))
        core.add(f"none{i}", prompt, SamplingParams(max_new_tokens=16, temperature=1.0, ignore_eos=True))
    outs = {name: tuple(tokens_of(events)) for name, events in run(core).items()}
    assert len({outs[f"same{i}"] for i in range(20)}) == 1
    assert len({outs[f"seed{i}"] for i in range(20)}) >= 15
    assert len({outs[f"none{i}"] for i in range(20)}) >= 15
    assert outs["same0"] == outs["seed11"]


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logprobs_are_those_of_a_plain_forward(model, make_core, temperature):
    """Of the model's own distribution, whatever temperature, bias and penalties made of it."""
    prompt = list(range(10, 40))
    params = SamplingParams(
        max_new_tokens=12,
        temperature=temperature,
        seed=1,
        logprobs=5,
        ignore_eos=True,
        logit_bias={7: 3.0},
        repetition_penalty=1.3,
    )
    core = make_core(model)
    core.add("a", prompt, params)
    core.add("b", prompt, SamplingParams(max_new_tokens=2, logprobs=0))
    core.add("c", prompt, SamplingParams(max_new_tokens=2))
    events = run(core)
    tokens = prompt + tokens_of(events["a"])
    cache = KVCache(model.config, slots=1, max_seq_len=128, dtype=torch.float32, device=torch.device("cpu"))
    logits = model(Batch(torch.tensor([tokens]), torch.arange(len(tokens))[None], cache, length=128))[0]
    expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    for event, row in zip(events["a"], expected, strict=True):
        (token, logprob), *best = event.logprobs
        assert token == event.token and logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [p for _, p in best] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
        assert [t for t, _ in best] == row.topk(5).indices.tolist()
    assert all(len(e.logprobs) == 1 for e in events["b"]) and all(e.logprobs == () for e in events["c"])


@pytest.mark.slow
def test_prompt_logprobs_are_those_of_a_plain_forward(model, make_core):
    """Of every token behind the first, whatever chunks it came in and whatever a slot holds of it already."""
    rng = random.Random(0)
    core, plain = make_core(model, slots=3, prefill_chunk=32), SamplingParams(max_new_tokens=30, ignore_eos=True)
    shared = [rng.randrange(2, VOCAB) for _ in range(40)]
    prompts = {"a": shared + [5] * 60, "b": [*shared, 6], "c": [7]}
    core.add("before", prompts["a"], plain)
    run(core)
    core.add("beside", shared, plain)
    requests = {
        name: core.add(name, prompt, SamplingParams(max_new_tokens=2, prompt_logprobs=3))
        for name, prompt in prompts.items()
    }
    run(core)
    assert [requests[name].reused for name in "abc"] == [0, 0, 0]
    for name, prompt in prompts.items():
        check_prompt_logprobs(requests[name], plain_logprobs(model, prompt), best=3)
    after = core.add("after", prompts["a"], plain)
    assert tokens_of(run(core)["after"]) == answer(make_core(model), prompts["a"], plain)
    assert after.reused > 90 and after.prompt_logprobs == []


def plain_logprobs(forward, prompt):
    """[S, V], in one forward."""
    cache = KVCache(forward.config, slots=1, max_seq_len=128, dtype=torch.float32, device=torch.device("cpu"))
    batch = Batch(torch.tensor([prompt]), torch.arange(len(prompt))[None], cache, length=128)
    return forward(batch)[0].log_softmax(-1)


def check_prompt_logprobs(request, logprobs_SV, *, best):
    assert len(request.prompt_logprobs) == len(request.prompt) - 1
    for token, row_V, ((named, logprob), *others) in zip(
        request.prompt[1:], logprobs_SV, request.prompt_logprobs, strict=False
    ):
        assert named == token and logprob == pytest.approx(row_V[token].item(), abs=1e-4)
        assert [t for t, _ in others] == row_V.topk(best).indices.tolist()


# --------------------------------------------------------------------------------- chunks beside streams


class Noting:
    """A budget that keeps what it is told, and always allows `count` tokens."""

    def __init__(self, count):
        self.count, self.told = count, []

    def learn(self, **figures):
        self.told.append(tuple(figures.values()))

    def tokens(self, decodes):
        return self.count


def test_a_wait_counts_from_the_streams_last_token(model, make_core, monkeypatch):
    """Time between steps is the stream's too, but not that of a prompt that came after it."""
    clock = [0.0]
    monkeypatch.setattr("gpt_fast.engine.core.time.perf_counter", lambda: clock[0])
    core = make_core(model)
    budget = core.runner.budget = Noting(4)
    core.add("stream", [5] * 10, SamplingParams(max_new_tokens=4, ignore_eos=True))
    for now in (3.0, 5.0, 6.0):
        clock[0] = now
        core.step()
    core.add("prompt", list(range(10, 16)), SamplingParams(max_new_tokens=1))
    for now in (9.0, 19.0):
        clock[0] = now
        core.step()
    assert budget.told == [(10, 0, 0.0), (0, 1, 2.0), (0, 1, 1.0), (4, 1, 3.0), (2, 0, 0.0)]


def test_a_bursts_tokens_share_its_time(model, make_core):
    core = make_core(model)
    budget = core.runner.budget = Noting(4)
    rows = tuple(core.add(name, [5], SamplingParams()) for name in ("ends", "goes on"))
    sampled = {"ends": [SampledToken(7)], "goes on": [SampledToken(7)] * 4}
    core.runner.learn(StepPlan((), (), rows), sampled, 6.0)
    assert budget.told == [(0, 2, 1.5)]


def test_without_streams_a_prompt_takes_whole_chunks(model, make_core):
    core = make_core(model)
    core.runner.budget = Noting(1)
    core.add("a", [5] * 40, SamplingParams(max_new_tokens=1))
    for expected in (16, 32, 40):
        core.step()
        assert len(core.scheduler.slots[0].tokens) == expected


# ------------------------------------------------------------------------------------ the runner


@given(limit=st.integers(1, 10_000), smallest=st.integers(1, 300), data=st.data())
def test_buckets_cover_every_value_by_at_most_twice(limit, smallest, data):
    sizes = buckets(limit, smallest)
    value = data.draw(st.integers(1, limit))
    assert sizes == sorted(set(sizes)) and sizes[-1] == limit
    assert value <= bucket_of(sizes, value) <= max(2 * value, smallest)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("slots", [1, 3])
def test_nothing_compiles_after_warm_up(tiny_model, slots):
    """Every step a request can cause has the shapes and the path of one that warm_up made."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = tiny_model(n_layer=1, max_seq_len=256)
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # dynamo's guards are what is tested
    cache = KVCache(model.config, slots=slots, max_seq_len=256, dtype=torch.float32, device=torch.device("cpu"))
    runner = Runner(decode=compiled, prefill=compiled, cache=cache, eos_ids=[EOS], prefill_chunk=64)
    runner.warm_up()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    core, rng = EngineCore(runner), random.Random(0)
    for i in range(25):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 220))]
        scored = rng.choice([None, None, 2])
        params = SamplingParams(max_new_tokens=rng.randrange(1, 30), ignore_eos=True, prompt_logprobs=scored)
        core.add(str(i), prompt, params)
    run(core)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
def test_not_a_number_in_one_row_ends_that_request_alone(tiny_model, make_core):
    """A token whose embedding is NaN stands for an overflow. Not the neighbours, nor the slot's next user, notice."""
    model = tiny_model(n_layer=2)
    model.tok_embeddings.weight[50] = float("nan")
    requests = random_requests(random.Random(4), 6)
    requests = {name: ([t if t != 50 else 51 for t in p], params) for name, (p, params) in requests.items()}
    greedy = SamplingParams(max_new_tokens=10, logprobs=2)
    core = make_core(model, slots=3)
    for i, (name, request) in enumerate(requests.items()):
        core.add(name, *request)
        core.add(f"ill{i}", [5, 6, 7] * 20 + [50] * 10 * i + [50, 8], greedy if i % 2 else request[1])
    events = run(core)
    for i, (name, request) in enumerate(requests.items()):
        (end,) = events[f"ill{i}"]
        assert (end.token, end.finish_reason, end.logprobs) == (NO_TOKEN, "error", ())
        expected = answer(make_core(model), *request)
        assert tokens_of(events[name]) == expected[: len(tokens_of(events[name]))]
        assert 50 in expected or len(expected) == len(events[name])
    assert len(core.scheduler.free) == 3


def test_a_slot_that_held_not_a_number_serves_the_next_request(tiny_model, make_core):
    model = tiny_model(n_layer=2)
    model.tok_embeddings.weight[50] = float("nan")
    params = SamplingParams(max_new_tokens=10, ignore_eos=True, logit_bias={50: -100.0})
    core = make_core(model, slots=1)
    core.add("ill", [50] * 100, params)
    assert [e.finish_reason for e in run(core)["ill"]] == ["error"]
    assert answer(core, [5, 6, 7], params) == answer(make_core(model), [5, 6, 7], params)
