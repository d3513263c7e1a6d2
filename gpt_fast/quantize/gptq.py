"""GPTQ (Frantar et al., arXiv:2210.17323) for one linear layer, in plain PyTorch.

Shapes: M calibration tokens, N output features, K input features, G groups of input features.

Columns are rounded one after another; what rounding a column changed in the layer's output is made up for in the
columns still to come, by way of the inverse Hessian of the layer's squared output error, H = X^T X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt_fast.ops.int4 import pack_nibbles
from gpt_fast.quantize.rtn import check_finite, check_float16_range, int4_grid, nearest_int4
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
    columns = weight_NK.shape[1]
    order_K = torch.arange(columns, device=weight_NK.device)
    if act_order:
        order_K = hessian_KK.diagonal().argsort(descending=True, stable=True)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K], percdamp=percdamp, name=name)
    scale_NG, min_NG = int4_grid(weight_NK, groupsize=groupsize)
    work_NK, q_NK = weight_NK[:, order_K], torch.empty_like(weight_NK)
    blocksize = -(-blocksize // groupsize) * groupsize
    for start in range(0, columns, blocksize):
        block = slice(start, min(start + blocksize, columns))
        work_NC, factor_CC = work_NK[:, block], factor_KK[block, block]
        error_NC = torch.empty_like(work_NC)
        for i, column in enumerate(order_K[block].tolist()):
            group = column // groupsize
            if not act_order and column % groupsize == 0:
                ahead_NE = work_NC[:, i : i + groupsize]
                scale_NG[:, group : group + 1], min_NG[:, group : group + 1] = int4_grid(ahead_NE, groupsize=groupsize)
            scale_N, min_N = scale_NG[:, group].float(), min_NG[:, group].float()
            q_NK[:, column] = nearest_int4(work_NC[:, i], scale_N, min_N)
            error_N = (work_NC[:, i] - (q_NK[:, column] * scale_N + min_N)) / factor_CC[i, i]
            work_NC[:, i:] -= error_N[:, None] * factor_CC[i, i:]
            error_NC[:, i] = error_N
        work_NK[:, block.stop :] -= error_NC @ factor_KK[block, block.stop :]
    return {"weight": pack_nibbles(q_NK.to(torch.uint8)), "scale": scale_NG, "min": min_NG}


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
