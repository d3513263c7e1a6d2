"""Prompts and streams in one forward, on the fused decoder: fewer forwards, the same tokens."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import SamplingParams
from gpt_fast.engine.chunk_budget import JoinedBudget
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.overlap_runner import OverlapRunner
from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.ops.cpu import CpuDecoder, build
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator
from support.company import EOS, VOCAB, answer, check_company, random_requests, run, tokens_of
from support.examples import examples

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason="no compiler, or a processor without AVX2"),
    pytest.mark.usefixtures("one_torch_thread"),
]
CPU = torch.device("cpu")
FORMATS = {"int8": torch.bfloat16, "int4": torch.bfloat16, "bfloat16": torch.float32, "int8_groups": torch.int8}
GREEDY = SamplingParams(max_new_tokens=60, ignore_eos=True)


class Counting:
    """A fused decoder, and how many forwards it began."""

    def __init__(self, fused):
        self.fused, self.begun = fused, 0

    def start(self, batch, **options):
        self.begun += 1
        return self.fused.start(batch, **options)

    def __call__(self, batch):
        return self.start(batch).result()


class Watching(OverlapRunner):
    """Notes of each step its plan, and how many forwards it began while it ran."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def run(self, plan):
        before = self.decode.begun
        sampled = super().run(plan)
        self.seen.append((plan, self.decode.begun - before))
        return sampled

    @property
    def mixed(self):
        return [count for plan, count in self.seen if plan.chunks and plan.decodes]


class AnySize(JoinedBudget):
    """Whatever time says: a random number of tokens, so that chunks end anywhere."""

    def __init__(self, rng, most):
        super().__init__([most])
        self.rng = rng

    def tokens(self, decodes):
        return self.rng.randint(0, self.sizes[-1])


class Always(JoinedBudget):
    def __init__(self, count):
        super().__init__([32])
        self.count = count

    def tokens(self, decodes):
        return self.count


@pytest.fixture(scope="module")
def fused(tiny_model):
    """fused(weights): a decoder of the one tiny model, two threads."""
    model, made = tiny_model(n_layer=2, head_dim=16), {}

    def get(weights):
        if weights not in made:
            made[weights] = CpuDecoder(model, weights=weights, threads=2)
        return made[weights]

    return get


def core_of(
    decoder,
    *,
    slots=4,
    dtype=torch.float32,
    max_seq_len=120,
    reuse_prefix=True,
    budget=None,
    speculator=None,
    eos_ids=(EOS, 7, 8),
):
    counting = Counting(decoder)
    cache = KVCache(decoder.config, slots=slots, max_seq_len=max_seq_len, dtype=dtype, device=CPU)
    runner = Watching(
        decode=counting,
        prefill=counting,
        cache=cache,
        eos_ids=eos_ids,
        prefill_chunk=32,
        speculator=speculator,
        budget=budget or JoinedBudget([32]),
    )
    return EngineCore(runner, reuse_prefix=reuse_prefix)


def prompt_of(rng, length):
    return [rng.randrange(9, VOCAB) for _ in range(length)]


# ------------------------------------------------------------------------------------------ company


@pytest.mark.slow
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 5),
    weights=st.sampled_from(list(FORMATS)),
    reuse=st.booleans(),
    most=st.sampled_from([1, 3, 32]),
)
@examples(60)
def test_tokens_do_not_depend_on_company(fused, seed, slots, weights, reuse, most):
    """Greedy and seeded requests come, go and are aborted between steps; chunks of all sizes join their decodes."""
    rng, decoder, dtype = random.Random(seed), fused(weights), FORMATS[weights]
    core = core_of(decoder, slots=slots, dtype=dtype, reuse_prefix=reuse, budget=AnySize(rng, most))
    requests = random_requests(rng, 8)
    for name, (prompt, _) in requests.items():
        if rng.random() < 0.4:  # rows of which a step may begin before its tokens are known
            requests[name] = prompt, SamplingParams(max_new_tokens=rng.randrange(1, 40), ignore_eos=rng.random() < 0.3)
    check_company(requests, core, lambda: core_of(decoder, slots=1, dtype=dtype), rng)
    assert set(core.runner.mixed) <= {1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ngram", "draft", "controlled"])
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 4), k=st.integers(1, 5))
@examples(15)
def test_proposers_change_no_token(fused, kind, seed, slots, k):
    """They propose between mixed steps, which they do not see, and catch up."""
    rng, decoder = random.Random(seed), fused("int8")
    speculator = speculator_of(kind, decoder, slots, k)
    core = core_of(decoder, slots=slots, budget=AnySize(rng, 9), speculator=speculator)
    check_company(random_requests(rng, 8), core, lambda: core_of(decoder, slots=1), rng)
    assert set(core.runner.mixed) <= {1}


