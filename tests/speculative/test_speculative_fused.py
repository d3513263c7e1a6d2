"""Speculation on the fused CPU decoder: proposals chained without the host looking, acceptance from best tokens."""

import random

import pytest
import torch

from gpt_fast.config import SamplingParams
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.overlap_runner import OverlapRunner
from gpt_fast.engine.runner import Runner
from gpt_fast.model.cache import KVCache
from gpt_fast.ops.cpu import CpuDecoder
from gpt_fast.request import NO_TOKEN
from gpt_fast.sampling import best_token
from gpt_fast.speculative.accept import accept
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.greedy_chain import GreedyChain
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator
from gpt_fast.speculative.verify import Draws, Proposal
from support.examples import rest_slow

CPU = torch.device("cpu")


def cache_of(model, slots, max_seq_len):
    return KVCache(model.config, slots=slots, max_seq_len=max_seq_len, dtype=torch.float32, device=CPU)


def fused_runner(model, pool=None, *, weights="int8", slots=4, max_seq_len=96, **options):
    fused = CpuDecoder(model, weights=weights, threads=2, pool=pool)
    return OverlapRunner(
        decode=fused,
        prefill=fused,
        cache=cache_of(model, slots, max_seq_len),
        eos_ids=(1,),
        prefill_chunk=16,
        **options,
    )


def speculating(target, draft, k, *, max_seq_len=96, controller=None, slots=4):
    """A core that proposes k tokens a step by the draft model, chained; None: by prompt lookup."""
    core = EngineCore(fused_runner(target, max_seq_len=max_seq_len, slots=slots))
    proposers = {"ngram": NGramProposer(CPU)}
    if draft is not None:
        own = fused_runner(draft, core.runner.decode.pool, weights="int4", max_seq_len=max_seq_len, slots=slots)
        proposers = {"draft": DraftProposer(own, startable=own.decode)}
    always = None if controller else Choice(next(iter(proposers)), k)
    core.runner.speculator = Speculator(
        proposers, controller or Controller([k]), max_seq_len=max_seq_len, always=always
    )
    return core


def answers(core, requests):
    for key, (prompt, params) in requests.items():
        core.add(key, prompt, params)
    out = {key: [] for key in requests}
    while not core.idle:
        for event in core.step():
            out[event.request_id].append(event.token)
        core.scheduler.check_integrity()
    return out


def random_requests(seed, count, *, kinds=({},), longest=30):
    rng = random.Random(seed)
    return {
        f"r{i}": (
            [rng.randrange(2, 97) for _ in range(rng.randrange(1, longest))],
            SamplingParams(max_new_tokens=2 + 7 * i % 40, ignore_eos=i % 2 == 0, **kinds[i % len(kinds)]),
        )
        for i in range(count)
    }


@pytest.fixture(scope="module")
def target(tiny_model):
    return tiny_model(n_layer=2, head_dim=16)


@pytest.fixture(scope="module")
def drafts(tiny_model, target):
    """The target itself, one that is often wrong, and prompt lookup."""
    near = tiny_model(n_layer=2, head_dim=16)
    generator = torch.Generator().manual_seed(0)
    for parameter in near.parameters():
        parameter.data.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return {"same": target, "near": near, "ngram": None}


# ------------------------------------------------------------------------------------------ chained


@pytest.mark.parametrize("counts", [[1], [5], [3, 0, 5, 1], [2, 2]])
def test_a_chain_says_what_step_after_step_says(target, counts):
    rng, runner = random.Random(sum(counts)), fused_runner(target)
    slots = rng.sample(range(4), len(counts))
    texts = [[rng.randrange(2, 97) for _ in range(rng.randrange(5, 20))] for _ in counts]
    starts = [len(text) - 1 - i % 2 for i, text in enumerate(texts)]  # one or two tokens are left to feed
    expected = []
    for text, slot, start, count in zip(texts, slots, starts, counts, strict=True):
        runner.forward(runner.prefill, [text[:start]], [0], [slot], size=len(text))
        said, fed, at = [], text[start:], start
        for _ in range(count):
            said.append(runner.forward(runner.decode, [fed], [at], [slot], size=2).argmax(-1).item())
            fed, at = said[-1:], at + len(fed)
        expected.append(said)
    tokens = [text[start:] for text, start in zip(texts, starts, strict=True)]
    chain = GreedyChain(runner.decode, runner.cache, tokens=tokens, starts=starts, slots=slots, counts=counts)
    assert [row[:n] for row, n in zip(chain.tokens().tolist(), counts, strict=True)] == expected


