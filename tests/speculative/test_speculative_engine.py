"""Speculation in the engine: plain decode's tokens, whatever proposes, in any company, to the last position."""

import random

import pytest
import torch

from gpt_fast.config import SamplingParams
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.runner import Runner
from gpt_fast.measure.significance import chi_square
from gpt_fast.model.cache import KVCache
from gpt_fast.sampling import probabilities, sampling_tensors
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def runner_of(model, *, slots=4, max_seq_len=128, **options):
    cache = KVCache(model.config, slots=slots, max_seq_len=max_seq_len, dtype=torch.float32, device=CPU)
    return Runner(decode=model, prefill=model, cache=cache, eos_ids=(1,), prefill_chunk=16, **options)


def speculating(model, draft, k, *, slots=4, max_seq_len=128, draft_len=None, controller=None):
    """A core whose every step proposes k tokens: by `draft`, a model, or "ngram"."""
    if draft == "ngram":
        proposers = {"ngram": NGramProposer(CPU)}
    else:
        proposers = {"draft": DraftProposer(runner_of(draft, slots=slots, max_seq_len=draft_len or max_seq_len))}
    always = None if controller else Choice(next(iter(proposers)), k)
    speculator = Speculator(proposers, controller or Controller([k]), max_seq_len=max_seq_len, always=always)
    return EngineCore(runner_of(model, slots=slots, max_seq_len=max_seq_len, speculator=speculator))


def finish(core, requests):
    """Tokens and reason of each request, all added at once."""
    for key, (prompt, params) in requests.items():
        core.add(key, prompt, params)
    out = {key: ([], []) for key in requests}
    while not core.idle:
        for event in core.step():
            out[event.request_id][0].append(event.token)
            out[event.request_id][1].append((event.finish_reason, event.logprobs))
        core.scheduler.check_integrity()
    return out


def prompts(count, *, seed=0, longest=40, vocab=97):
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@pytest.fixture(scope="module")
def target(tiny_model):
    return tiny_model(seed=1)


