"""The engine's thread: what one request gets does not depend on rounds, neighbours or cancellations."""

from __future__ import annotations

import ctypes
import time

import pytest

from gpt_fast.config import SamplingParams
from gpt_fast.llm import TextEvent, completion
from gpt_fast.serve import service as service_module
from gpt_fast.serve.service import Service
from support.tiny_engine import tiny_engine
from support.waiting import wait_until

PROMPT = list(b"a prompt")


@pytest.fixture
def service():
    service = Service(tiny_engine())
    service.start()
    return service


def collect(service: Service, ids: list[str]) -> dict[str, list[TextEvent]]:
    """Play TorchServe's rounds until every request has ended."""
    events: dict[str, list[TextEvent]] = {request_id: [] for request_id in ids}

    def round_() -> None:
        service.wait(timeout=0.1)
        for request_id in ids:
            if request_id in service.known():
                events[request_id] += service.take(request_id)

    wait_until(lambda: all(e and e[-1].finish_reason is not None for e in events.values()), meanwhile=round_)
    return events


def params(count: int, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **options)


def test_tokens_equal_the_engine_called_directly(service):
    lengths = [1, 3, 17, 40, 40, 5]
    for index, count in enumerate(lengths):
        service.submit(f"r{index}", [*PROMPT, index], params(count, temperature=1.0, seed=index))
    got = collect(service, [f"r{index}" for index in range(len(lengths))])
    engine = tiny_engine()
    for index, count in enumerate(lengths):
        alone = engine.generate([[*PROMPT, index]], [params(count, temperature=1.0, seed=index)])[0]
        assert completion(got[f"r{index}"]) == alone
        assert len(alone.tokens) == count
    assert service.known() == set()


def test_a_cancelled_request_frees_its_slot_and_hurts_nobody(service):
    for index in range(4):
        service.submit(f"r{index}", [*PROMPT, index], params(100))
    wait_until(lambda: len(service.engine.core.scheduler.running) == 4)
    service.cancel(["r1", "r2", "never heard of"])
    wait_until(lambda: set(service.engine.core.scheduler.running) <= {"r0", "r3"})
    assert service.known() == {"r0", "r3"}
    got = collect(service, ["r0", "r3"])
    assert [len(e) for e in got.values()] == [100, 100]
    assert len(service.engine.core.scheduler.free) == 4


def test_half_a_character_does_not_count_as_the_first_text():
    """What makes it whole is worth a delivery at once, as any first text is."""
    service = Service(tiny_engine(), interval=1.0)
    told: list[bool] = []
    service.listen(told.append)
    service.submit("r", PROMPT, params(9))
    for text in ("", "", "\N{SNOWMAN}", "b"):  # the engine's thread, which is not started, played by hand
        service._deliver([TextEvent("r", text, 5)])
        service.take_all()
    assert told == [True, True, True, False]


def test_decoding_pauses_when_no_round_comes(service, monkeypatch):
    monkeypatch.setattr(service_module, "SILENCE_SECONDS", 0.0)  # a tiny engine makes 100 tokens in 50 ms
    service.submit("r0", PROMPT, params(100))
    wait_until(lambda: service.engine.core.scheduler.running.get("r0") is not None)
    time.sleep(0.3)
    made = len(service.engine.core.scheduler.running["r0"].output)
    time.sleep(0.3)
    assert len(service.engine.core.scheduler.running["r0"].output) == made < 100
    service.cancel(["r0"])  # the next round finds the client gone
    wait_until(lambda: service.engine.idle)


@pytest.mark.slow
def test_silence_of_our_own_making_loses_no_client(service, monkeypatch):
    """Something in the process kept all its threads from running, rounds included."""
    monkeypatch.setattr(service_module, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(service_module, "LOST_SECONDS", 0.5)
    service.submit("r0", PROMPT, params(50))
    wait_until(lambda: service.known() == {"r0"} and bool(service._mail["r0"].events))
    ctypes.PyDLL(None).sleep(1)  # a call that keeps Python's lock
    assert [len(events) for events in collect(service, ["r0"]).values()] == [50]


def test_an_engine_failure_is_reported(service, monkeypatch):
    def explode() -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(service.engine, "step", explode)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    service.submit("r0", PROMPT, params(3))
    wait_until(lambda: service.fatal is not None)
    assert str(service.fatal) == "boom"


def test_a_hung_engine_is_noticed(monkeypatch):
    service = Service(tiny_engine(), hung_after=0.05)
    assert service.failure() is None
    monkeypatch.setattr(service.engine, "step", lambda: time.sleep(60) or [])
    service.start()
    service.submit("r0", PROMPT, params(3))
    wait_until(lambda: service.failure() is not None)
    assert "more than 0.05 s" in service.failure()


def test_a_request_that_the_engine_lost_is_told(service):
    service.submit("r0", PROMPT, params(1000))
    wait_until(lambda: "r0" in service.engine.core.scheduler.running)
    service._inbox.append(lambda: service.engine.abort("r0"))  # behind the service's back
    assert collect(service, ["r0"])["r0"][-1].finish_reason == "error"
    service.submit("r1", PROMPT, params(3))
    assert len(collect(service, ["r1"])["r1"]) == 3
