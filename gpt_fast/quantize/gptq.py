"""GPTQ (Frantar et al., arXiv:2210.17323) for one linear layer, in plain PyTorch.

Shapes: M calibration tokens, N output features (of a band of rows), K input features, G groups of input features, E
groupsize, C columns of a block.

Columns are rounded one after another; what rounding a column changed in the layer's output is made up for in the
columns still to come. With H = X^T X the Hessian of the layer's squared output error and H = R R^T, R upper, a column j
is rounded not at its weight w_j but at

    w_j + (sum over earlier columns i of (w_i - w'_i) R_ij) / R_jj

which is the paper's update written with the factor of H instead of its inverse's (U = R^-1, and its errors are
(W - W') R): Babai's nearest plane (arXiv:2507.18553). So no inverse is made and half a square is all that is held.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpt_fast.ops.int4 import pack_nibbles
from gpt_fast.ops.rounding import nearest_int4
from gpt_fast.quantize.grid_search import fit_grid
from gpt_fast.quantize.packed_triangle import Triangle
from gpt_fast.quantize.rtn import check_finite, check_float16_range
from gpt_fast.quantize.scheme import QuantizationError, Scheme

DAMPING_STEPS = 6
ELEMENTS_AT_ONCE = 1 << 26  # of a weight that are rounded together: 256 MiB in float32
# Of those whose grid is searched together: as much as a core's cache holds, or as keeps a GPU busy.
ELEMENTS_FITTED_AT_ONCE = {"cpu": 1 << 17, "cuda": 1 << 22}


class InputSizes:
    """Sums of the squares of a layer's inputs: by them columns are ordered."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum_K = torch.zeros(columns, device=device)

    def add(self, x: Tensor) -> None:
        self.sum_K += x.reshape(-1, x.shape[-1]).float().square().sum(0)

    def order(self) -> Tensor:
        """The largest first."""
        return self.sum_K.argsort(descending=True, stable=True)


class Hessian:
    """X^T X of a layer's inputs, gathered batch by batch in float32, columns in `order_K` (None: their own)."""

    def __init__(self, columns: int, device: torch.device, order_K: Tensor | None = None) -> None:
        self.sum_KK = Triangle(columns, device)
        self.order_K = order_K
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x_MK = x.reshape(-1, x.shape[-1]).float()
        self.sum_KK.add_squares(x_MK if self.order_K is None else x_MK[:, self.order_K])
        self.tokens += len(x_MK)


class Factor(NamedTuple):
    """R of the damped Hessian, R R^T, and the order of its columns (None: the weight's own)."""

    upper_KK: Triangle
    order_K: Tensor | None


def damped_factor(hessian: Hessian, *, percdamp: float, name: str) -> Factor:
    """The factor of the Hessian, in whose place it is made. Inputs that never fired count as independent.

    Args:
        percdamp: share of the Hessian's mean diagonal added to it; ten times more each time it has no Cholesky
            factor.
    """
    matrix = hessian.sum_KK
    diagonal_K = matrix.diagonal()
    check_finite(diagonal_K[:, None], name=f"{name}: the Hessian of its inputs")
    silent_K = (diagonal_K == 0).float()
    matrix.add_to_diagonal(silent_K)
    mean = float((diagonal_K + silent_K).mean())
    damping, added = percdamp * mean, 0.0
    for _ in range(DAMPING_STEPS):
        matrix.add_to_diagonal(torch.full_like(diagonal_K, damping - added))
        if matrix.factor():
            return Factor(matrix, hessian.order_K)
        damping, added = 10 * damping or 1e-3 * mean, damping
    raise QuantizationError(
        f"{name}: the Hessian of its inputs has no Cholesky factor even with damping {added:.3g}; "
        "raise --percdamp or calibrate on more text"
    )


