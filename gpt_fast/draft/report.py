"""What a draft would bring on this machine: latency, acceptance, predicted and measured speed-up.

Formulas (docs/speculation.md): tau = 1 + sum over i of a_1 ... a_i, with a_i the measured chance that proposal i
stands when those before it do; S = tau / (k c + v + o + p), with c a draft step, v a verification of k + 1 tokens, o
everything else of a speculative step and p the step's share of the prompts that a draft must read, all in plain steps.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpt_fast.chain import Chain
from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.controller import Choice, expected_tokens
from gpt_fast.draft.measure import Reader, Run, draft_runner, forget, run, speculating
from gpt_fast.draft.prompts import Prompt, categories
from gpt_fast.draft.statistics import wilson
from gpt_fast.engine import EngineCore, Runner, bucket_of
from gpt_fast.proposers import DraftProposer
from gpt_fast.scheduler import Sequence as Row
from gpt_fast.scheduler import Slot
from gpt_fast.speculator import made_up

REPEATS = 11
AGREE = 0.07  # predicted and measured speed-up may differ by this share


@dataclass(frozen=True)
class Acceptance:
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


@dataclass
class DraftReport:
    draft: str
    acceptance: list[Acceptance] = field(default_factory=list)
    overlap: list[Overlap] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"speeds": [asdict(s) | {"verdict": s.verdict} for s in self.speeds]}


def judge_draft(
    core: EngineCore, name: str, prompts: Sequence[Prompt], *, batch_sizes: Sequence[int],
    temperatures: Sequence[float], max_new_tokens: int, repeat: int = 1,
) -> DraftReport:  # fmt: skip
    """Measure everything about the proposer that `core` was loaded with; speeds over `repeat` turns of plain decode
    and speculation."""
    speculator = core.runner.speculator
    if speculator is None:
        raise ConfigError("speculate", "the engine has no proposer to judge")
    arm, counts = next(iter(speculator.proposers)), speculator.controller.counts
    report, runs = DraftReport(name), []
    for temperature in temperatures:
        for category in categories(prompts):
            tokens = [p.tokens for p in prompts if p.category == category]
            done = answer(core, Choice(arm, counts[-1]), tokens, temperature, max_new_tokens)
            report.acceptance.append(acceptance(category, temperature, done))
            if temperature == temperatures[0]:
                runs.append(done)
                report.overlap += read_overlap(core, category, tokens, done.answers)
    pooled = pool(runs)
    unread = mean_unread([p.tokens for p in prompts])
    context = min(round(statistics.fmean(len(p.tokens) for p in prompts)) + max_new_tokens // 2, core.max_seq_len // 2)
    for batch_size in batch_sizes:
        cost = measure_cost(core, arm, batch_size, counts, context=context, unread=unread,
                            temperature=temperatures[0])  # fmt: skip
        report.costs.append(cost)
        k = best_k(pooled, cost)
        turns: list[list[Run]] = [[], []]
        for _ in range(repeat):
            for done_so_far, choice in zip(turns, (None, Choice(arm, k)), strict=True):
                tokens = fill(prompts, batch_size)
                done = answer(core, choice, tokens, temperatures[0], max_new_tokens, together=batch_size)
                done_so_far.append(done)
        report.speeds.append(compare(pooled, cost, k, *turns))
    return report


def answer(
    core: EngineCore, choice: Choice | None, tokens: Sequence[list[int]], temperature: float, max_new_tokens: int,
    *, together: int = 0,
) -> Run:  # fmt: skip
    """The slots empty at first, as if no such prompt had come before."""
    random.seed(0)  # unseeded requests draw their seeds here
    forget(core)
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    return run(core, choice, tokens, params, together=together)


def mean_unread(prompts: Sequence[list[int]]) -> int:
    """Tokens that a prompt does not share with all the others, on average: those a draft's slot does not hold."""
    columns = zip(*prompts, strict=False)
    shared = next((i for i, column in enumerate(columns) if len(set(column)) > 1), 0)
    return round(statistics.fmean(len(tokens) for tokens in prompts)) - shared


