"""The rectified flow, sampled with Euler steps.

Convention, said once: t = 1 is noise, t = 0 is data, x_t = (1 - t) data + t noise, velocity v = noise - data.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

BASE_TOKENS, BASE_MU = 256, 0.5
MAX_TOKENS, MAX_MU = 4096, 1.15


def shift_mu(target_tokens: int) -> float:
    """How far the schedule leans towards noise: linear in the number of target tokens (context is not counted)."""
    slope = (MAX_MU - BASE_MU) / (MAX_TOKENS - BASE_TOKENS)
    return BASE_MU + slope * (target_tokens - BASE_TOKENS)


def schedule(steps: int, target_tokens: int) -> list[float]:
    """`steps` + 1 times from exactly 1 down to exactly 0, moved towards noise by e^mu / (e^mu + 1/t - 1).

    That is arXiv 2506.15742, appendix A.2, with sigma = 1. In fp32 as both references compute it: the time embedding
    multiplies a last-bit difference by 1000.
    """
    t = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    e_mu = math.exp(shift_mu(target_tokens))
    return [*(e_mu / (e_mu + (1 / t - 1))).tolist(), 0.0]


def euler_step(x: Tensor, velocity: Tensor, t: float, t_next: float) -> Tensor:
    """x at `t_next` from x at `t`; fp32 whatever the velocity's dtype."""
    return x + (t_next - t) * velocity.float()


def guide(velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): away from the negative prompt's velocity by `scale`."""
    return negative + scale * (velocity - negative)
