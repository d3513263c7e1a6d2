"""A build of llama.cpp or of its fork, measured by its own tools: llama-bench, and llama-batched-bench for batches.

They feed token ids of their own, which a dense model's speed does not depend on, do no sampling, and start anew for
each run, so a run's CPU load and memory are those of the whole tool, loading included.
"""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_fast.bench.sample import Case, Description, Sample, Segment, Unavailable
from gpt_fast.measure.machine import CpuMeter, foreign_share


@dataclass(frozen=True)
class Dialect:
    """What the forks spell differently.

    decode: llama-bench's options for `{new}` tokens after `{prompt}` cached ones. bench, batched: options of every
    llama-bench and every llama-batched-bench.
    """

    name: str
    decode: tuple[str, ...]
    bench: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()


class LlamaBuild:
    def __init__(self, dialect: Dialect, *, folder: Path, gguf: Path, threads: int, kv_bytes: int | None) -> None:
        self.dialect, self.folder, self.gguf, self.threads, self.kv_bytes = dialect, folder, gguf, threads, kv_bytes
        if not (folder / "llama-bench").is_file():
            raise Unavailable(
                f"{dialect.name}: no llama-bench in {folder}: build it (cmake --build . --target "
                "llama-bench llama-batched-bench) and give the folder it lies in"
            )
        self.first = self._bench("-p", "1", "-n", "0")  # reads the file into the page cache, too

    def describe(self) -> Description:
        known = ("build_commit", "build_number", "model_type", "cpu_info", "type_k", "flash_attn")
        facts = {key: self.first[key] for key in known if key in self.first}
        # Not its model_size, which counts a head that shares the embedding's weights twice.
        return Description(self.gguf.stat().st_size, self.kv_bytes, None, {**facts, "gguf": self.gguf.name})

    def run(self, case: Case) -> Sample:
        """TTFT is the time of the prompt's forward; one segment a run."""
        if case.rows > 1:
            return self._run_batch(case)
        meter = CpuMeter()
        readings = [meter.read()]
        prompt = self._bench("-p", str(case.prompt_len), "-n", "0")
        readings.append(meter.read())
        values = {"prompt": case.prompt_len, "new": case.new_tokens}
        decode = self._bench(*(option.format(**values) for option in self.dialect.decode))
        readings.append(meter.read())
        seconds = decode["samples_ns"][0] / 1e9
        segment = Segment(case.new_tokens, case.new_tokens, seconds, foreign_share(*readings[1:]))
        return Sample(case, prompt["samples_ns"][0] / 1e9, (segment,), foreign_share(*readings[:2]))

    def peak_rss(self) -> int:
        """Of the largest run."""
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024

    def _run_batch(self, case: Case) -> Sample:
        meter = CpuMeter()
        before = meter.read()
        context = case.rows * (case.prompt_len + case.new_tokens)
        sizes = f"-c {context} -npp {case.prompt_len} -ntg {case.new_tokens} -npl {case.rows} -tb {self.threads}"
        output = self._tool("llama-batched-bench", *sizes.split(), *self.dialect.batched)
        foreign = foreign_share(before, meter.read())
        prefill, decode = parse_batched_bench(output, case)
        segment = Segment(case.rows * case.new_tokens, case.new_tokens, decode, foreign)
        return Sample(case, prefill, (segment,), foreign)

    def _bench(self, *arguments: str) -> dict[str, Any]:
        return parse_llama_bench(self._tool("llama-bench", "-r", "1", "-o", "json", *self.dialect.bench, *arguments))

    def _tool(self, name: str, *arguments: str) -> str:
        """stdout and, for the fork that reports there, stderr."""
        command = [str(self.folder / name), "-m", str(self.gguf), "-t", str(self.threads), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{name} ended with {done.returncode}: {last}")
        return done.stdout if name == "llama-bench" else done.stdout + done.stderr


def parse_llama_bench(output: str) -> dict[str, Any]:
    """The one test in `llama-bench -o json`; other lines may stand around the JSON. ValueError when there is none."""
    start, end = output.find("["), output.rfind("]")
    tests = json.loads(output[start : end + 1]) if 0 <= start < end else []
    if len(tests) != 1 or not tests[0].get("samples_ns"):
        raise ValueError(f"llama-bench: expected one test (got {output[:200]!r})")
    test: dict[str, Any] = tests[0]
    return test


def parse_batched_bench(output: str, case: Case) -> tuple[float, float]:
    """Seconds of prefill and of decode, from the table's row for this case. ValueError when it has none."""
    wanted = [str(case.prompt_len), str(case.new_tokens), str(case.rows)]
    rows: Sequence[list[str]] = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    for row in rows:
        if len(row) == 10 and row[:3] == wanted:
            return float(row[4]), float(row[6])
    raise ValueError(f"llama-batched-bench: no row for {wanted} (got {output[-200:]!r})")
