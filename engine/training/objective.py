"""The objective of the paper (arXiv 2506.15742, section 3): rectified flow, in the conventions of `engine.sampling`.

t = 1 is noise, x_t = (1 - t) x + t eps, the model predicts v = eps - x. Times are logit-normal, their mean moved by
the resolution (appendix A.2): the same shift that the sampler uses, unless a training asks for another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.sampling import shift_mu

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, n, c), t (B,)) -> velocity (B, n, c) of the target tokens."""


def draw_times(count: int, target_tokens: int, generator: torch.Generator, mean: float | None = None) -> Tensor:
    """(count,) times in (0, 1): sigmoid of normals with deviation 1 and the mean given, or else mu(target tokens)."""
    mu = shift_mu(target_tokens) if mean is None else mean
    return torch.sigmoid(torch.randn(count, generator=generator) + mu)


def flow_loss(velocity: Velocity, x: Tensor, generator: torch.Generator, time_mean: float | None = None) -> Tensor:
    """Mean squared error of the velocity over a batch of packed latents `x` (B, n, c), at random times."""
    t = draw_times(x.shape[0], x.shape[1], generator, time_mean).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    mixed = (1 - t)[:, None, None] * x + t[:, None, None] * noise
    return (velocity(mixed, t).float() - (noise - x)).square().mean()
