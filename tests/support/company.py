"""Requests of every kind that join and leave an engine at random, and what each must get all the same."""

from __future__ import annotations

from gpt_fast.config import SamplingParams

VOCAB, EOS = 97, 1


def run(core, *, until=None):
    """Step until idle (or `until` tokens of a request); the tokens, reasons and logprobs by request."""
    events = {}
    while not core.idle:
        for event in core.step():
            events.setdefault(event.request_id, []).append(event)
        core.scheduler.check_integrity()
        if until and len(events.get(until[0], ())) >= until[1]:
            break
    return events


def tokens_of(events):
    return [e.token for e in events]


def answer(core, prompt, params, owner=""):
    """One request's tokens, on an engine that has nothing else to do."""
    core.add("only", list(prompt), params, owner=owner)
    return tokens_of(run(core)["only"])


def random_requests(rng, count, *, longest=90):
    """(prompt, params) of every kind; two thirds of the prompts begin alike."""
    beginning = [rng.randrange(2, VOCAB) for _ in range(60)]
    requests = {}
    for i in range(count):
        prompt = beginning[: rng.randrange(60)] if rng.random() < 0.67 else []
        prompt = prompt + [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, longest - 60))]
        requests[f"r{i}"] = (
            prompt,
            SamplingParams(
                max_new_tokens=rng.randrange(1, 30),
                temperature=rng.choice([0, 0, 0.7, 1.3]),
                top_k=rng.choice([0, 5]),
                top_p=rng.choice([1.0, 0.7]),
                min_p=rng.choice([0.0, 0.05]),
                seed=rng.randrange(-5, 5),
                ignore_eos=rng.random() < 0.5,
                min_tokens=0,
                repetition_penalty=rng.choice([1.0, 1.2]),
                presence_penalty=rng.choice([0.0, 0.5]),
            ),
        )
    return requests


def check_company(requests, core, make_alone, rng):
    """Run all on `core`, coming and going at random; each gets what it gets on an engine of its own."""
    outs, late, aborted = {}, list(requests), set()
    while late or not core.idle:
        if late and rng.random() < 0.3:
            name = late.pop()
            core.add(name, *requests[name])
        for event in core.step():
            outs.setdefault(event.request_id, []).append(event.token)
        if rng.random() < 0.03 and core.scheduler.running:
            aborted.add(rng.choice(list(core.scheduler.running)))
            core.abort(list(aborted)[-1])
        core.scheduler.check_integrity()
    for name, (prompt, params) in requests.items():
        expected = answer(make_alone(), prompt, params)
        got = outs.get(name, [])
        assert got == (expected[: len(got)] if name in aborted else expected)
