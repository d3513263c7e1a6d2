"""One engine through many rows: every row answered, as it would be alone, whoever else is served and who answers it."""

from __future__ import annotations

import json
import random
import threading
import time
from concurrent.futures import wait
from functools import partial

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from gpt_fast.batch.answering import Answering, Plan
from gpt_fast.batch.crew import Counter, trade_over
from gpt_fast.batch.dealer import Dealer
from gpt_fast.batch.journal import Journal
from gpt_fast.llm import Engine
from support.tiny_engine import tiny_engine

PLAN = Plan("ab" * 32, 5, {"max_tokens": 9}, ("gpt-fast",))


def requests() -> list[str]:
    """Every kind, seeds or none, several choices, shared beginnings, and what is refused.

    No log-probabilities: PyTorch's own operators, which this engine runs on, round them by the rows beside them.
    """
    rng = random.Random(0)
    lines: list[str] = []
    for index in range(40):
        text = rng.choice(["Once upon a time ", "The sea ", ""]) + "abcdefgh"[: rng.randint(1, 8)]
        chat = {"messages": [{"role": "user", "content": text}]}
        body = chat if index % 3 == 0 else {"prompt": text, "n": 1 + index % 2}
        url = "/v1/chat/completions" if index % 3 == 0 else "/v1/completions"
        body |= {"seed": index} if index % 5 == 0 else {"temperature": 0} if index % 5 == 1 else {}
        lines.append(json.dumps({"custom_id": f"c{index}", "method": "POST", "url": url, "body": body}))
    lines[7] = "no JSON"
    lines[8] = json.dumps({"prompt": "x" * 500})
    lines[9] = json.dumps({"prompt": "x", "top_p": 2})
    lines[10] = json.dumps({"prompt": "x", "model": "other"})
    lines[11] = json.dumps({"input": "tell", "url": "/v1/responses"})
    return lines


LINES = requests()


def answered(tmp_path, *, slots=4, numbers=None, workers=1) -> list[str]:
    """The output's lines of a run of these rows. workers: threads with an engine each, over sockets."""
    numbers = range(1, len(LINES) + 1) if numbers is None else numbers
    output = tmp_path / f"{time.monotonic_ns()}.jsonl"
    with Journal(output, {}, last=len(LINES)) as journal:
        dealer = Dealer(((n, LINES[n - 1]) for n in numbers), journal, lambda done: None)
        if workers == 1:
            Answering(tiny_engine(slots=slots), PLAN, partial(dealer.trade, "one")).run()
        else:
            with Counter(dealer) as counter:
                # Not in the threads: they draw their weights from torch's one generator.
                engines = [tiny_engine(slots=slots) for _ in range(workers)]
                threads = [threading.Thread(target=serve, args=(counter, f"w{i}", e)) for i, e in enumerate(engines)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(60)
        assert journal.done == len(numbers)
        return list(journal.lines())


def serve(counter: Counter, name: str, engine: Engine) -> None:
    from multiprocessing.connection import Client

    with Client(counter.address, authkey=counter.key) as connection:
        Answering(engine, PLAN, trade_over(connection, name)).run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[str]:
    return answered(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_every_answer_is_what_its_request_gets_alone(whole, tmp_path):
    for number in range(1, len(LINES) + 1, 3):
        assert answered(tmp_path, slots=1, numbers=[number]) == [whole[number - 1]]


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_slots_or_workers(whole, tmp_path):
    assert answered(tmp_path, slots=2) == whole
    assert answered(tmp_path, workers=3) == whole


def test_answers_are_openais_and_errors_say_why(whole):
    told = [json.loads(line) for line in whole]
    for index, each in enumerate(told):
        if index in (7, 8, 9, 10, 11):
            continue
        assert (each["custom_id"], each["error"], each["response"]["status_code"]) == (f"c{index}", None, 200)
        kind = ChatCompletion if index % 3 == 0 else Completion
        body = kind.model_validate(each["response"]["body"])
        assert len(body.choices) == (1 if index % 3 == 0 else 1 + index % 2)
        assert body.usage.prompt_tokens_details.cached_tokens == 0
        assert body.usage.completion_tokens <= 9 * len(body.choices)
    assert told[7]["error"]["code"] == "invalid_json_line"
    refused = {8: (400, "context"), 9: (400, "top_p"), 10: (404, "other")}
    for index, (status, words) in refused.items():
        response = told[index]["response"]
        assert response["status_code"] == status
        assert words in json.dumps(response["body"]["error"])
    assert told[11]["error"]["code"] == "invalid_line"


def test_ids_are_of_their_own(whole):
    told = [json.loads(line) for line in whole]
    ids = [each["id"] for each in told] + [e["response"]["body"].get("id") for e in told if e["response"]]
    assert len({i for i in ids if i}) == len([i for i in ids if i])


def test_requests_without_a_seed_draw_differently(tmp_path):
    lines = {json.dumps(json.loads(line)["response"]["body"]["choices"]) for line in same_prompts(tmp_path, seed=5)}
    assert len(lines) > 6
    assert same_prompts(tmp_path, seed=5) == same_prompts(tmp_path, seed=5)
    assert same_prompts(tmp_path, seed=5) != same_prompts(tmp_path, seed=6)


def same_prompts(tmp_path, *, seed) -> list[str]:
    with Journal(tmp_path / f"{time.monotonic_ns()}.jsonl", {}, last=8) as journal:
        dealer = Dealer(((n, '{"prompt": "x"}') for n in range(1, 9)), journal, lambda done: None)
        plan = Plan("ab" * 32, seed, {"max_tokens": 9}, ("gpt-fast",))
        Answering(tiny_engine(), plan, partial(dealer.trade, "one")).run()
        return list(journal.lines())


def test_slots_are_kept_full(tmp_path):
    """A slot that falls free is taken in the next step, as long as there are rows and they are read in time."""
    engine, running = tiny_engine(slots=4), []
    step = engine.step

    def counted():
        wait(answering.reading)  # reading is another thread's, which a busy machine may keep waiting
        events = step()
        ended = sum(event.finish_reason is not None for event in events)  # by now they run no more
        running.append(engine.load_figures().running + ended)
        return events

    engine.step = counted
    with Journal(tmp_path / "out.jsonl", {}, last=60) as journal:
        rows = ((n, json.dumps({"prompt": "x", "max_tokens": 8, "ignore_eos": True})) for n in range(1, 61))
        dealer = Dealer(rows, journal, lambda done: None)
        answering = Answering(engine, PLAN, partial(dealer.trade, "one"))
        answering.run()
        assert journal.done == 60
    steady = running[running.index(4) : -16]  # the last rows leave slots free
    assert len(steady) > 90
    assert set(steady) == {4}
