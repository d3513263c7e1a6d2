"""Our own engine from another checkout of this repository: what a change costs or brings, both builds taken in turn.

The other build runs in a process of its own in which `import gpt_fast` finds the other checkout (checkout_worker.py).
It is given the options of `--engine` and the same token ids, and times itself as ours is timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt_fast.bench.peers import PeerOptions
from gpt_fast.bench.recorder import SEGMENT_STEPS, sample_of
from gpt_fast.bench.sample import Case, Description, Sample, Unavailable
from gpt_fast.measure.machine import Reading, busy_of, commit, peak_rss_bytes

NAME = "build"
WORKER = Path(__file__).with_name("checkout_worker.py")


def load(options: PeerOptions) -> OtherBuild:
    return OtherBuild(options.need_path(NAME).resolve(), options.engine)


class OtherBuild:
    """RuntimeError with the other build's own message where its engine refuses the options or a case."""

    def __init__(self, checkout: Path, engine_options: dict[str, Any]) -> None:
        if not (checkout / "gpt_fast" / "__init__.py").is_file():
            raise Unavailable(f"{NAME}: no gpt_fast package in {checkout}: git worktree add FOLDER COMMIT")
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            env=os.environ | {"PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            loaded = self._ask(engine_options)
            if Path(loaded["package"]).parent != checkout:
                raise RuntimeError(f"{NAME}: gpt_fast came from {loaded['package']} (wanted {checkout})")
        except BaseException:
            self.close()
            raise
        self.seconds_to_first_token = time.perf_counter() - started
        self.description = Description(load_seconds=loaded["load_seconds"], facts={"commit": commit(checkout)})

    def describe(self) -> Description:
        """Without bytes a step: where an engine says them is not the same in every build."""
        return self.description

    def run(self, case: Case) -> Sample:
        timed = self._ask({"prompts": case.prompts(), "segment_steps": SEGMENT_STEPS, **asdict(case)})
        readings = [Reading(wall, busy_of(line), own) for wall, line, own in timed["readings"]]
        return sample_of(case, timed["ttft"], timed["steps"], readings)

    def start_seconds(self) -> float:
        """From before its process existed to its first token."""
        return self.seconds_to_first_token

    def peak_rss(self) -> int | None:
        return peak_rss_bytes(self.process.pid)

    def close(self) -> None:
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> Any:
        """One line to the worker, one back. The worker ends when its standard input does, so with this process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: so has its output
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{NAME}: its process ended with code {self.process.wait()}")
        told = json.loads(answer)
        if "error" in told:
            raise RuntimeError(f"{NAME}: {told['error']}")
        return told
