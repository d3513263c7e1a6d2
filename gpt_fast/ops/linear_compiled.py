"""nn.Linear as torch.compile runs it best on a CPU.

For one token PyTorch's own matrix product does not reach half of what memory gives, and each call waits for its
threads. Written as products and a sum, the compiler makes one vectorized pass of it, together with what stands before
and after it: a layer becomes two regions instead of ten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneTokenLinear(nn.Module):
    """y = x W^T + b, like nn.Linear, which is its twin; for one token in compiled code the sums are in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and x.numel() == x.shape[-1]):
            return F.linear(x, self.weight, self.bias)
        y_N = (self.weight.float() * x.float().view(-1)).sum(-1)
        y_N = y_N if self.bias is None else y_N + self.bias.float()
        return y_N.to(x.dtype).view(*x.shape[:-1], -1)


def for_one_token(model: nn.Module) -> None:
    """Replace the model's linear layers, in place; their weights stay the same tensors."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, OneTokenLinear(child))
