"""OpenVINO GenAI (pip install openvino-genai), which reads GGUF itself."""

from __future__ import annotations

import time
from typing import Any

from gpt_fast.bench.peers import PeerOptions
from gpt_fast.bench.sample import Case, Description, Sample, Segment, Unavailable
from gpt_fast.measure.machine import CpuMeter, foreign_share

NAME = "openvino"


def load(options: PeerOptions) -> OpenVino:
    return OpenVino(options)


class OpenVino:
    """One row; times are its own figures (RawPerfMetrics). Its prefix cache is kept out by prompts that all differ."""

    def __init__(self, options: PeerOptions) -> None:
        gguf = options.need_gguf(NAME)
        try:
            import openvino
            import openvino_genai
        except ImportError:
            raise Unavailable(f"{NAME}: pip install openvino-genai") from None
        self.openvino, self.genai = openvino, openvino_genai
        started = time.perf_counter()
        self.pipeline: Any = openvino_genai.LLMPipeline(str(gguf), "CPU", INFERENCE_NUM_THREADS=options.threads)
        facts = {"openvino": openvino.get_version(), "gguf": gguf.name}
        self.description = Description(gguf.stat().st_size, options.kv_bytes(2), time.perf_counter() - started, facts)

    def describe(self) -> Description:
        return self.description

    def run(self, case: Case) -> Sample:
        if case.rows > 1:
            raise Unavailable(f"{NAME}: batches are not measured")
        import numpy

        ids = numpy.array(case.prompts(), dtype=numpy.int64)
        inputs = self.genai.TokenizedInputs(self.openvino.Tensor(ids), self.openvino.Tensor(numpy.ones_like(ids)))
        config = self.genai.GenerationConfig(max_new_tokens=case.new_tokens, ignore_eos=True, do_sample=False)
        meter = CpuMeter()
        before = meter.read()
        result = self.pipeline.generate(inputs, config)
        foreign = foreign_share(before, meter.read())
        return to_sample(case, result.perf_metrics, foreign)


def to_sample(case: Case, metrics: Any, foreign: float | None) -> Sample:
    """From a PerfMetrics: milliseconds there, seconds here."""
    tokens = metrics.get_num_generated_tokens()
    if tokens != case.new_tokens:
        raise RuntimeError(f"{NAME}: made {tokens} tokens (wanted {case.new_tokens})")
    steps = tokens - 1
    seconds = metrics.get_tpot().mean * steps / 1000
    return Sample(case, metrics.get_ttft().mean / 1000, (Segment(steps, steps, seconds, foreign),), foreign)