def fill(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    """Every prompt once, and at least two batches."""
    tokens = [p.tokens for p in prompts]
    return (tokens * (2 * batch_size // len(tokens) + 1))[: max(2 * batch_size, len(tokens))]


# -------------------------------------------------------------------------------------- acceptance


def acceptance(category: str, temperature: float, done: Run) -> Acceptance:
    totals = done.totals
    rates = [(a / n if n else 0.0, *wilson(a, n)) for n, a in totals.positions]
    return Acceptance(category, temperature, rates, totals.accepted / max(totals.steps, 1), totals.steps)


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


def read_overlap(
    core: EngineCore, category: str, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[Overlap]:
    """Empty for a proposer without a model."""
    runner = draft_runner(core.runner.speculator)
    if runner is None:
        return []
    target, draft, found = Reader(core.runner), Reader(runner), []
    for prompt, text in zip(prompts, answers, strict=True):
        p_TV, q_TV = target.logits(prompt, text).log_softmax(-1), draft.logits(prompt, text).log_softmax(-1)
        overlap_T = torch.minimum(p_TV.exp(), q_TV.exp()).sum(-1)
        agree_T = (p_TV.argmax(-1) == q_TV.argmax(-1)).float()
        found.append(torch.stack((overlap_T, agree_T, (p_TV.exp() * (p_TV - q_TV)).sum(-1)), 1).cpu())
    overlap, top1, kl = torch.cat(found).mean(0).tolist()
    return [Overlap(category, overlap, top1, kl)]


# ------------------------------------------------------------------------------------------- costs


@torch.inference_mode()
def measure_cost(
    core: EngineCore, arm: str, batch_size: int, counts: Sequence[int], *, context: int = 64, unread: int = 0,
    temperature: float = 0.0,
) -> Cost:  # fmt: skip
    """Time every kind of step in turn, REPEATS times, after `context` tokens a row; medians. Plain steps and a draft's
    come several in a row, for where they can they begin ahead. unread: tokens of a prompt that a draft must read."""
    rows = made_up(batch_size, context, temperature=temperature)
    times: dict[str, list[float]] = {}

    def timed(key: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        times.setdefault(key, []).append(time.perf_counter() - started)

    runner = draft_runner(core.runner.speculator)
    proposer = core.runner.speculator.proposers[arm] if core.runner.speculator else None
    start = proposer.start if isinstance(proposer, DraftProposer) and temperature == 0 else None
    for _ in range(REPEATS + 1):
        with speculating(core, None):
            times.setdefault("plain", []).append(plain_step(core, rows))
        if runner:
            timed("prompt", lambda: read_prompt(runner, unread))
            times.setdefault("draft", []).append(draft_step(runner, rows, start))
        for k in counts:
            timed(f"verify {k}", lambda k=k: forward(core.runner, rows, k + 1))  # type: ignore[misc]
            with speculating(core, Choice(arm, k)):
                catch_up(core, rows)
                timed(f"step {k}", lambda: core.runner.advance(rows))
    core.scheduler.slots = [Slot() for _ in core.scheduler.slots]  # the made-up rows wrote there
    seconds = {key: statistics.median(values[1:]) for key, values in times.items()}
    plain, draft = seconds["plain"], seconds.get("draft", 0.0)
    v = {k: seconds[f"verify {k}"] / plain for k in counts}
    o = {k: (seconds[f"step {k}"] - k * draft) / plain - v[k] for k in counts}
    rate = batch_size / draft if draft else 0.0
    return Cost(batch_size, plain * 1e3, draft * 1e3, draft / plain, v, o, rate, seconds.get("prompt", 0.0) * 1e3)


def plain_step(core: EngineCore, rows: Sequence[Row], steps: int = 4) -> float:
    """Seconds of a plain step among others, of rows that are left as they were."""
    before = [(row, list(row.output), row.computed) for row in rows]
    started = 0.0
    for step in range(1 + steps):
        if step == 1:
            started = time.perf_counter()
        sampled = core.runner.advance(list(rows))
        for row in rows:
            row.output.append(sampled[row.id][0].token)
            row.computed += 1
        core.runner.run_ahead(list(rows))
    seconds = (time.perf_counter() - started) / steps
    for row, output, computed in before:
        row.output[:], row.computed = output, computed
    return seconds


def draft_step(runner: Runner, rows: Sequence[Row], start: Callable | None, steps: int = 4) -> float:
    """Seconds of one of several proposals: steps of a chain where they can be begun (`start`), else one by one."""
    started = time.perf_counter()
    if start:
        Chain(start, runner.cache, tokens=[[0] for _ in rows], starts=[r.computed for r in rows],
              slots=[r.slot for r in rows], counts=[steps] * len(rows)).tokens()  # fmt: skip
    else:
        for _ in range(steps):
            forward(runner, rows, 1)
    return (time.perf_counter() - started) / steps


def read_prompt(runner: Runner, count: int) -> None:
    """Feed a draft's first slot `count` tokens, as it catches up with a prompt."""
    for start in range(0, count, runner.chunks[-1]):
        part = [0] * min(runner.chunks[-1], count - start)
        size = bucket_of(runner.chunks, len(part))
        runner.forward(runner.prefill, [part], [start], [0], size=size)[..., 0].tolist()


def catch_up(core: EngineCore, rows: Sequence[Row]) -> None:
    """Steps until a draft has seen all of the rows, and one more."""
    lagging = True
    while lagging:
        core.runner.advance(list(rows))
        lagging = any(offer.lag for offer in core.runner.speculator.last.offers) if core.runner.speculator else False


def forward(runner: Runner, rows: Sequence[Row], size: int) -> list:
    """One forward of `size` tokens a row, until the host has something of every token."""
    tokens = [[0] * size for _ in rows]
    starts, slots = [r.computed for r in rows], [r.slot for r in rows]
    return runner.forward(runner.decode, tokens, starts, slots, size=size, every=True)[..., 0].tolist()


# ------------------------------------------------------------------------------------------- speed


def best_k(pooled: Pooled, cost: Cost) -> int:
    return max(cost.v, key=lambda k: pooled.tau(k) / pooled.cost(k, cost))


def break_even(k: int, relative_cost: float) -> float:
    """The acceptance rate at which (1 - a^(k+1)) / (1 - a) pays for a step of this cost; 1 where none does."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, k) < relative_cost else (low, middle)
    return high


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
        batch_size=rows, k=k, predicted=pooled.tau(k) / pooled.cost(k, cost), measured=tau / relative,
        tau_predicted=pooled.tau(k), tau_measured=tau, cost_predicted=pooled.cost(k, cost), cost_measured=relative,
        prompts_predicted=cost.prompts(pooled.tau(k), pooled.answer), prompts_measured=prompts,
        break_even=break_even(k, cost.step(k) + cost.prompts(pooled.tau(k), pooled.answer)),
    )  # fmt: skip


def ready_step(run: Run) -> float:
    """Seconds of a step in which no draft had to catch up; of any where every step had to."""
    return run.ready_seconds / run.ready_steps if run.ready_steps else run.seconds / run.steps


def reading(run: Run) -> float:
    """Seconds that a row's catching up added to its step."""
    return max(run.seconds - run.steps * ready_step(run), 0.0) / max(run.caught_up, 1)


# ------------------------------------------------------------------------------------------- output


def print_report(report: DraftReport) -> None:
    print(f"\n=== {report.draft}")
    print("acceptance of proposal i where those before it stand (95 % interval), proposals accepted a block")
    for row in report.acceptance:
        rates = "  ".join(f"{a:.2f} ({low:.2f}-{high:.2f})" for a, low, high in row.rates)
        print(f"  {row.category:10} T={row.temperature:<4g} {row.mean_accepted:5.2f} of {row.steps} blocks   {rates}")
    for o in report.overlap:
        print(f"  {o.category:10} E[sum min(p,q)] {o.overlap:.3f}, top-1 agreement {o.top1:.3f}, KL {o.kl:.3f} nats")
    print(f"{'batch':>6} {'plain ms':>9} {'draft ms':>9} {'draft tok/s':>12} {'prompt ms':>10} {'c':>6}  v and o by k")
    for c in report.costs:
        by_k = "  ".join(f"k={k}: {c.v[k]:.2f} {c.o[k]:+.2f}" for k in c.v)
        print(
            f"{c.batch_size:6} {c.plain_ms:9.2f} {c.draft_ms:9.2f} {c.draft_tokens_per_s:12.1f}"
            f" {c.draft_prompt_ms:10.2f} {c.c:6.3f}  {by_k}"
        )
    print(f"{'batch':>6} {'best k':>6} {'predicted':>10} {'measured':>9} {'residual':>9} {'break-even a':>13}  verdict")
    for s in report.speeds:
        print(
            f"{s.batch_size:6} {s.k:6} {s.predicted:10.2f} {s.measured:9.2f} {s.residual:+9.1%} {s.break_even:13.2f}"
            f"  {s.verdict}"
        )


def print_comparison(reports: Sequence[DraftReport]) -> None:
    """All drafts in one table, the fastest first at each batch size."""
    print(
        f"\n{'batch':>6} {'draft':40} {'best k':>6} {'c':>6} {'accepted':>9} {'predicted':>10} {'measured':>9}"
        "  verdict"
    )
    rows = [
        (speed.batch_size, -speed.measured, report, cost, speed)
        for report in reports
        for cost, speed in zip(report.costs, report.speeds, strict=True)
    ]
    for batch_size, _, report, cost, speed in sorted(rows, key=lambda row: row[:2]):
        accepted = sum(a.mean_accepted * a.steps for a in report.acceptance)
        mean = accepted / max(sum(a.steps for a in report.acceptance), 1)
        print(
            f"{batch_size:6} {report.draft[-40:]:40} {speed.k:6} {cost.c:6.3f} {mean:9.2f} {speed.predicted:10.2f}"
            f" {speed.measured:9.2f}  {speed.verdict}"
        )


def plot(reports: Sequence[DraftReport], path: Path) -> None:
    """Acceptance by position, and speed-up by batch size, of every draft."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plot", "needs matplotlib: pip install gpt-fast[plot]") from None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for report in reports:
        for row in report.acceptance:
            label = f"{Path(report.draft).name} {row.category} T={row.temperature:g}"
            left.plot(range(1, len(row.rates) + 1), [a for a, _, _ in row.rates], marker="o", label=label)
        sizes, name = [s.batch_size for s in report.speeds], Path(report.draft).name
        right.plot(sizes, [s.predicted for s in report.speeds], "--", label=f"{name} predicted")
        right.plot(sizes, [s.measured for s in report.speeds], marker="o", label=f"{name} measured")
    left.set(xlabel="proposal", ylabel="accepted where those before stand", ylim=(0, 1.02))
    right.axhline(1.0, color="grey", linewidth=1)
    right.set(xlabel="batch size", ylabel="speed-up over plain decode")
    for axes in (left, right):
        axes.legend(fontsize="x-small")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")
    temporary.replace(path)
