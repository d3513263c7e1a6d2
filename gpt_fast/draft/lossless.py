"""Proof that speculation says what the target says, on the user's own models, quantization and device.

Greedy: the same tokens as plain decode, or a first difference between tokens that the target itself holds equal but
for rounding. Sampled: emitted tokens against the target's own distribution at their own history.

Shapes: T emitted tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpt_fast.config import SamplingParams
from gpt_fast.draft.runs import Reader, draft_runner, run, target_runner
from gpt_fast.engine.core import EngineCore
from gpt_fast.measure.significance import chi_square, expected_total_variation, total_variation, uniform_p_value
from gpt_fast.sampling import probabilities, sampling_tensors
from gpt_fast.speculative.costs import Choice

ALPHA = 1e-6  # a sound build fails a check about once in a million
GROUP = 50  # equal histories that make a test of their own
RARE = 1e-3  # share of tokens just outside top_k or top_p that rounding explains


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        figures = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.figures.items())
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {figures}"

    def json(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------- greedy


def tie_tolerance(logits_V: Tensor, dtype: torch.dtype) -> float:
    """How far two logits may lie apart and still be a tie: two roundings of a half type; for float32, whose forwards
    of 1 and of k + 1 tokens add in other orders, 1e-4 of the largest logit."""
    share = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    return share * float(logits_V.abs().max())


def check_greedy(core: EngineCore, choice: Choice, prompts: Sequence[list[int]], *, max_new_tokens: int) -> Check:
    """Every prompt's greedy answer with and without speculation."""
    params = SamplingParams(max_new_tokens=max_new_tokens)
    plain, spoken = run(core, None, prompts, params), run(core, choice, prompts, params)
    reader = Reader(target_runner(core))
    ties = wrong = 0
    largest = 0.0
    for prompt, ours, theirs in zip(prompts, spoken.answers, plain.answers, strict=True):
        if ours == theirs:
            continue
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if at is None:  # one ended early, though all its tokens are right
            wrong += 1
            continue
        logits_V = reader.logits(prompt, theirs[: at + 1])[-1]
        gap = float((logits_V[theirs[at]] - logits_V[ours[at]]).abs())
        largest = max(largest, gap)
        tied = gap <= tie_tolerance(logits_V, reader.dtype)
        ties, wrong = ties + tied, wrong + (not tied)
    totals = spoken.totals
    figures = {
        "prompts": len(prompts),
        "equal": len(prompts) - ties - wrong,
        "ties": ties,
        "different": wrong,
        "largest_gap": largest,
        "accepted": totals.accepted,
        "drafted": totals.drafted,
    }
    return Check("greedy", wrong == 0 and totals.drafted > 0, figures)


# ------------------------------------------------------------------------------------------ sampled


def check_sampled(
    core: EngineCore, choice: Choice, prompt: list[int], params: SamplingParams, *, answers: int, seed: int = 0
) -> list[Check]:
    """Many unseeded answers to one prompt: chi-square where histories repeat, and of every token's quantile."""
    random.seed(seed)  # unseeded requests draw their seeds here
    spoken = run(core, choice, [prompt] * answers, params)
    name = f"temperature {params.temperature:g} top_k {params.top_k} top_p {params.top_p:g}"
    reader = Quantiles(core, params, seed)
    values: dict[str, list[float]] = {"by probability": [], "by draft": []}
    for answer in spoken.answers:
        for key, found in reader.quantiles(prompt, answer).items():
            values[key] += found
    checks = [check_histories(core, prompt, spoken.answers, params, name)]
    for key, found in values.items():
        if found:
            test = uniform_p_value(found)
            figures = {"tokens": len(found), "chi2": test.statistic, "df": test.freedom, "p": test.p_value}
            checks.append(Check(f"{name}, quantiles {key}", test.p_value > ALPHA, figures))
    totals = spoken.totals
    rate = totals.accepted / max(sum(evaluated for evaluated, _ in totals.positions), 1)
    checks[0].figures.update(acceptance=rate)
    return checks


