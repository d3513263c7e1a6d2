"""Assess a draft on this machine: which of its proposals are accepted, what its steps cost, what both bring."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.draft.cost import measure_cost
from gpt_fast.draft.formulas import Cost, Speed, best_k, compare, pool
from gpt_fast.draft.prompts import Prompt, categories
from gpt_fast.draft.runs import Reader, Run, draft_runner, run, target_runner
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.fixed_choice import speculator_of
from gpt_fast.measure.significance import wilson
from gpt_fast.speculative.costs import Choice


@dataclass(frozen=True)
class CategoryAcceptance:
    """Of one category at one temperature. rates[i]: (a_{i+1}, low, high), 95 % intervals."""

    category: str
    temperature: float
    rates: list[tuple[float, float, float]]
    mean_accepted: float
    steps: int


@dataclass(frozen=True)
class Overlap:
    """By reading the target's own text (teacher forcing): E[sum min(p, q)] at temperature 1, how often the most
    likely tokens agree, and KL(p || q) in nats."""

    category: str
    overlap: float
    top1: float
    kl: float


@dataclass
class DraftReport:
    draft: str
    acceptance: list[CategoryAcceptance] = field(default_factory=list)
    overlap: list[Overlap] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    @property
    def mean_accepted(self) -> float:
        """Proposals a block, over all categories and temperatures."""
        accepted = sum(a.mean_accepted * a.steps for a in self.acceptance)
        return accepted / max(sum(a.steps for a in self.acceptance), 1)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"speeds": [asdict(s) | {"verdict": s.verdict} for s in self.speeds]}


def assess_draft(
    core: EngineCore,
    name: str,
    prompts: Sequence[Prompt],
    *,
    batch_sizes: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    repeat: int = 1,
) -> DraftReport:
    """Measure everything about the proposer that `core` was loaded with; costs and speeds at the first temperature,
    speeds over `repeat` turns of plain decode and speculation."""
    speculator = speculator_of(core)
    if speculator is None:
        raise ConfigError("speculate", "the engine has no proposer to assess")
    arm, counts = next(iter(speculator.proposers)), speculator.counts
    report, runs = DraftReport(name), []
    for temperature in temperatures:
        for category in categories(prompts):
            tokens = [p.tokens for p in prompts if p.category == category]
            done = answer(core, Choice(arm, counts[-1]), tokens, temperature, max_new_tokens)
            report.acceptance.append(acceptance(category, temperature, done))
            if temperature == temperatures[0]:
                runs.append(done)
                report.overlap += read_overlap(core, category, tokens, done.answers)
    pooled, every = pool(runs), [p.tokens for p in prompts]
    context = min(round(statistics.fmean(map(len, every))) + max_new_tokens // 2, core.max_seq_len // 2)
    for batch_size in batch_sizes:
        cost = measure_cost(
            core, arm, batch_size, counts, context=context, unread=mean_unread(every), temperature=temperatures[0]
        )
        k = best_k(pooled, cost)
        plain: list[Run] = []
        spoken: list[Run] = []
        for _ in range(repeat):
            for turns, choice in ((plain, None), (spoken, Choice(arm, k))):
                turns.append(
                    answer(core, choice, fill(every, batch_size), temperatures[0], max_new_tokens, together=batch_size)
                )
        report.costs.append(cost)
        report.speeds.append(compare(pooled, cost, k, plain, spoken))
    return report


def answer(
    core: EngineCore,
    choice: Choice | None,
    tokens: Sequence[list[int]],
    temperature: float,
    max_new_tokens: int,
    *,
    together: int = 0,
) -> Run:
    """The slots empty at first, as if no such prompt had come before."""
    random.seed(0)  # unseeded requests draw their seeds here
    core.forget_slots()
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    return run(core, choice, tokens, params, together=together)


def mean_unread(prompts: Sequence[list[int]]) -> int:
    """Tokens that a prompt does not share with all the others, on average: those a draft's slot does not hold."""
    columns = zip(*prompts, strict=False)
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)
    return round(statistics.fmean(len(tokens) for tokens in prompts)) - shared


def fill(prompts: Sequence[list[int]], batch_size: int) -> list[list[int]]:
    """Every prompt once, and at least two batches."""
    repeated = [*prompts] * (2 * batch_size // len(prompts) + 1)
    return repeated[: max(2 * batch_size, len(prompts))]


def acceptance(category: str, temperature: float, done: Run) -> CategoryAcceptance:
    totals = done.totals
    rates = [(a / n if n else 0.0, *wilson(a, n)) for n, a in totals.positions]
    return CategoryAcceptance(category, temperature, rates, totals.accepted / max(totals.steps, 1), totals.steps)


def read_overlap(
    core: EngineCore, category: str, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[Overlap]:
    """Empty for a proposer without a model."""
    runner = draft_runner(core)
    if runner is None:
        return []
    target, draft, found = Reader(target_runner(core)), Reader(runner), []
    for prompt, text in zip(prompts, answers, strict=True):
        p_TV, q_TV = target.logits(prompt, text).log_softmax(-1), draft.logits(prompt, text).log_softmax(-1)
        overlap_T = torch.minimum(p_TV.exp(), q_TV.exp()).sum(-1)
        agree_T = (p_TV.argmax(-1) == q_TV.argmax(-1)).float()
        found.append(torch.stack((overlap_T, agree_T, (p_TV.exp() * (p_TV - q_TV)).sum(-1)), 1).cpu())
    overlap, top1, kl = torch.cat(found).mean(0).tolist()
    return [Overlap(category, overlap, top1, kl)]
