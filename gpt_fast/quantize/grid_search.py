"""The int4 grid (scale and min) of each group that costs the least weighted squared error.

Shapes: N output features, K input features, G groups, E groupsize.

As llama.cpp's k-quants do: narrow the range from both ends, and after rounding solve for the scale and min that fit
the rounded values best, least squares in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.ops.rounding import nearest_int4, split_groups

KEPT = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of the group's least and largest weight that a candidate range spans
REFITS = 2


def fit_grid(weight_NK: Tensor, importance_K: Tensor, *, groupsize: int) -> tuple[Tensor, Tensor]:
    """scale_NG and min_NG (float16) with the least sum of importance * (w - w')^2 among the candidates.

    The range from least to largest weight is one of them, so a group that already is q * scale + min stays exact.
    """
    fit = GroupFit(weight_NK, importance_K, groupsize)
    low_NG = split_groups(weight_NK, groupsize, pad=torch.inf).amin(-1)
    high_NG = split_groups(weight_NK, groupsize, pad=-torch.inf).amax(-1)
    for keep_low in KEPT:
        for keep_high in KEPT:
            min_NG = (keep_low * low_NG).half().float()
            q_NGE = fit.consider((keep_high * high_NG - min_NG).clamp(min=0) / 15, min_NG)
            for _ in range(REFITS):
                q_NGE = fit.consider(*fit.least_squares(q_NGE))
    return fit.scale_NG, fit.min_NG


class GroupFit:
    """The best scale and min seen so far for every group."""

    def __init__(self, weight_NK: Tensor, importance_K: Tensor, groupsize: int) -> None:
        self.weight_NGE = split_groups(weight_NK, groupsize, pad=0.0)
        self.importance_GE = split_groups(importance_K[None], groupsize, pad=0.0)[0]  # none for the padding
        self.sum_G = self.importance_GE.sum(-1)
        self.sum_w_NG = (self.importance_GE * self.weight_NGE).sum(-1)
        shape, device = self.weight_NGE.shape[:2], weight_NK.device
        self.error_NG = torch.full(shape, torch.inf, device=device)
        self.scale_NG = torch.zeros(shape, dtype=torch.float16, device=device)
        self.min_NG = torch.zeros(shape, dtype=torch.float16, device=device)

    def consider(self, scale_NG: Tensor, min_NG: Tensor) -> Tensor:
        """Keep the candidate, as float16, where it beats the best so far; the weights rounded on its grid."""
        scale_NG, min_NG = scale_NG.half(), min_NG.half()
        scale_NG1, min_NG1 = scale_NG.float()[..., None], min_NG.float()[..., None]
        q_NGE = nearest_int4(self.weight_NGE, scale_NG1, min_NG1)
        error_NGE = self.weight_NGE - (q_NGE * scale_NG1 + min_NG1)
        error_NG = (self.importance_GE * error_NGE.square()).sum(-1)
        better = error_NG < self.error_NG
        self.error_NG = torch.where(better, error_NG, self.error_NG)
        self.scale_NG = torch.where(better, scale_NG, self.scale_NG)
        self.min_NG = torch.where(better, min_NG, self.min_NG)
        return q_NGE

    def least_squares(self, q_NGE: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and min that fit the weights best for these rounded values; never a negative scale."""
        weighted_NGE = self.importance_GE * q_NGE
        sum_q, sum_qq = weighted_NGE.sum(-1), (weighted_NGE * q_NGE).sum(-1)
        sum_qw = (weighted_NGE * self.weight_NGE).sum(-1)
        spread = self.sum_G * sum_qq - sum_q.square()  # 0 where all of a group's weights round alike
        scale_NG = torch.where(spread > 0, (self.sum_G * sum_qw - sum_q * self.sum_w_NG) / spread, 0).clamp(min=0)
        return scale_NG, (self.sum_w_NG - scale_NG * sum_q) / self.sum_G
