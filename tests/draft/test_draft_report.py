"""`draft report` on tiny models: its arithmetic by hand, its figures against what the models are."""

import dataclasses
import json

import pytest

from gpt_fast.config import ConfigError
from gpt_fast.draft import formulas, tables
from gpt_fast.draft.assess import assess_draft, mean_unread
from gpt_fast.draft.prompts import SHIPPED, Prompt, read_prompts
from gpt_fast.draft.runs import Run
from gpt_fast.speculative.controller import Controller
from gpt_fast.speculative.draft_model import DraftProposer
from gpt_fast.speculative.speculator import Speculator, Totals
from support.tiny_engine import tiny_engine

pytestmark = pytest.mark.slow

COST = formulas.Cost(2, 10.0, 1.0, 0.1, {2: 1.1, 4: 1.2}, {2: 0.05, 4: 0.06}, 2000.0)


def test_tau_cost_and_best_k_are_the_stated_formulas():
    pooled = formulas.Pooled([0.8, 0.5, 0.5, 0.5], coverage=1.0, answer=64)
    assert pooled.tau(2) == pytest.approx(1 + 0.8 + 0.8 * 0.5)
    assert pooled.tau(4) == pytest.approx(1 + 0.8 + 0.4 + 0.2 + 0.1)
    assert COST.step(4) == pytest.approx(4 * 0.1 + 1.2 + 0.06)
    assert formulas.best_k(pooled, COST) == 2  # 2.2 / 1.35 against 2.5 / 1.66
    half = formulas.Pooled([0.8], coverage=0.5, answer=64)
    assert half.tau(1) == pytest.approx(1.4)
    assert half.cost(2, COST) == pytest.approx(0.75 * COST.step(2) + 0.25)


def test_break_even_pays_exactly():
    a = formulas.break_even(4, 1.66)
    assert (1 - a**5) / (1 - a) == pytest.approx(1.66)
    assert formulas.break_even(4, 9.0) == pytest.approx(1.0)


def test_the_verdict_names_the_term_that_is_off():
    speed = formulas.Speed(
        1,
        4,
        predicted=2.0,
        measured=1.5,
        tau_predicted=3.0,
        tau_measured=2.25,
        cost_predicted=1.5,
        cost_measured=1.5,
        prompts_predicted=0.1,
        prompts_measured=0.1,
        break_even=0.4,
    )
    assert speed.residual == pytest.approx(-0.25) and speed.verdict == "tau is off by -25.0%"
    dear = dataclasses.replace(speed, tau_measured=3.0, cost_measured=2.0)
    assert dear.verdict == "k c + v + o is off by +33.3% of a step"
    reading = dataclasses.replace(dear, prompts_measured=0.55)
    assert reading.verdict == "p, a draft's reading of prompts, is off by +30.0% of a step"
    assert dataclasses.replace(dear, measured=1.96).verdict == "agrees"


def test_pooling_counts_steps_that_had_proposals():
    totals = Totals()
    totals.learn(2, 1)
    totals.learn(2, 2)
    answers = [[0] * 8]  # one token from the prefill, seven from steps: 3 accepted, so 4 row steps, 2 with proposals
    pooled = formulas.pool([Run(answers, 1.0, 4, 7, totals)])
    assert pooled.rates == [1.0, 0.5] and pooled.coverage == 0.5


def test_the_prompts_that_a_draft_must_read_are_part_of_a_step():
    """Two rows of 32-token answers at 4 tokens a step: a prompt every fourth step, of two plain steps."""
    cost = dataclasses.replace(COST, draft_prompt_ms=20.0)
    pooled = formulas.Pooled([1.0, 1.0, 1.0], coverage=1.0, answer=32)
    assert pooled.cost(4, cost) == pytest.approx(COST.step(4) + 2 / 4)
    assert mean_unread([[1, 2, 3, 4], [1, 2, 9]]) == 2 and mean_unread([[1, 2, 3]]) == 3


@pytest.fixture(scope="module")
def assessed(make_core):
    """A target assessed with itself as the draft, two batch sizes, two temperatures."""
    engine = tiny_engine()
    core = engine.core
    draft = make_core(core.runner.decode, slots=4).runner
    core.runner.speculator = Speculator({"draft": DraftProposer(draft)}, Controller([1, 2, 4]), max_seq_len=128)
    prompts = [Prompt(c, list(f"{c} number {i}".encode())) for c in ("code", "chat") for i in range(2)]
    return assess_draft(core, "itself", prompts, batch_sizes=[1, 2], temperatures=[0.0, 1.0], max_new_tokens=24)


@pytest.mark.slow
def test_a_model_is_its_own_perfect_draft(assessed):
    assert len(assessed.acceptance) == 4
    for row in assessed.acceptance:
        assert [a for a, _, _ in row.rates] == [1.0] * 4 and row.rates[0][1] > 0.5
    for o in assessed.overlap:
        assert (o.overlap, o.top1) == (pytest.approx(1, abs=1e-4), 1.0) and abs(o.kl) < 1e-4
    for cost, speed in zip(assessed.costs, assessed.speeds, strict=True):
        assert set(cost.v) == set(cost.o) == {1, 2, 4} and cost.draft_ms > 0
        assert speed.tau_predicted == pytest.approx(speed.k + 1, rel=0.15)  # an answer's last step has no room
        assert speed.tau_measured > 0.7 * (speed.k + 1)  # the last block of an answer is shorter


def test_the_report_prints_plots_and_is_json(assessed, capsys, tmp_path):
    tables.print_report(assessed)
    out = capsys.readouterr().out
    assert "itself" in out and "best k" in out and "code" in out
    tables.plot([assessed], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    fields = json.loads(json.dumps(assessed.json()))
    assert fields["speeds"][0].keys() >= {"predicted", "measured", "verdict", "break_even"}


def test_the_shipped_prompts_are_in_four_categories(tmp_path):
    engine = tiny_engine()
    prompts = read_prompts(SHIPPED, engine, longest=100)
    assert sorted({p.category for p in prompts}) == ["chat", "code", "math", "summary"]
    assert all(sum(p.category == c for p in prompts) >= 5 for c in ("chat", "code", "math", "summary"))
    assert max(len(p.tokens) for p in prompts) == 100
    assert len(read_prompts(SHIPPED, engine, longest=100, each=1)) == 4
    bad = tmp_path / "bad.jsonl"
    for line in ('{"category": "code"}', "[]", "nonsense", '{"category": 1, "prompt": "x"}'):
        bad.write_text('{"category": "a", "prompt": "b"}\n' + line)
        with pytest.raises(ConfigError, match=r"bad\.jsonl:2"):
            read_prompts(bad, engine, longest=10)
    bad.write_text("\n")
    with pytest.raises(ConfigError, match="holds none"):
        read_prompts(bad, engine, longest=10)
