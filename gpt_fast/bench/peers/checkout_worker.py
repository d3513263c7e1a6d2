"""The process of another build (checkout.py): one engine, JSON lines in and out. The first line holds its options.

It runs as a file, with PYTHONPATH at the other checkout, so `gpt_fast` here is the other build's. Therefore it uses
only what every build has under the same name: Engine.load, add, step and abort, and SamplingParams. The loop is that of
gpt_fast/bench/engine_target.py, and so is what lies inside and outside of the timed stretches.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine may print is no answer
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if engine is None:
                engine, answer = load(request)
            else:
                answer = run(engine, **request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)


def load(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The engine, once it has made a token. The collector rests during imports, as in our own target's process."""
    gc.disable()
    import gpt_fast
    from gpt_fast import Engine

    gc.freeze()
    gc.enable()
    started = time.perf_counter()
    engine = Engine.load(**options)
    seconds = time.perf_counter() - started
    decode(engine, [[0]], new_tokens=1, temperature=0.0, segment_steps=1)
    return engine, {"load_seconds": seconds, "package": os.path.dirname(gpt_fast.__file__)}


def run(
    engine: Any, *, prompts: list[list[int]], new_tokens: int, temperature: float, segment_steps: int, **_: Any
) -> dict[str, Any]:
    return decode(engine, prompts, new_tokens=new_tokens, temperature=temperature, segment_steps=segment_steps)


def decode(
    engine: Any, prompts: list[list[int]], *, new_tokens: int, temperature: float, segment_steps: int
) -> dict[str, Any]:
    """Decode all prompts together.

    Returns:
        ttft: seconds to every row's first token. steps: (seconds, tokens) of each step from there to the first row's
        end. readings: see `reading`; before the prompts, at ttft, and after every `segment_steps` steps.
    """
    from gpt_fast.config import SamplingParams

    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, temperature=temperature)
    names = [f"bench-{index}" for index in range(len(prompts))]
    readings, steps = [reading()], []
    started = time.perf_counter()
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(name, prompt, params)
    waiting, running = set(names), True
    while waiting:
        for event in engine.step():
            waiting.discard(event.request_id)
            running = running and event.finish_reason is None
    ttft = time.perf_counter() - started
    readings.append(reading())
    while running:
        started = time.perf_counter()
        events = engine.step()
        steps.append((time.perf_counter() - started, len(events)))
        if len(steps) % segment_steps == 0:
            readings.append(reading())
        running = all(event.finish_reason is None for event in events)
    if 0 < len(steps) < segment_steps:
        readings.append(reading())
    for name in names:
        engine.abort(name)
    return {"ttft": ttft, "steps": steps, "readings": readings}


def reading() -> tuple[float, str, float]:
    """A clock, the CPU line of /proc/stat ("" where there is none), and this process's CPU seconds."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            line = file.readline()
    except OSError:
        line = ""
    return time.perf_counter(), line, time.process_time()


if __name__ == "__main__":
    main()
