"""No host synchronization inside a step: nothing a step computes is looked at before its tokens are read.

Without a GPU, tensors without data stand in for CUDA's: looking at one is an error. With one, CUDA itself tells.
"""

import warnings

import pytest
import torch

from gpt_fast import sampling
from gpt_fast.config import SamplingParams
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.runner import Runner
from gpt_fast.model.cache import KVCache
from gpt_fast.request import Request
from gpt_fast.sampling import best_token, probabilities, sample, sampling_tensors, uniform
from gpt_fast.speculative.accept import accept
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator
from gpt_fast.speculative.verify import Proposal, draws_of, is_matched, on_device

V, K = 5000, 3
KINDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "seeded": SamplingParams(temperature=0.7, seed=1),
    "top_k": SamplingParams(temperature=1.0, top_k=50),
    "top_p": SamplingParams(temperature=1.0, top_p=0.9),
    "top_k top_p": SamplingParams(temperature=1.0, top_k=300, top_p=0.9),
    "min_p": SamplingParams(temperature=1.0, min_p=0.1),
}
BATCHES = [*([p] for p in KINDS.values()), list(KINDS.values())]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rows(params):
    return [Request(str(i), [1, 2, 3], p, 7, output=[4], slot=i, computed=3) for i, p in enumerate(params)]


class Drafter:
    """A draft model whose logits are given."""

    def __init__(self, logits_BV, cache):
        self.logits_BV, self.cache, self.decode = logits_BV, cache, None

    def forward(self, forward, tokens, starts, slots, *, size, fed_BK=None):
        return self.logits_BV + (0 if fed_BK is None else fed_BK[:, :1])


def whole_step(params, device):
    """Everything between a draft's logits and the tokens' read: propose, verify, judge."""
    requests, B = rows(params), len(params)
    device = torch.device(device)
    cache = type("Cache", (), {"k_LNHTD": torch.zeros(1, device=device), "max_seq_len": 64})
    proposer = DraftProposer(Drafter(torch.zeros(B, V, device=device), cache))
    proposal = proposer._decode(requests, [K] * B, 0)
    tensors = sampling_tensors(params, device)
    draws = draws_of(requests, device)
    looked_up = Proposal(proposal.draft_BK, [K] * B)
    return [accept(torch.zeros(B, K + 1, V, device=device), tensors, each, draws) for each in (proposal, looked_up)]


def plain_step(params, device):
    device = torch.device(device)
    tensors = sampling_tensors(params, device)
    logits_BV = torch.zeros(len(params), V, device=device)
    uniform_B = uniform(*draws_of(rows(params), device))
    return [sample(logits_BV, tensors, uniform_B)] + ([probabilities(logits_BV, tensors)] if tensors else [])


@pytest.mark.slow
@pytest.mark.parametrize("step", [whole_step, plain_step])
@pytest.mark.parametrize("params", BATCHES)
def test_nothing_is_looked_at_on_the_way(step, params):
    for found in step(params, "meta"):
        assert all(each.device.type == "meta" for each in (found if isinstance(found, tuple) else [found]))


def test_looking_would_be_noticed(monkeypatch):
    """The test above can fail: with the CPU's way, which looks for a nucleus attempt by attempt, it does."""
    monkeypatch.setattr(sampling, "candidate_counts", lambda params, vocab, on_cpu: [128, vocab])
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[mM]eta"):
        plain_step([KINDS["top_p"]], "meta")


def test_what_the_host_knows_does_not_change_the_answer():
    """The one attempt of a GPU against the CPU's several, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(len(KINDS), V, generator=generator) * 3
    known = sampling_tensors(list(KINDS.values()), torch.device("cpu"))
    unknown = known._replace(most_k=V, by_p=True)  # sorts everything at once
    assert torch.equal(probabilities(logits_BV, known), probabilities(logits_BV, unknown))
    assert torch.equal(probabilities(logits_BV, known), probabilities(logits_BV, known._replace(most_k=0)))
    by_k = sampling_tensors([KINDS["top_k"], KINDS["top_k top_p"]], torch.device("cpu"))
    assert not by_k.by_p and by_k.most_k == 300
    assert torch.equal(probabilities(logits_BV[:2], by_k), probabilities(logits_BV[:2], by_k._replace(by_p=True)))


@on_a_gpu
@pytest.mark.parametrize("step", [whole_step, plain_step])
@pytest.mark.parametrize("params", BATCHES)
def test_cuda_does_not_synchronize(step, params):
    step(params, "cuda")  # kernels load, memory is allocated
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(params, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("arm", ["draft", "ngram"])
@pytest.mark.parametrize("params", BATCHES)
def test_an_engine_step_reads_once(tiny_model, arm, params):
    """A whole speculative step of a batch on the GPU: its only wait is the read of its tokens."""
    device = torch.device("cuda")

    def runner(seed, speculator=None):
        model = tiny_model(seed=seed).to(device)
        model.setup_rope(128, device)
        cache = KVCache(model.config, slots=8, max_seq_len=128, dtype=torch.float32, device=device)
        return Runner(decode=model, prefill=model, cache=cache, eos_ids=(), prefill_chunk=16, speculator=speculator)

    proposer = DraftProposer(runner(1)) if arm == "draft" else NGramProposer(device)
    speculator = Speculator({arm: proposer}, Controller([K]), max_seq_len=128, always=Choice(arm, K))
    core = EngineCore(runner(0, speculator))
    for i, each in enumerate(params):
        core.add(str(i), [5, 6, 5, 6, 5, 6], each)
    while not all(s.output for s in core.scheduler.running.values()):
        core.step()
    core.step()  # the draft catches up
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            core.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1


@pytest.mark.parametrize("vocab", [256, 1024, 1000])
def test_the_best_token_is_the_argmax(vocab):
    logits_BV = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)).round(decimals=1)  # with ties
    logits_BV[1, 700 % vocab] = float("nan")
    logits_BV[2, 300 % vocab] = float("inf")
    logits_BV[3] = float("-inf")
    assert torch.equal(best_token(logits_BV), logits_BV.argmax(-1))
    assert best_token(logits_BV[:0]).shape == (0,)


def test_values_reach_a_device_as_they_are():
    assert on_device([[1, 2]], torch.device("cpu")).tolist() == [[1, 2]]
    assert [is_matched(s) for s in rows(KINDS.values())] == [True, False, True, False, False, False, False]
