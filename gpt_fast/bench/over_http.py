"""A running server as a target: streams over HTTP, decoded at the same time."""

from __future__ import annotations

import asyncio

from gpt_fast.bench.client import Answer, NativeApi, ask
from gpt_fast.bench.sample import Case, Description, Sample, Segment
from gpt_fast.measure.machine import CpuMeter, foreign_share, server_processes


class HttpTarget:
    """Posts to a server of this project. Its processes' CPU time counts as ours when it runs on this machine."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url, self.token = url, token
        self.meter = CpuMeter(server_processes(url))

    def describe(self) -> Description:
        return Description(facts={"url": self.url})

    def run(self, case: Case) -> Sample:
        """One segment a run: a chunk may hold more than one token, so single tokens cannot be told apart.

        The decode lasts from the first row's first chunk to the last row's last one.
        """
        before = self.meter.read()
        answers = asyncio.run(self._ask_all(case))
        foreign = foreign_share(before, self.meter.read())
        for answer in answers:
            if answer.error:
                raise RuntimeError(f"{self.url}: {answer.error}")
        firsts = [answer.arrivals[0].at for answer in answers]
        seconds = max(answer.arrivals[-1].at for answer in answers) - min(firsts)
        steps = case.new_tokens - 1
        segments = (Segment(steps * case.rows, steps, seconds, foreign),) if seconds > 0 else ()
        return Sample(case, max(firsts) - answers[0].started, segments, foreign)

    async def _ask_all(self, case: Case) -> list[Answer]:
        asked = (ask(self.url, NativeApi(), p, case.new_tokens, token=self.token) for p in case.prompts())
        return await asyncio.gather(*asked)
