"""The proof of `draft verify` on tiny models: passes on the sound engine, fails on each planted fault."""

import pytest
import torch

from gpt_fast.config import SamplingParams
from gpt_fast.draft.lossless import check_greedy, check_sampled
from gpt_fast.engine.core import EngineCore
from gpt_fast.measure import significance
from gpt_fast.speculative.accept import accept_at_once
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.costs import Choice
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.ngram import NGramProposer
from gpt_fast.speculative.speculator import Speculator
from gpt_fast.speculative.verify import Accepted, Proposal
from support import speculation as language

K = 3
DRAFT = Choice("draft", K)


@pytest.fixture(scope="module")
def models(tiny_model):
    return tiny_model(seed=3, n_layer=1, vocab_size=32), tiny_model(seed=4, n_layer=1, dim=16, vocab_size=32)


@pytest.fixture(scope="module")
def build(models, make_core):
    """build(speculator=..., proposer=...): a core that speculates with the other model."""

    def make(*, speculator=Speculator, proposer=DraftProposer, target=models[0], arm="draft"):
        core = make_core(target, slots=32)
        proposers = {"ngram": NGramProposer(torch.device("cpu"))}
        if arm == "draft":
            proposers = {"draft": proposer(make_core(models[1], slots=32).runner)}
        core.runner.speculator = speculator(proposers, Controller([1, 2, K]), max_seq_len=128)
        return core

    return make


def sampled(core, choice=DRAFT, answers=300, **params):
    params = SamplingParams(**{"temperature": 1.0, "max_new_tokens": K + 3, "ignore_eos": True} | params)
    return check_sampled(core, choice, [5, 9, 13], params, answers=answers)


@pytest.mark.slow
@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_p": 0.9}, {"temperature": 1.5, "top_k": 8}])
def test_the_sound_engine_passes(build, params):
    checks = sampled(build(), **params)
    assert len(checks) == 3 and all(check.passed for check in checks), [str(c) for c in checks]
    assert 0.02 < checks[0].figures["acceptance"] < 0.98


@pytest.mark.slow
def test_prompt_lookup_passes(build):
    core = build(arm="ngram")
    checks = sampled(core, Choice("ngram", K), temperature=0.4, max_new_tokens=20, answers=100)
    assert all(check.passed for check in checks), [str(c) for c in checks]


class AnotherTemperature(DraftProposer):
    """Draws from its distribution at 1 and declares it at 0.5."""

    def propose(self, requests, counts):
        proposal = super().propose(requests, counts)
        declared = proposal.q_BKV.square() / proposal.q_BKV.square().sum(-1, keepdim=True)
        return Proposal(proposal.draft_BK, proposal.counts, declared, proposal.matched_B, proposal.caught_up)


class AtOnce(Speculator):
    """Verifies on the CPU as on a GPU."""

    def accept(self, logits_BSV, params, proposal, draws, best_BS):
        return accept_at_once(logits_BSV, params, proposal, draws)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*language.FAULTS, AnotherTemperature])
def test_planted_faults_fail(build, fault, monkeypatch):
    if isinstance(fault, type):
        core = build(proposer=fault)
    else:
        core = build(speculator=AtOnce)
        monkeypatch.setattr("gpt_fast.speculative.accept.verify", fault)
    # Only a block that is accepted whole has a bonus token; of one proposal that is less rare.
    rare = fault is language.bonus_dropped
    checks = sampled(core, Choice("draft", 1), answers=900) if rare else sampled(core)
    assert not all(check.passed for check in checks), [str(c) for c in checks]


@pytest.mark.slow
def test_greedy_passes_and_a_wrong_token_fails(build, monkeypatch):
    prompts = [[5, 9, i] for i in range(2, 12)]
    core = build()
    check = check_greedy(core, DRAFT, prompts, max_new_tokens=20)
    assert check.passed and check.figures["equal"] == 10

    def accepts_one_too_many(target_BS, draft_BK, count_B):
        accepted_B = torch.minimum((draft_BK[:, :1] >= 0).sum(-1), count_B)
        return Accepted(accepted_B, target_BS.gather(1, accepted_B[:, None])[:, 0])

    monkeypatch.setattr("gpt_fast.speculative.accept.match", accepts_one_too_many)
    check = check_greedy(build(), DRAFT, prompts, max_new_tokens=20)
    assert not check.passed and check.figures["different"] > 5


def test_a_tie_is_not_a_fault(make_core, tiny_model):
    """Every token has a twin with an equal logit; which of them is the argmax is rounding's choice."""
    model = tiny_model(seed=3, n_layer=1, vocab_size=32)
    model.output.weight[16:] = model.output.weight[:16]
    model.tok_embeddings.weight[16:] = model.tok_embeddings.weight[:16]
    core = EngineCore(make_core(model, slots=2).runner)
    core.runner.speculator = Speculator(
        {"draft": DraftProposer(make_core(model, slots=2).runner)}, Controller([K]), max_seq_len=128
    )
    forward = core.runner.decode

    def other_twin(batch):
        logits = forward(batch)
        return logits + 1e-6 * (torch.arange(32) >= 16) if batch.tokens_BS.shape[1] > 1 else logits

    core.runner.decode = other_twin
    check = check_greedy(core, Choice("draft", K), [[5, 9, 13], [4, 4, 4]], max_new_tokens=12)
    assert check.passed and check.figures["ties"] > 0


def test_statistics():
    """Against printed tables and by hand."""
    test = significance.chi_square(torch.tensor([60, 40]), torch.tensor([50.0, 50]))
    assert test.p_value == pytest.approx(0.0455, abs=1e-4)
    test = significance.chi_square(torch.tensor([30, 30, 34, 3, 3]), torch.tensor([30.0, 30, 32, 4, 4]))
    assert test.freedom == 3 and test.statistic == pytest.approx(4 / 32 + 4 / 8)  # the two rare cells are one
    assert significance.chi_square(torch.tensor([1, 9]), torch.tensor([0.0, 10])).p_value == 0
    assert significance.total_variation(torch.tensor([3, 1]), torch.tensor([0.5, 0.5])) == 0.25
    low, high = significance.wilson(8, 10)
    assert (low, high) == (pytest.approx(0.490, abs=1e-3), pytest.approx(0.943, abs=1e-3))
    assert significance.wilson(0, 0) == (0.0, 1.0)
    uniform = torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist()
    assert significance.uniform_p_value(uniform).p_value > 1e-3
    assert significance.uniform_p_value([u**1.2 for u in uniform]).p_value < 1e-6


def test_expected_total_variation_is_what_honest_draws_show():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    shown = [
        significance.total_variation(
            torch.bincount(torch.multinomial(p, 1000, replacement=True, generator=generator), minlength=4), p
        )
        for _ in range(300)
    ]
    assert significance.expected_total_variation(p, 1000) == pytest.approx(sum(shown) / 300, rel=0.1)
