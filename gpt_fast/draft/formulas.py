"""What speculation brings, by formula, and where a measurement departs from it. Pure functions over measured figures.

tau = 1 + sum over i of a_1 ... a_i, with a_i the measured chance that proposal i is accepted when those before it are;
S = tau / (k c + v + o + p), with c a draft step, v a verification of k + 1 tokens, o everything else of a speculative
step and p the step's share of the prompts that a draft must read, all in plain steps (docs/speculation.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from gpt_fast.draft.runs import Run
from gpt_fast.speculative.controller import expected_tokens

AGREE = 0.07  # predicted and measured speed-up may differ by this share


@dataclass(frozen=True)
class Cost:
    """At a batch size: milliseconds of a plain step, a draft step and until a draft has read a prompt; v and o by k;
    draft tokens/s over all rows."""

    batch_size: int
    plain_ms: float
    draft_ms: float
    c: float
    v: dict[int, float]
    o: dict[int, float]
    draft_tokens_per_s: float
    draft_prompt_ms: float = 0.0

    def step(self, k: int) -> float:
        """k c + v + o."""
        return k * self.c + self.v[k] + self.o[k]

    def prompts(self, tau: float, answer: float) -> float:
        """p: an answer takes answer / tau steps, and each of the batch's rows begins one that often."""
        return self.batch_size * self.draft_prompt_ms / self.plain_ms * tau / answer


@dataclass(frozen=True)
class Pooled:
    """All categories: a_i, the share of decode steps in which a row had proposals (a lookup may find none), and tokens
    an answer."""

    rates: list[float]
    coverage: float
    answer: float

    def tau(self, k: int) -> float:
        """Tokens a row's step brings."""
        return 1 + self.coverage * sum(math.prod(self.rates[: i + 1]) for i in range(min(k, len(self.rates))))

    def cost(self, k: int, cost: Cost) -> float:
        """Of a step of the batch, in plain steps: a step is plain only where no row has proposals."""
        some = 1 - (1 - self.coverage) ** cost.batch_size
        return some * cost.step(k) + 1 - some + cost.prompts(self.tau(k), self.answer)


def pool(runs: Sequence[Run]) -> Pooled:
    longest = max(len(r.totals.positions) for r in runs)
    positions = [[r.totals.positions[i] for r in runs if i < len(r.totals.positions)] for i in range(longest)]
    rates = [sum(a for _, a in column) / max(sum(n for n, _ in column), 1) for column in positions]
    row_steps = sum(len(tokens) - 1 for r in runs for tokens in r.answers) - sum(r.totals.accepted for r in runs)
    answer = statistics.fmean(len(tokens) for r in runs for tokens in r.answers)
    return Pooled(rates, min(sum(r.totals.steps for r in runs) / max(row_steps, 1), 1.0), answer)


def best_k(pooled: Pooled, cost: Cost) -> int:
    return max(cost.v, key=lambda k: pooled.tau(k) / pooled.cost(k, cost))


def break_even(k: int, relative_cost: float) -> float:
    """The acceptance rate at which (1 - a^(k+1)) / (1 - a) pays for a step of this cost; 1 where none does."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, k) < relative_cost else (low, middle)
    return high


@dataclass(frozen=True)
class Speed:
    """Predicted by the formula and measured, at a batch size with the k that is predicted best."""

    batch_size: int
    k: int
    predicted: float
    measured: float
    tau_predicted: float
    tau_measured: float
    cost_predicted: float
    cost_measured: float
    prompts_predicted: float  # p, a part of cost
    prompts_measured: float
    break_even: float

    @property
    def residual(self) -> float:
        return self.measured / self.predicted - 1

    @property
    def verdict(self) -> str:
        """Whether the prediction holds; else the term that is furthest off, as a share of the whole it is part of."""
        if abs(self.residual) <= AGREE:
            return "agrees"
        prompts = self.prompts_measured - self.prompts_predicted
        off = {
            "tau": self.tau_measured / self.tau_predicted - 1,
            "k c + v + o": (self.cost_measured - self.cost_predicted - prompts) / self.cost_predicted,
            "p, a draft's reading of prompts,": prompts / self.cost_predicted,
        }
        term = max(off, key=lambda name: abs(off[name]))
        return f"{term} is off by {off[term]:+.1%}" + (" of a step" if term != "tau" else "")


def compare(pooled: Pooled, cost: Cost, k: int, plain: Sequence[Run], spoken: Sequence[Run]) -> Speed:
    """The fastest turn of each tells what a step costs: whatever else the machine did can only have added to it.

    Where prompts come often, few steps are without one, and those have all of a draft's reading: it is spread over all
    the steps of the answers.
    """
    rows = cost.batch_size
    tau = sum(run.tokens for run in spoken) / sum(run.steps for run in spoken) / rows
    plain_step = min(run.seconds / run.steps for run in plain)
    ready = min(ready_step(run) for run in spoken) / plain_step
    prompts = rows * min(reading(run) for run in spoken) / plain_step * tau / pooled.answer
    relative = ready + prompts
    return Speed(
        batch_size=rows,
        k=k,
        predicted=pooled.tau(k) / pooled.cost(k, cost),
        measured=tau / relative,
        tau_predicted=pooled.tau(k),
        tau_measured=tau,
        cost_predicted=pooled.cost(k, cost),
        cost_measured=relative,
        prompts_predicted=cost.prompts(pooled.tau(k), pooled.answer),
        prompts_measured=prompts,
        break_even=break_even(k, cost.step(k) + cost.prompts(pooled.tau(k), pooled.answer)),
    )


def ready_step(run: Run) -> float:
    """Seconds of a step in which no draft had to catch up; of any where every step had to."""
    return run.ready_seconds / run.ready_steps if run.ready_steps else run.seconds / run.steps


def reading(run: Run) -> float:
    """Seconds that a row's catching up added to its step."""
    return max(run.seconds - run.steps * ready_step(run), 0.0) / max(run.caught_up, 1)