def gptq_int4(
    weight_NK: Tensor, factor: Factor, *, groupsize: int, blocksize: int, device: torch.device, name: str
) -> dict[str, Tensor]:
    """The stored int4 tensors, on the CPU, of `weight_NK` that best keep the layer's output on the calibration inputs.

    Where the factor's columns are in an order of their own, groups keep their places: their grids are then fixed
    before the first column, and no column index has to be stored.

    Args:
        weight_NK: any float dtype, anywhere (a mapped file); rows are taken to `device` a band at a time.
        blocksize: columns between updates of the whole rest of the matrix (rounded up to whole groups); changes
            speed, not the result.
    """
    rows, columns = weight_NK.shape
    blocksize = -(-blocksize // groupsize) * groupsize
    specs = Scheme(4, groupsize).tensors(rows, columns)
    parts = {part: torch.empty(shape, dtype=dtype) for part, (dtype, shape) in specs.items()}
    band = max(1, ELEMENTS_AT_ONCE // columns)
    for first in range(0, rows, band):
        band_NK = weight_NK[first : first + band].to(device)
        rounding = Rounding(band_NK, factor, groupsize, name=name, first_row=first)
        for start, factor_CK in factor.upper_KK.row_blocks(blocksize):
            rounding.round_block(start, factor_CK)
        for part, tensor in rounding.parts().items():
            parts[part][first : first + band] = tensor.cpu()
    return parts


class Rounding:
    """A band of a weight on its way from float to int4. What goes column by column has columns first."""

    def __init__(self, weight_NK: Tensor, factor: Factor, groupsize: int, *, name: str, first_row: int) -> None:
        rows, columns = weight_NK.shape
        self.weight_NK, self.groupsize = weight_NK, groupsize
        self.refit = factor.order_K is None
        self.order_K = torch.arange(columns, device=weight_NK.device) if factor.order_K is None else factor.order_K
        # What an error in a column costs after the columns behind it have made up for it as well as they can.
        self.cost_K = torch.empty(columns, device=weight_NK.device)
        self.cost_K[self.order_K] = factor.upper_KK.diagonal().square()
        self.scale_GN, self.min_GN = fit_rows(weight_NK, self.cost_K, groupsize, name=name, first_row=first_row)
        self.q_NK = torch.empty(rows, columns, dtype=torch.uint8, device=weight_NK.device)
        self.feedback_KN = torch.zeros(columns, rows, device=weight_NK.device)  # sums of (w - w') R, in order_K

    def round_block(self, first: int, factor_CK: Tensor) -> None:
        """Round the columns of R's rows `factor_CK` one by one, then tell those behind them about all their errors."""
        count = len(factor_CK)
        order_C = self.order_K[first : first + count]
        weight_CN = self.weight_NK[:, order_C].float().T.contiguous()
        feedback_CN = self.feedback_KN[first : first + count]
        step_C = factor_CK.diagonal().reciprocal()
        q_CN, error_CN = torch.empty_like(weight_CN), torch.empty_like(weight_CN)
        for i, (column, step) in enumerate(zip(order_C.tolist(), step_C.tolist(), strict=True)):
            group = column // self.groupsize
            if self.refit and column % self.groupsize == 0:
                part = slice(i, i + self.groupsize)
                # What the group's weights would be now if each could still become any number.
                change_EN = torch.linalg.solve_triangular(factor_CK[part, part].T, feedback_CN[part], upper=False)
                self.refit_group(group, weight_CN[part] + change_EN)
            scale_N, min_N = self.scale_GN[group], self.min_GN[group]
            q_CN[i] = nearest_int4(torch.add(weight_CN[i], feedback_CN[i], alpha=step), scale_N, min_N)
            error_CN[i] = weight_CN[i] - (q_CN[i] * scale_N + min_N)
            feedback_CN[i + 1 :].addr_(factor_CK[i, i + 1 : count], error_CN[i])
        self.q_NK[:, order_C] = q_CN.T.to(torch.uint8)
        self.feedback_KN[first + count :].addmm_(factor_CK[:, count:].T, error_CN)

    def refit_group(self, group: int, weight_EN: Tensor) -> None:
        """A grid for the group's weights as they have become, columns in their own order."""
        cost_E = self.cost_K[group * self.groupsize :][: len(weight_EN)]
        scale_N1, min_N1 = fit_grid(weight_EN.T, cost_E, groupsize=self.groupsize)
        self.scale_GN[group], self.min_GN[group] = scale_N1[:, 0], min_N1[:, 0]

    def parts(self) -> dict[str, Tensor]:
        return {"weight": pack_nibbles(self.q_NK), "scale": self.scale_GN.T.half(), "min": self.min_GN.T.half()}


def fit_rows(weight_NK: Tensor, cost_K: Tensor, groupsize: int, *, name: str, first_row: int) -> tuple[Tensor, Tensor]:
    """fit_grid, some rows at a time, after they were checked: scale_GN and min_GN, float16's values in float32."""
    grids = []
    rows = max(1, ELEMENTS_FITTED_AT_ONCE[weight_NK.device.type] // weight_NK.shape[1])
    for first, part_NK in zip(range(0, len(weight_NK), rows), weight_NK.split(rows), strict=True):
        part_NK = part_NK.float()
        check_finite(part_NK, name=name, first_row=first_row + first)
        check_float16_range(part_NK, name=name, first_row=first_row + first)
        grids.append(fit_grid(part_NK, cost_K, groupsize=groupsize))
    scale_NG, min_NG = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return scale_NG.float().T.contiguous(), min_NG.float().T.contiguous()