@pytest.fixture(scope="module")
def drafts(tiny_model, target):
    """A bad draft of another architecture, the target itself, one near it, and prompt lookup."""
    near = tiny_model(seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in near.parameters():
        parameter.data.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return {"bad": tiny_model(seed=9, n_layer=1, dim=16, n_kv_head=4), "same": target, "near": near, "ngram": "ngram"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bad", "same", "near", "ngram"])
@pytest.mark.parametrize("k", range(1, 9))
def test_greedy_and_seeded_texts_are_plain_decodes(target, drafts, kind, k):
    """Ragged company, more requests than slots, mixed sampling; every text as it is alone and without speculation."""
    kinds = [
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.2, "seed": 4, "top_k": 5},
        {"repetition_penalty": 1.3},
    ]
    requests = {
        f"r{i}": (prompt, SamplingParams(max_new_tokens=3 + 7 * i % 40, ignore_eos=i % 2 == 0, **kinds[i % 4]))
        for i, prompt in enumerate(prompts(10, seed=k))
    }
    plain = finish(EngineCore(runner_of(target)), requests)
    core = speculating(target, drafts[kind], k)
    spoken = finish(core, requests)
    assert {key: out[0] for key, out in spoken.items()} == {key: out[0] for key, out in plain.items()}
    assert [out[1][-1][0] for out in spoken.values()] == [out[1][-1][0] for out in plain.values()]
    totals = core.speculator.totals
    assert totals.drafted > 0
    if kind == "same":
        assert totals.accepted == totals.drafted
    if kind == "bad":
        assert totals.accepted < 0.3 * totals.drafted


def test_a_sampled_draft_equal_to_its_target_is_always_accepted(target):
    core = speculating(target, target, 4)
    params = [SamplingParams(max_new_tokens=30, temperature=1.0, seed=i, ignore_eos=True) for i in range(4)]
    finish(core, {f"r{i}": pair for i, pair in enumerate(zip(prompts(4), params, strict=True))})
    totals = core.speculator.totals
    assert totals.drafted > 60 and totals.accepted == totals.drafted


def test_nothing_is_kept_of_requests_that_ended(target):
    """Ended by a limit or aborted, with some tokens or with none."""
    core = speculating(target, "ngram", 4)
    for i, prompt in enumerate(prompts(6)):
        core.add(f"r{i}", prompt, SamplingParams(max_new_tokens=20, ignore_eos=True))
    for _ in range(6):
        core.step()
    speculator = core.speculator
    assert len(speculator.acceptances) == len(speculator.proposers["ngram"].indices) == 4
    core.abort("r0")
    assert len(speculator.acceptances) == len(speculator.proposers["ngram"].indices) == 3
    while not core.idle:
        core.step()
    assert not speculator.acceptances and not speculator.proposers["ngram"].indices


@pytest.mark.parametrize("kind", ["bad", "same", "ngram"])
def test_up_to_the_last_position_of_the_context(target, drafts, kind):
    for length in (1, 20, 27, 30, 31):
        prompt = prompts(1, seed=length, longest=2)[0] * length
        requests = {"r": (prompt, SamplingParams(max_new_tokens=100, ignore_eos=True))}
        plain = finish(EngineCore(runner_of(target, max_seq_len=32)), requests)
        spoken = finish(speculating(target, drafts[kind], 6, max_seq_len=32), requests)
        assert spoken["r"][0] == plain["r"][0] and length + len(plain["r"][0]) == 32


def test_a_draft_with_a_shorter_context_stops_proposing_there(target, tiny_model):
    draft = tiny_model(seed=1, max_seq_len=48)
    requests = {"r": (prompts(1, longest=30)[0], SamplingParams(max_new_tokens=90, ignore_eos=True))}
    core = speculating(target, draft, 4, draft_len=48)
    assert finish(core, requests)["r"][0] == finish(EngineCore(runner_of(target)), requests)["r"][0]
    assert core.speculator.totals.accepted == core.speculator.totals.drafted > 8


def test_an_end_inside_an_accepted_block_drops_what_follows(target):
    """The end token is one the plain text has in its middle."""
    prompt = prompts(1, seed=5)[0]
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    text = finish(EngineCore(runner_of(target)), {"r": (prompt, params)})["r"][0]
    end = next(t for i, t in enumerate(text) if i > 6 and t not in text[:i])
    for k in (3, 8):
        core = speculating(target, target, k)
        core.scheduler.eos_ids = frozenset({end})
        out = finish(core, {"r": (prompt, SamplingParams(max_new_tokens=30))})["r"]
        assert out[0] == text[: text.index(end) + 1] and out[1][-1][0] == "stop"
        assert core.idle and len(core.scheduler.free) == 4


def test_a_slot_reused_after_speculation_holds_what_it_says(target, drafts):
    """A conversation: each turn's prompt is the last turn and a few tokens; its beginning is read from the cache."""
    for kind in ("near", "ngram"):
        core, history = speculating(target, drafts[kind], 4, slots=2), prompts(1, seed=2, longest=30)[0]
        for turn in range(4):
            history = [*history, 7 + turn, 30, 41]
            params = SamplingParams(max_new_tokens=15, ignore_eos=True)
            out = finish(core, {f"t{turn}": (history, params)})[f"t{turn}"][0]
            assert out == finish(EngineCore(runner_of(target, slots=2)), {"r": (history, params)})["r"][0]
            history = history + out


@pytest.mark.slow
def test_copied_prefixes_and_aborts_leave_no_trace(target, drafts):
    rng = random.Random(0)
    shared = [rng.randrange(2, 97) for _ in range(24)]
    plain_core = EngineCore(runner_of(target))
    for kind in ("same", "near", "ngram"):
        core, running, out, asked = speculating(target, drafts[kind], 3), set(), {}, {}
        for step in range(150):
            if rng.random() < 0.3 and step < 110:
                key = f"{kind}-{step}"
                asked[key] = (
                    shared[: rng.randrange(1, 25)] + prompts(1, seed=step)[0],
                    SamplingParams(max_new_tokens=rng.randrange(1, 30), ignore_eos=True),
                )
                core.add(key, *asked[key])
                out[key] = []
                running.add(key)
            if running and rng.random() < 0.05:
                gone = rng.choice(sorted(running))
                core.abort(gone)
                running.discard(gone)
                del asked[gone]
            for event in core.step():
                out[event.request_id].append(event.token)
                if event.finish_reason:
                    running.discard(event.request_id)
            core.scheduler.check_integrity()
        while not core.idle:
            for event in core.step():
                out[event.request_id].append(event.token)
        for key, request in asked.items():
            assert out[key] == finish(plain_core, {key: request})[key][0]
        if kind == "same":
            assert core.speculator.totals.accepted == core.speculator.totals.drafted


def test_logprobs_of_accepted_tokens_are_plain_decodes(target, drafts):
    requests = {"r": (prompts(1)[0], SamplingParams(max_new_tokens=20, ignore_eos=True, logprobs=3))}
    plain = finish(EngineCore(runner_of(target)), requests)["r"][1]
    spoken = finish(speculating(target, drafts["same"], 4), requests)["r"][1]
    for (_, a), (_, b) in zip(plain, spoken, strict=True):
        assert [t for t, _ in a] == [t for t, _ in b]
        assert [v for _, v in a] == pytest.approx([v for _, v in b], abs=1e-4)


def test_rows_whose_logits_are_edited_do_not_speculate(target):
    core = speculating(target, target, 4)
    request = core.add("r", [5, 6, 7], SamplingParams(max_new_tokens=20, min_tokens=10, ignore_eos=True))
    while not core.idle:
        core.step()
        assert request.drafted == 0 or len(request.output) > 10
    assert request.accepted == request.drafted > 0


def test_a_request_id_used_again_starts_with_a_new_index(target):
    core = speculating(target, "ngram", 4)
    for seed in range(3):
        params = SamplingParams(max_new_tokens=25, ignore_eos=True)
        request = {"row-0": (prompts(1, seed=seed)[0], params)}
        assert finish(core, request)["row-0"][0] == finish(EngineCore(runner_of(target)), request)["row-0"][0]


def test_the_draft_cache_holds_what_its_model_computes(target, tiny_model):
    """After ragged rounds the draft's keys are those of feeding it the text at once."""
    draft = tiny_model(seed=2)
    core = speculating(target, draft, 4)
    request = core.add("r", prompts(1, seed=3)[0], SamplingParams(max_new_tokens=60, ignore_eos=True))
    while len(request.output) < 50:
        core.step()
    proposer = core.speculator.proposers["draft"]
    count = min(proposer.held[request.slot].count, request.length - 1)
    assert count >= request.length - 2
    fresh = runner_of(draft)
    fresh.forward(draft, [request.tokens(0, count)], [0], [0], size=128)
    ours = proposer.runner.cache.k_LNHTD[:, request.slot, :, :count]
    assert torch.allclose(ours, fresh.cache.k_LNHTD[:, 0, :, :count], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3])
