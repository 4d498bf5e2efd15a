"""Muon (Jordan et al. 2024), scaled as in arXiv 2502.16982, at the precision that the machine is fast at.

`torch.optim.Muon` does the same, always in bfloat16. On a CPU without instructions for it that took 2.4 of the 3.3
seconds of a step of the shipped model; in float32 the whole step takes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""a X + b (X Xt) X + c (X Xt)^2 X drives every singular value of X to about 1: steep at 0, for few iterations."""
ITERATIONS = 5
LIKE_ADAMW = 0.2
"""Root mean square of an AdamW update, to which updates are scaled, so that both take the same learning rates."""


class Muon(torch.optim.Optimizer):
    """Steps matrices along their orthogonalised momentum (Nesterov's), with decoupled weight decay."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = self.state[matrix]["momentum_buffer"]
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalised(matrix.grad.lerp(momentum, MOMENTUM), self.dtype)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * LIKE_ADAMW * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Roughly U Vt of `matrix` = U S Vt (rows, columns): singular values end between 0.7 and 1.2. Newton-Schulz."""
    a, b, c = POLYNOMIAL
    x = matrix.to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