def check_histories(
    core: EngineCore, prompt: list[int], answers: Sequence[list[int]], params: SamplingParams, name: str
) -> Check:
    """Chi-square and total variation of what follows each history that occurred often enough (prompt excluded: its
    first token is the prefill's)."""
    reader, statistic, freedom, impossible, worst = Reader(target_runner(core)), 0.0, 0, 0, (0.0, 0.0)
    histories = Counter(tuple(a[:n]) for a in answers for n in range(1, len(a)))
    common = [history for history, count in histories.most_common(64) if count >= GROUP]
    for history in common:
        following = [a[len(history)] for a in answers if tuple(a[: len(history)]) == history]
        p_V = distributions(reader, prompt, [*history, 0], params)[-1].cpu()
        observed_V = torch.bincount(torch.tensor(following), minlength=len(p_V))
        impossible += int(observed_V[p_V == 0].sum())
        test = chi_square(observed_V * (p_V > 0), len(following) * p_V.double())
        statistic, freedom = statistic + test.statistic, freedom + test.freedom
        distance = total_variation(observed_V, p_V)
        worst = max(worst, (distance, expected_total_variation(p_V, len(following))))
    tail = torch.special.gammaincc(torch.tensor(max(freedom, 1) / 2).double(), torch.tensor(statistic / 2).double())
    p_value = float(tail) if freedom else 1.0
    figures = {
        "answers": len(answers),
        "histories": len(common),
        "chi2": statistic,
        "df": freedom,
        "p": p_value,
        "tv": worst[0],
        "tv_expected": worst[1],
        "impossible": impossible,
    }
    return Check(f"{name}, histories", p_value > ALPHA and impossible <= RARE * len(answers), figures)


def distributions(reader: Reader, prompt: list[int], answer: list[int], params: SamplingParams) -> Tensor:
    """What each token of the answer was drawn from: [T, V]."""
    logits_TV = reader.logits(prompt, answer)
    tensors = sampling_tensors([params] * len(answer), logits_TV.device)
    return probabilities(logits_TV, tensors)  # type: ignore[arg-type]


class Quantiles:
    """Each token's place in its own distribution, uniform in [0, 1) if and only if it was drawn from that.

    Tokens are ordered by probability, which shows a wrong temperature, and by q/p, which shows every mistake that
    favours what the draft likes or dislikes.
    """

    def __init__(self, core: EngineCore, params: SamplingParams, seed: int) -> None:
        runner = draft_runner(core)
        self.target, self.draft = Reader(target_runner(core)), Reader(runner) if runner else None
        self.params, self.rng = params, random.Random(seed)

    def quantiles(self, prompt: list[int], answer: list[int]) -> dict[str, list[float]]:
        """Of every token after the first, which is the prefill's."""
        p_TV = distributions(self.target, prompt, answer, self.params)[1:]
        found = {"by probability": self._places(p_TV, p_TV, answer[1:])}
        if self.draft:
            q_TV = distributions(self.draft, prompt, answer, self.params)[1:]
            found["by draft"] = self._places(p_TV, q_TV / p_TV.clamp(min=1e-30), answer[1:])
        return found

    def _places(self, p_TV: Tensor, key_TV: Tensor, answer: Sequence[int]) -> list[float]:
        chosen_T1 = torch.tensor(answer, device=p_TV.device)[:, None]
        key_T1 = key_TV.gather(1, chosen_T1)
        token_V = torch.arange(p_TV.shape[1], device=p_TV.device)
        before_TV = (key_TV > key_T1) | ((key_TV == key_T1) & (token_V < chosen_T1))
        below_T = (p_TV.double() * before_TV).sum(-1).tolist()
        own_T = p_TV.double().gather(1, chosen_T1)[:, 0].tolist()
        return [min(below + self.rng.random() * own, 1.0) for below, own in zip(below_T, own_T, strict=True)]
