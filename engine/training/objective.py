"""The objective of the paper (arXiv 2506.15742, section 3): rectified flow, in the conventions of `engine.sampling`.

t = 1 is noise, x_t = (1 - t) x + t eps, the model predicts v = eps - x. Times are logit-normal, their mean moved by
the resolution (appendix A.2): the same shift that the sampler uses, unless a training asks for another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.autoencoder import Autoencoder
from engine.latents import unpack
from engine.sampling import schedule, shift_mu

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, n, c), t (B,)) -> velocity (B, n, c) of the target tokens."""


@dataclass(frozen=True, slots=True)
class Objective:
    """How a training departs from the paper's objective; as it stands, not at all."""

    time_mean: float | None = None
    """Of the logit-normal times; None takes mu(target tokens), the sampler's shift."""
    for_steps: tuple[int, ...] = ()
    """Numbers of denoise steps that the model is for: `SCHEDULED` of the times are those of their schedules."""
    metric: Tensor | None = None
    """(c, c), as from `pixel_metric`: what an error in each direction of the latents counts."""
    huber: float | None = None
    """Root of the mean squared error above which a row counts by its root instead (pseudo-Huber, arXiv 2405.20320), so
    that rows which cannot be guessed do not outweigh all others."""


PAPER = Objective()
SCHEDULED = 0.75
MEASURED_TOKENS = 1024
"""Of the pictures that are decoded at once for `pixel_metric`: one of a megapixel is 4,096, and is decoded alone."""


def draw_times(
    count: int, target_tokens: int, generator: torch.Generator, mean: float | None = None, for_steps: Sequence[int] = ()
) -> Tensor:
    """(count,) times in (0, 1]: sigmoid of normals with deviation 1 and the mean given, or else mu(target tokens)."""
    mu = shift_mu(target_tokens) if mean is None else mean
    times = torch.sigmoid(torch.randn(count, generator=generator) + mu)
    if not for_steps:
        return times
    scheduled = torch.tensor([t for steps in for_steps for t in schedule(steps, target_tokens)[:-1]])
    chosen = scheduled[torch.randint(len(scheduled), (count,), generator=generator)]
    return torch.where(torch.rand(count, generator=generator) < SCHEDULED, chosen, times)


def flow_loss(velocity: Velocity, x: Tensor, generator: torch.Generator, objective: Objective = PAPER) -> Tensor:
    """Mean squared error of the velocity over a batch of packed latents `x` (B, n, c), at random times."""
    t = draw_times(x.shape[0], x.shape[1], generator, objective.time_mean, objective.for_steps).to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    mixed = (1 - t)[:, None, None] * x + t[:, None, None] * noise
    error = velocity(mixed, t).float() - (noise - x)
    if objective.metric is not None:
        with torch.autocast(x.device.type, enabled=False):  # it would make the loss bfloat16
            error = error @ objective.metric
    of_rows = error.square().mean(dim=(1, 2))
    if objective.huber is not None:
        c = objective.huber
        of_rows = 2 * c * ((of_rows + c**2).sqrt() - c)
    return of_rows.mean()


def pixel_metric(
    autoencoder: Autoencoder, x: Tensor, grid: tuple[int, int], share: float, generator: torch.Generator
) -> Tensor:
    """Root (c, c) of (1 - share) I + share G, G the mean over packed latents `x` (B, n, c) of the decoder's J^T J.

    What an error of latents costs in pixels differs much by its direction: for the shipped autoencoder an eighth of
    the directions makes 43 % of it. G is scaled to a mean eigenvalue of 1. Estimated from J^T w of random pixels w.
    """
    channels = x.shape[-1]
    gram = torch.zeros(channels, channels, dtype=torch.float64)
    for part in torch.split(x, max(1, MEASURED_TOKENS // x.shape[1])):
        tokens = part.detach().requires_grad_(True)
        pixels = autoencoder.decode(unpack(tokens, *grid))
        noise = torch.randn(pixels.shape, generator=generator).to(pixels.device)
        (found,) = torch.autograd.grad((pixels * noise).sum(), tokens)
        rows = found.reshape(-1, channels).cpu().double()
        gram += rows.T @ rows
    gram *= channels / gram.trace()
    mixed = (1 - share) * torch.eye(channels, dtype=torch.float64) + share * gram
    values, vectors = torch.linalg.eigh(mixed)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root.to(x)
