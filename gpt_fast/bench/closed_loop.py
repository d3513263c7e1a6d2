"""A closed loop of streams over HTTP: figures under `vllm bench serve`'s names, and a check of every answer.

Greedy answers do not depend on neighbours, so each prompt is first asked alone; what comes under load must be the same
text. An answer that is another prompt's is counted as mixed up, one that is cut short or refused as failed.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt_fast.bench.client import Answer, Api, ask
from gpt_fast.measure.stats import percentile

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Load:
    """streams: requests in flight at any time. It ends after `seconds`, or after `requests` if that is given."""

    url: str
    api: Api
    streams: int
    new_tokens: int
    seconds: float = 30.0
    requests: int | None = None
    token: str = ""


@dataclass(frozen=True)
class Outcome:
    prompt: Prompt
    answer: Answer


async def ask_alone(load: Load, prompts: Sequence[Prompt]) -> dict[Prompt, str]:
    """Each prompt's answer with nothing else in flight. RuntimeError when one fails."""
    oracle = {}
    for prompt in prompts:
        answer = await ask(load.url, load.api, list(prompt), load.new_tokens, token=load.token)
        if answer.error:
            raise RuntimeError(f"alone, before the load: {answer.error}")
        oracle[prompt] = answer.text
    return oracle


async def run(load: Load, prompts: Sequence[Prompt]) -> tuple[list[Outcome], float]:
    """All outcomes, and the seconds from the first request to the last answer. Requests under way may finish."""
    started = time.perf_counter()
    todo: Iterator[Prompt] = itertools.cycle(prompts)
    if load.requests is not None:
        todo = itertools.islice(todo, load.requests)
    outcomes: list[Outcome] = []

    async def stream() -> None:
        for prompt in todo:  # shared: each prompt goes to the next free stream
            answer = await ask(load.url, load.api, list(prompt), load.new_tokens, token=load.token)
            outcomes.append(Outcome(prompt, answer))
            if load.requests is None and time.perf_counter() - started >= load.seconds:
                return

    await asyncio.gather(*(stream() for _ in range(load.streams)))
    return outcomes, time.perf_counter() - started


# -------------------------------------------------------------------------------------------- figures


def check(outcomes: Sequence[Outcome], oracle: Mapping[Prompt, str]) -> dict[str, Any]:
    """How many answers failed, differ from the oracle, or are another prompt's; the first problem in a line."""
    failed = [o for o in outcomes if o.answer.error]
    wrong = [o for o in outcomes if not o.answer.error and o.answer.text != oracle[o.prompt]]
    texts = set(oracle.values())
    mixed_up = sum(o.answer.text in texts for o in wrong)
    problem = None
    if failed:
        problem = failed[0].answer.error
    elif wrong:
        problem = f"got {wrong[0].answer.text[:80]!r}, alone it was {oracle[wrong[0].prompt][:80]!r}"
    return {
        "failed": len(failed),
        "mismatched": len(wrong),
        "mixed_up": mixed_up,
        "distinct_answers": len(texts),
        "first_problem": problem,
    }


def metrics(outcomes: Sequence[Outcome], load: Load, duration: float) -> dict[str, Any]:
    """Of the whole answers. Each has exactly new_tokens tokens: end-of-sequence is ignored.

    TTFT: request sent to first text. TPOT: the rest of the answer's time by its tokens after the first. ITL: from
    one piece of text to the next, which may hold several tokens. E2EL: request sent to the end of the answer.
    """
    answers = [o.answer for o in outcomes if not o.answer.error]
    tokens_in = sum(len(o.prompt) for o in outcomes if not o.answer.error)
    tokens_out = len(answers) * load.new_tokens
    after_first = max(load.new_tokens - 1, 1)
    gaps = [later.at - earlier.at for answer in answers for earlier, later in itertools.pairwise(answer.arrivals)]
    return {
        "max_concurrency": load.streams,
        "duration": duration,
        "completed": len(answers),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(answers) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        **spread("ttft", [answer.ttft for answer in answers]),
        **spread("tpot", [(a.arrivals[-1].at - a.arrivals[0].at) / after_first for a in answers]),
        **spread("itl", gaps),
        **spread("e2el", [answer.ended - answer.started for answer in answers]),
    }


def spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """vLLM's keys: mean_ttft_ms, median_ttft_ms, std_ttft_ms, p90_ttft_ms, p99_ttft_ms."""
    values = [1000 * value for value in seconds]
    return {
        f"mean_{name}_ms": statistics.fmean(values) if values else None,
        f"median_{name}_ms": percentile(values, 50),
        f"std_{name}_ms": statistics.pstdev(values) if values else None,
        f"p90_{name}_ms": percentile(values, 90),
        f"p99_{name}_ms": percentile(values, 99),
    }