class Doubting(DraftProposer):
    """Asks step by step for what it has got from a chain, and its cache for what a fresh one would hold."""

    def __init__(self, runner, fresh):
        super().__init__(runner, startable=runner.decode)
        self.fresh, self.blocks = fresh, 0

    def propose(self, requests, counts):
        chained = super().propose(requests, counts)
        for s in (s for s, count in zip(requests, self.counts, strict=True) if count):
            self.fresh.forward(self.fresh.prefill, [s.tokens(0, s.length)], [0], [0], size=s.length)
            ours, fresh = (r.cache.k_LNHTD[:, at, :, : s.length] for r, at in ((self.runner, s.slot), (self.fresh, 0)))
            assert torch.equal(ours, fresh)
        slow = self._decode(requests, self.counts, chained.caught_up)
        for fast_K, slow_K, count in zip(chained.draft_BK, slow.draft_BK, self.counts, strict=True):
            assert fast_K[:count].tolist() == slow_K[:count].tolist()
            self.blocks += count > 0
        return chained


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_chained_proposals_are_those_of_a_draft_that_is_asked_step_by_step(target, drafts, k):
    """Ragged rows that come and go; the draft's cache holds what its model computes."""
    core = speculating(target, drafts["near"], k)
    runner = core.runner.speculator.proposers["draft"].runner
    doubting = Doubting(runner, fused_runner(drafts["near"], weights="int4"))
    core.runner.speculator.proposers = {"draft": doubting}
    answers(core, random_requests(k, 9))
    totals = core.runner.speculator.totals
    assert 0 < totals.accepted < totals.drafted and doubting.blocks > 30


# ----------------------------------------------------------------------------------------- acceptance


@pytest.mark.parametrize("seed", range(5))
def test_acceptance_from_best_tokens_is_that_from_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    logits_BSV = torch.randint(0, 3, (6, 5, 8), generator=generator).float()  # many ties
    logits_BSV[4, 2] = float("nan")
    draft_BK = logits_BSV[:, :4].argmax(-1)
    draft_BK[torch.rand(6, 4, generator=generator) < 0.2] += 1
    counts = [4, 4, 2, 0, 4, 3]
    proposal, draws = Proposal(draft_BK, counts), Draws(torch.arange(6), torch.arange(6))
    flat_NV = logits_BSV.view(30, 8)
    best_N = torch.where(flat_NV.isfinite().all(-1), best_token(flat_NV), NO_TOKEN)
    slow = accept(logits_BSV, None, proposal, draws)
    fast = accept(torch.empty(0), None, proposal, draws, best_BS=best_N.view(6, 5))
    assert slow.accepted_B.tolist() == fast.accepted_B.tolist()
    assert slow.next_B.tolist() == fast.next_B.tolist()


@pytest.mark.parametrize("kind", ["same", "near", "ngram"])
@pytest.mark.parametrize("k", rest_slow([4, 1, 8]))
def test_texts_are_plain_decodes(target, drafts, kind, k):
    """Greedy, seeded and edited rows together and greedy ones alone, more requests than slots."""
    for kinds in (({},), ({}, {"temperature": 0.8, "seed": 3}, {"repetition_penalty": 1.3})):
        requests = random_requests(k, 8, kinds=kinds)
        plain = answers(EngineCore(fused_runner(target)), requests)
        assert answers(speculating(target, drafts[kind], k), requests) == plain


@pytest.mark.parametrize("kind", ["same", "near", "ngram"])
def test_up_to_the_last_position_of_the_context(target, drafts, kind):
    for length in (1, 20, 27, 30, 31):
        requests = {"r": ([5, 9] * length, SamplingParams(max_new_tokens=100, ignore_eos=True))}
        requests["r"][0][length:] = []
        plain = answers(EngineCore(fused_runner(target, max_seq_len=32)), requests)
        spoken = answers(speculating(target, drafts[kind], 6, max_seq_len=32), requests)
        assert spoken == plain and length + len(plain["r"]) == 32


def test_an_end_inside_an_accepted_block_drops_what_follows(target, drafts):
    prompt, params = [5, 6, 7], SamplingParams(max_new_tokens=30, ignore_eos=True)
    text = answers(EngineCore(fused_runner(target)), {"r": (prompt, params)})["r"]
    end = next((t for i, t in enumerate(text) if i > 3 and t not in text[:i]), text[-1])
    for kind in ("same", "near", "ngram"):
        core = speculating(target, drafts[kind], 8)
        core.scheduler.eos_ids = frozenset({end})
        out = answers(core, {"r": (prompt, SamplingParams(max_new_tokens=30))})["r"]
        assert out == text[: text.index(end) + 1] and core.idle


@pytest.mark.parametrize("kind", ["same", "near", "ngram"])
def test_the_controller_keeps_texts(target, drafts, kind):
    """Blocks, plain steps and steps begun ahead take turns."""
    requests = random_requests(3, 12)
    plain = answers(EngineCore(fused_runner(target)), requests)
    core = speculating(target, drafts[kind], 4, controller=Controller([1, 2, 4]))
    core.runner.warm_up()
    assert answers(core, requests) == plain


def test_runners_beside_each_other_share_a_pool(target, drafts):
    core = speculating(target, drafts["near"], 2)
    proposer = core.runner.speculator.proposers["draft"]
    assert proposer.runner.decode.pool is core.runner.decode.pool and isinstance(proposer.runner, Runner)
