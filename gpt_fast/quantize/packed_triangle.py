"""Half of a large symmetric matrix, and its Cholesky factor in the same place.

Shapes: M samples, K columns of the matrix, P rows of a panel, C columns of a square on the diagonal (the last: < P).

Llama 70B's widest linear has 28672 inputs: their Hessian takes 3.3 GB in float32, a copy for each step of a library's
factorization as much again. Panels of the upper triangle take 1.7 GB, and nothing else is ever as large.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 1024


class Triangle:
    """The upper triangle of a symmetric [K, K] matrix in float32, zeros at first; panel p holds [P, K - p * PANEL].

    Each panel begins with a whole square on the diagonal.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.columns = columns
        self.panels = [
            torch.zeros(min(PANEL, columns - first), columns - first, device=device)
            for first in range(0, columns, PANEL)
        ]

    def add_squares(self, x_MK: Tensor) -> None:
        """Add x^T x."""
        for first, panel in zip(range(0, self.columns, PANEL), self.panels, strict=True):
            panel.addmm_(x_MK[:, first : first + len(panel)].T, x_MK[:, first:])

    def diagonal(self) -> Tensor:
        return torch.cat([panel.diagonal() for panel in self.panels])

    def add_to_diagonal(self, value_K: Tensor) -> None:
        for panel, value in zip(self.panels, value_K.split(PANEL), strict=True):
            panel.diagonal().add_(value)

    def row_blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of the first row, [at most `size` rows, from the diagonal to the last column]), from the top down."""
        for first, panel in zip(range(0, self.columns, PANEL), self.panels, strict=True):
            for start in range(0, len(panel), size):
                yield first + start, panel[start : start + size, start:]

    def factor(self) -> bool:
        """Put upper R, R R^T = the matrix, in its place; or say False and leave the matrix, to within rounding.

        From the last column to the first, so that a row of R says how its input shares in those before it.
        """
        for p in reversed(range(len(self.panels))):
            square_CC = self._square(p)
            lower_CC, failed = torch.linalg.cholesky_ex(square_CC.flip(0, 1))
            if failed:
                self._multiply_back(p + 1)
                return False
            square_CC.copy_(lower_CC.flip(0, 1))
            above = torch.linalg.solve_triangular(square_CC.T, self._above(p), upper=False, left=False)
            self._set_above(p, above)
            self._add_product(above, alpha=-1)
        return True

    def _multiply_back(self, first: int) -> None:
        """Undo `factor` of the panels' columns from `first` on, the last one done first."""
        for p in range(first, len(self.panels)):
            above, square_CC = self._above(p), self._square(p)
            self._add_product(above, alpha=1)
            self._set_above(p, above @ square_CC.T)
            square_CC.copy_(square_CC @ square_CC.T)

    def _square(self, p: int) -> Tensor:
        return self.panels[p][:, : len(self.panels[p])]

    def _above(self, p: int) -> Tensor:
        """A copy of what stands above square p: [p * PANEL, C]."""
        parts = [self._columns(i, p) for i in range(p)]
        return torch.cat(parts) if parts else self.panels[p].new_empty(0, len(self.panels[p]))

    def _set_above(self, p: int, above: Tensor) -> None:
        for i, part in enumerate(above.split(PANEL)[:p]):
            self._columns(i, p).copy_(part)

    def _columns(self, i: int, p: int) -> Tensor:
        """Of panel i, the columns above square p."""
        start = (p - i) * PANEL
        return self.panels[i][:, start : start + len(self.panels[p])]

    def _add_product(self, above: Tensor, *, alpha: float) -> None:
        """Add alpha * above above^T to the columns before those that `above` came from."""
        for i, part_PC in enumerate(above.split(PANEL) if len(above) else ()):
            rest = above[i * PANEL :]
            self.panels[i][:, : len(rest)].addmm_(part_PC, rest.T, alpha=alpha)