def test_unseeded_sampling_has_the_targets_distribution(tiny_model, k):
    """The whole engine, drafts that are sampled and refused: first token, and second given first."""
    model, draft = (tiny_model(seed=s, vocab_size=8, n_layer=1, dim=16) for s in (3, 4))
    params, prompt, count = SamplingParams(max_new_tokens=3, temperature=1.0, ignore_eos=True), [2, 5, 3], 2500
    random.seed(k)  # unseeded requests draw their seeds here
    core = speculating(model, draft, k, slots=64)
    out = finish(core, {f"r{i}": (prompt, params) for i in range(count)})
    pairs = torch.tensor([tokens[:3] for tokens, _ in out.values()])
    with torch.inference_mode():
        runner = runner_of(model, slots=1)
        one = sampling_tensors([params], CPU)
        first_V = probabilities(runner.forward(model, [prompt], [0], [0], size=3), one)[0]
        rests = [runner.forward(model, [[*prompt, a]], [0], [0], size=4) for a in range(8)]
        expected_VV = count * first_V[:, None] * probabilities(torch.cat(rests), one)
    observed = torch.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    assert chi_square(observed, expected_VV).p_value > 1e-6
    totals = core.speculator.totals
    assert 0.05 < totals.accepted / totals.drafted < 0.95  # both branches were walked


@pytest.mark.slow
def test_the_controller_in_the_engine_keeps_texts_and_learns_costs(target, drafts):
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    requests = {f"r{i}": (prompt, params) for i, prompt in enumerate(prompts(6, seed=8))}
    plain = finish(EngineCore(runner_of(target)), requests)
    controller = Controller([1, 2, 4])
    core = speculating(target, drafts["same"], 4, controller=controller)
    core.runner.warm_up()
    assert {(c.arm, c.k) for c in controller.costs.seconds} == {("plain", 0), ("draft", 1), ("draft", 2), ("draft", 4)}
    assert core.speculator.totals.drafted == 0
    spoken = finish(core, requests)
    assert {key: out[0] for key, out in spoken.items()} == {key: out[0] for key, out in plain.items()}


@pytest.mark.parametrize("owner", ["", "another"])
def test_a_slot_that_overflowed_serves_the_next_sequence(target, owner):
    """Target and draft end in NaN in one slot: the next request there has its text, and a draft that is right."""
    core = speculating(target, target, 4, slots=1)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    prompt = prompts(1, seed=3)[0]
    first = core.add("first", prompt, params)
    while len(first.output) < 20:
        core.step()
    for cache in (core.runner.cache, core.speculator.proposers["draft"].runner.cache):
        for buffer in cache.buffers():
            buffer[:, 0, :, len(prompt) : first.computed] = float("nan")
    while not core.idle:
        assert core.step()[-1].finish_reason in (None, "error")
    before = core.speculator.totals.accepted
    core.add("second", prompt, params, owner=owner)
    events = []
    while not core.idle:
        events += core.step()
    plain = finish(EngineCore(runner_of(target)), {"r": (prompt, params)})["r"][0]
    assert [e.token for e in events] == plain
    assert core.speculator.totals.accepted - before > 25
