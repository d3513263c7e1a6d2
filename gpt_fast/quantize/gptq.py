"""GPTQ (Frantar et al., arXiv:2210.17323) for one linear layer, in plain PyTorch.

Shapes: M calibration tokens, N output features, K input features, G groups of input features.

Columns are rounded one after another; what rounding a column changed in the layer's output is made up for in the
columns still to come, by way of the inverse Hessian of the layer's squared output error, H = X^T X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.ops.int4 import pack_nibbles
from gpt_fast.quantize.grid import fit_grid
from gpt_fast.quantize.rtn import check_finite, check_float16_range, nearest_int4
from gpt_fast.quantize.scheme import QuantizationError

DAMPING_STEPS = 6


class Hessian:
    """X^T X of a layer's inputs, gathered batch by batch in float32."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum_KK = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x_MK = x.reshape(-1, x.shape[-1]).float()
        self.sum_KK.addmm_(x_MK.T, x_MK)
        self.tokens += len(x_MK)


def gptq_int4(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    *,
    groupsize: int,
    percdamp: float,
    blocksize: int,
    act_order: bool,
    name: str,
) -> dict[str, Tensor]:
    """The stored int4 tensors of `weight_NK` that best keep the layer's output on the calibration inputs.

    Args:
        percdamp: share of the Hessian's mean diagonal added to it; ten times more each time it has no Cholesky
            factor.
        blocksize: columns between updates of the whole rest of the matrix (rounded up to whole groups); changes
            speed, not the result.
        act_order: round the columns with the largest inputs first. Groups keep their places: their grids are then
            fixed before the first column, and no column index has to be stored.
    """
    weight_NK = weight_NK.float()
    check_finite(weight_NK, name=name)
    check_float16_range(weight_NK, name=name)
    check_finite(hessian_KK, name=f"{name}: the Hessian of its inputs")
    order_K = torch.arange(len(hessian_KK), device=weight_NK.device)
    if act_order:
        order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K], percdamp=percdamp, name=name)
    rounding = Rounding(weight_NK, factor_KK, order_K, groupsize, refit=not act_order)
    blocksize = -(-blocksize // groupsize) * groupsize
    for start in range(0, len(order_K), blocksize):
        rounding.round_block(slice(start, start + blocksize))
    weight = pack_nibbles(rounding.q_NK.to(torch.uint8))
    return {"weight": weight, "scale": rounding.scale_NG, "min": rounding.min_NG}


class Rounding:
    """A weight on its way from float to int4: `work_NK` is in the order of rounding, the rest in the weight's own."""

    def __init__(self, weight_NK: Tensor, factor_KK: Tensor, order_K: Tensor, groupsize: int, *, refit: bool) -> None:
        self.order_K, self.groupsize, self.refit = order_K, groupsize, refit
        self.factor_KK = factor_KK
        self.work_NK = weight_NK[:, order_K]
        self.q_NK = torch.empty_like(weight_NK)
        # What an error in a column costs after the columns behind it have made up for it as well as they can.
        self.cost_K = torch.empty_like(factor_KK[0])
        self.cost_K[order_K] = factor_KK.diagonal() ** -2
        self.scale_NG, self.min_NG = fit_grid(weight_NK, self.cost_K, groupsize=groupsize)

    def round_block(self, block: slice) -> None:
        """Round the block's columns one by one, then let the columns behind the block make up for all of them."""
        work_NC, factor_CC = self.work_NK[:, block], self.factor_KK[block, block]
        error_NC = torch.empty_like(work_NC)
        for i, column in enumerate(self.order_K[block].tolist()):
            group = column // self.groupsize
            if self.refit and column % self.groupsize == 0:
                self.refit_group(group, work_NC[:, i : i + self.groupsize])
            scale_N, min_N = self.scale_NG[:, group].float(), self.min_NG[:, group].float()
            q_N = nearest_int4(work_NC[:, i], scale_N, min_N)
            error_N = (work_NC[:, i] - (q_N * scale_N + min_N)) / factor_CC[i, i]
            work_NC[:, i:] -= error_N[:, None] * factor_CC[i, i:]
            self.q_NK[:, column], error_NC[:, i] = q_N, error_N
        self.work_NK[:, block.stop :] -= error_NC @ self.factor_KK[block, block.stop :]

    def refit_group(self, group: int, weight_NE: Tensor) -> None:
        """A grid for the group's weights as they have become, columns in their own order."""
        cost_E = self.cost_K[group * self.groupsize :][: weight_NE.shape[1]]
        scale_N1, min_N1 = fit_grid(weight_NE, cost_E, groupsize=self.groupsize)
        self.scale_NG[:, group], self.min_NG[:, group] = scale_N1[:, 0], min_N1[:, 0]


def inverse_factor(hessian_KK: Tensor, *, percdamp: float, name: str) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse. Inputs that never fired count as independent."""
    hessian_KK = hessian_KK.clone()
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1
    damping = percdamp * float(diagonal_K.mean())
    for _ in range(DAMPING_STEPS):
        factor_KK = damped_inverse_factor(hessian_KK, damping)
        if factor_KK is not None:
            return factor_KK
        damping = 10 * damping or 1e-3 * float(diagonal_K.mean())
    raise QuantizationError(
        f"{name}: the Hessian of its inputs has no Cholesky factor even with damping {damping / 10:.3g}; "
        "raise --percdamp or calibrate on more text"
    )


def damped_inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor | None:
    eye_KK = torch.eye(len(hessian_KK), device=hessian_KK.device)
    lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK + damping * eye_KK)
    if failed:
        return None
    upper_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
    return None if failed or not upper_KK.isfinite().all() else upper_KK
