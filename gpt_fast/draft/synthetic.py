"""Acceptance at a chosen rate, whatever the models say: speed figures without real weights.

Every forward, draw and comparison of a verification is done as ever; only its outcome is replaced. The text is then
nobody's, so this is for timing and for nothing else.

Shapes: as in speculative/verify.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.config import ConfigError
from gpt_fast.draft.runs import draft_runner
from gpt_fast.engine.core import EngineCore
from gpt_fast.engine.fixed_choice import speculator_of
from gpt_fast.sampling import SamplingTensors, on_device
from gpt_fast.speculative.accept import accept_at_once
from gpt_fast.speculative.speculator import Speculator
from gpt_fast.speculative.verify import ACCEPT, Accepted, Draws, Proposal, leading


class ForcedSpeculator(Speculator):
    """A Speculator whose draft's proposals are each accepted with probability `rate`."""

    rate = 1.0

    def accept(
        self,
        logits_BSV: Tensor,
        params: SamplingTensors | None,
        proposal: Proposal,
        draws: Draws,
        best_BS: Tensor | None,
    ) -> Accepted:
        if proposal.q_BKV is None or proposal.matched_B is None or params is None:
            return super().accept(logits_BSV, params, proposal, draws, best_BS)
        found = accept_at_once(logits_BSV, params, proposal, draws)  # its time is part of the figures
        count_B = on_device(proposal.counts, logits_BSV.device)
        forced_B = leading(draws.uniform(ACCEPT, proposal.draft_BK.shape[1]) < self.rate, count_B)
        return Accepted(torch.where(proposal.matched_B, found.accepted_B, forced_B), found.next_B)


def force_acceptance(core: EngineCore, rate: float) -> None:
    """From now on the core's draft is right at this rate in unseeded sampled requests (others are matched)."""
    if not 0 <= rate <= 1:
        raise ConfigError("synthetic_acceptance", "must be a share", got=rate, allowed="0..1")
    loaded = speculator_of(core)
    if loaded is None or draft_runner(core) is None:
        raise ConfigError("synthetic_acceptance", "needs a draft model: a lookup is matched, not verified")
    forced = ForcedSpeculator(loaded.proposers, loaded.controller, max_seq_len=loaded.max_seq_len)
    forced.rate = rate
    core.speculate_with(forced)
