"""Acceptance at a chosen rate, whatever the models say: speed figures without real weights.

Every forward, draw and comparison of a verification is done as ever; only the verdict is replaced. The text is then
nobody's, so this is for timing and for nothing else.

Shapes: as in speculative/verify.py.
"""

from __future__ import annotations

from torch import Tensor

from gpt_fast.config import ConfigError
from gpt_fast.draft.measure import draft_runner
from gpt_fast.engine.core import EngineCore
from gpt_fast.speculative import verify as speculative
from gpt_fast.speculative.verify import ACCEPT, Draws, Verdict, leading


class ForcedAcceptance:
    """Takes the place of speculative.verify: each proposal stands with probability `rate`."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, p_BSV: Tensor, q_BKV: Tensor, draft_BK: Tensor, count_B: Tensor, draws: Draws) -> Verdict:
        found = speculative.verify(p_BSV, q_BKV, draft_BK, count_B, draws)  # its time is part of the figures
        accepted_B = leading(draws.uniform(ACCEPT, draft_BK.shape[1]) < self.rate, count_B)
        return Verdict(accepted_B, found.next_B)


def force_acceptance(core: EngineCore, rate: float) -> None:
    """From now on the core's draft is right at this rate in unseeded sampled requests (others are matched)."""
    if not 0 <= rate <= 1:
        raise ConfigError("synthetic_acceptance", "must be a share", got=rate, allowed="0..1")
    speculator = core.runner.speculator
    if speculator is None or draft_runner(speculator) is None:
        raise ConfigError("synthetic_acceptance", "needs a draft model: a lookup is matched, not verified")
    speculator.verify = ForcedAcceptance(rate)