def speculator_of(kind, decoder, slots, k):
    """Lookups or the model as its own draft, k tokens in every step, or as the controller sees fit."""
    if kind == "draft":
        proposer = DraftProposer(core_of(decoder, slots=slots).runner)
    else:
        proposer = NGramProposer(CPU)
    if kind == "controlled":
        return Speculator({kind: proposer}, Controller([1, 2, k + 2]), max_seq_len=120)
    return Speculator({kind: proposer}, Controller([k]), max_seq_len=120, always=Choice(kind, k))


def test_a_draft_still_stands_after_steps_that_it_did_not_see(fused):
    """A stream's draft, the model itself, falls behind while a prompt joins, and is right again afterwards."""
    decoder, rng = fused("int8"), random.Random(0)
    speculator = speculator_of("draft", decoder, 2, 3)
    core = core_of(decoder, slots=2, budget=AnySize(rng, 4), speculator=speculator, eos_ids=())
    core.add("stream", prompt_of(rng, 5), SamplingParams(max_new_tokens=110, ignore_eos=True))
    run(core, until=("stream", 20))
    core.add("prompt", prompt_of(rng, 80), SamplingParams(max_new_tokens=1, ignore_eos=True))
    run(core, until=("prompt", 1))
    drafted = speculator.totals.drafted
    run(core)
    assert len(core.runner.mixed) > 15
    assert speculator.totals.drafted > drafted and speculator.totals.accepted == speculator.totals.drafted


def test_who_looks_at_the_logits_changes_no_greedy_token(fused):
    """Alone a greedy stream's steps have no logits; with logprobs, edits that change nothing, or company they have."""
    decoder, rng = fused("int8"), random.Random(3)
    prompt, asked = prompt_of(rng, 12), []
    start = decoder.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "start", lambda batch, **o: asked.append(o["best_only"]) or start(batch, **o))
        plain = answer(core_of(decoder), prompt, GREEDY)
        assert all(asked)
        asked.clear()
        assert answer(core_of(decoder), prompt, replace(GREEDY, logprobs=2)) == plain
        assert answer(core_of(decoder), prompt, replace(GREEDY, logit_bias={5: 0.0})) == plain
        assert not any(asked)
        core = core_of(decoder)
        core.add("sampled", prompt_of(rng, 9), SamplingParams(max_new_tokens=20, temperature=1.0, ignore_eos=True))
        assert answer(core, prompt, GREEDY) == plain
        assert any(asked) and not all(asked)


# ------------------------------------------------------------------------------------------ forwards


def test_a_step_of_prompts_and_streams_is_one_forward(fused):
    decoder, rng = fused("int4"), random.Random(1)
    core = core_of(decoder, dtype=torch.bfloat16)
    for i in range(2):
        core.add(f"stream{i}", prompt_of(rng, 6), GREEDY)
    run(core, until=("stream1", 5))
    core.runner.seen.clear()
    for i in range(2):
        core.add(f"prompt{i}", prompt_of(rng, 50), SamplingParams(max_new_tokens=3, ignore_eos=True))
    run(core)
    assert len(core.runner.mixed) > 1 and set(core.runner.mixed) == {1}
    assert {len(plan.decodes) for plan, _ in core.runner.seen if plan.chunks} >= {2}


@pytest.mark.parametrize("weights", FORMATS)
def test_scored_prompts_have_the_plain_forwards_logprobs_and_change_no_token(fused, weights):
    """They run apart from streams, whose next step may have begun by then."""
    decoder, rng, dtype = fused(weights), random.Random(5), FORMATS[weights]
    core, scored = core_of(decoder, dtype=dtype), SamplingParams(max_new_tokens=4, ignore_eos=True, prompt_logprobs=2)
    streams = {f"stream{i}": prompt_of(rng, 6) for i in range(2)}
    for name, prompt in streams.items():
        core.add(name, prompt, GREEDY)
    events = run(core, until=("stream1", 5))
    requests = [core.add(f"scored{i}", streams["stream0"] + prompt_of(rng, 50), scored) for i in range(3)]
    for name, more in run(core).items():
        events[name] = events.get(name, []) + more
    for name, prompt in streams.items():
        assert tokens_of(events[name]) == answer(core_of(decoder, dtype=dtype), prompt, GREEDY)
    cache = KVCache(decoder.config, slots=1, max_seq_len=120, dtype=dtype, device=CPU)
    for request in requests:
        prompt_1S, positions_1S = torch.tensor([request.prompt]), torch.arange(len(request.prompt))[None]
        logprobs_SV = decoder(Batch(prompt_1S, positions_1S, cache, length=120))[0].log_softmax(-1)
        expected = [logprobs_SV[i, token].item() for i, token in enumerate(request.prompt[1:])]
        assert [row[0][1] for row in request.prompt_logprobs] == expected  # the same bits
        assert tokens_of(events[request.id])[0] == logprobs_SV[-1].argmax()


def test_prompts_alone_are_one_forward_too(fused):
    core, rng = core_of(fused("int8")), random.Random(2)
    for i in range(4):
        core.add(f"p{i}", prompt_of(rng, 8), SamplingParams(max_new_tokens=1, ignore_eos=True))
    run(core)
    assert [(len(plan.chunks), count) for plan, count in core.runner.seen] == [(4, 1)]


def test_a_step_that_has_begun_brings_its_tokens_before_a_prompt_joins(fused):
    """Nothing is computed twice, and nothing begins that the next step cannot use."""
    decoder, rng = fused("int8"), random.Random(3)
    core = core_of(decoder, budget=Always(5))
    core.add("stream", prompt_of(rng, 6), GREEDY)
    run(core, until=("stream", 5))
    assert core.runner.begun
    core.add("prompt", prompt_of(rng, 30), SamplingParams(max_new_tokens=5, ignore_eos=True))
    begun = core.runner.decode.begun
    core.step()
    plan, _ = core.runner.seen[-1]
    assert not plan.chunks and plan.more and core.runner.decode.begun == begun and core.runner.begun is None
    for _ in range(6):  # 30 tokens
        assert core.runner.begun is None
        core.step()
        assert core.runner.seen[-1][1] == 1 and core.runner.seen[-1][0].chunks
    assert core.runner.begun and len(core.runner.begun.rows) == 2


@pytest.mark.slow
def test_an_abort_between_steps_frees_the_slot_for_a_prompt_that_joins_the_rest(fused):
    """What had begun for the aborted request writes to a slot that is another's by then."""
    decoder, rng = fused("int8"), random.Random(4)
    prompts = {name: prompt_of(rng, 10) for name in ("stays", "goes")}
    late = prompts["goes"] + prompt_of(rng, 40)
    for steps in range(2, 12):
        core = core_of(decoder, slots=2, budget=AnySize(rng, 6))
        for name, prompt in prompts.items():
            core.add(name, prompt, GREEDY)
        out = {}
        for _ in range(steps):
            for event in core.step():
                out.setdefault(event.request_id, []).append(event.token)
        assert core.abort("goes")
        core.add("late", late, GREEDY)
        for name, events in run(core).items():
            out.setdefault(name, []).extend(tokens_of(events))
        assert out["stays"] == answer(core_of(decoder, slots=1), prompts["stays"], GREEDY)
        assert out["late"] == answer(core_of(decoder, slots=1), late, GREEDY)


def test_prompts_that_end_in_the_step_others_join(fused):
    """Chunks that are last and chunks that are not, before and behind each other, beside streams."""
    decoder, rng = fused("int8"), random.Random(5)
    core = core_of(decoder, slots=5, budget=Always(24))
    params = [SamplingParams(max_new_tokens=8, temperature=t, seed=9, ignore_eos=True) for t in (0.0, 1.0)]
    prompts = [prompt_of(rng, length) for length in (5, 40, 3, 33, 7)]
    core.add("0", prompts[0], params[0])
    core.step()
    for i, prompt in enumerate(prompts[1:], 1):
        core.add(str(i), prompt, params[i % 2])
    events = run(core)
    lasts = [[chunk.last for chunk in plan.chunks] for plan, _ in core.runner.seen if plan.decodes and plan.chunks]
    assert any(len(set(ends)) == 2 for ends in lasts)
    for i, prompt in enumerate(prompts):
        expected = answer(core_of(decoder, slots=1), prompt, params[i % 2])
        assert tokens_of(events[str(i)]) == expected[-len(events[str(i)]) :]


def test_not_a_number_in_a_mixed_step_ends_that_request_alone(tiny_model):
    model = tiny_model(n_layer=2, head_dim=16)
    model.tok_embeddings.weight[50] = float("nan")
    decoder, rng = CpuDecoder(model, weights="int8", threads=2), random.Random(6)
    core = core_of(decoder, slots=2, budget=AnySize(rng, 7), eos_ids=())
    stream = SamplingParams(max_new_tokens=60, ignore_eos=True, logit_bias={50: -100.0})
    core.add("stream", [5, 6], stream)
    core.step()
    for i in range(3):
        core.add(f"ill{i}", [9] * 20 + [50] + [9] * 3 * i, GREEDY)
    events = run(core)
    assert [events[f"ill{i}"][-1].finish_reason for i in range(3)] == ["error"] * 3
    expected = answer(core_of(decoder, slots=1, eos_ids=()), [5, 6], stream)
    assert tokens_of(events["stream"]) == expected[-len(events["stream"]) :]
