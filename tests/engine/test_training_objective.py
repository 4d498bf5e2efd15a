"""The objective against what is known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.sampling import euler_step, schedule, shift_mu
from engine.training.objective import draw_times, flow_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("tokens", [64, 256, 4096])
def test_times_are_logit_normal_with_the_samplers_shift(tokens: int) -> None:
    """Quantile q of sigmoid(N(mu, 1)) is sigmoid(mu + z(q))."""
    times = draw_times(40_000, tokens, generator())
    for quantile, z in ((0.1, -1.28155), (0.5, 0.0), (0.9, 1.28155)):
        expected = 1 / (1 + math.exp(-(shift_mu(tokens) + z)))
        assert times.quantile(quantile).item() == pytest.approx(expected, abs=0.01)
    assert ((times > 0) & (times < 1)).all()


def test_a_training_may_ask_for_other_times() -> None:
    times = draw_times(40_001, 64, generator(), mean=1.1)
    assert times.median().item() == pytest.approx(1 / (1 + math.exp(-1.1)), abs=0.01)
    nothing = torch.zeros(4000, 1, 1)
    late, early = (flow_loss(lambda x, t: t[:, None, None] + 0 * x, nothing, generator(), mean) for mean in (0.0, 2.0))
    assert late < early  # the mean of (t - eps)^2 grows with t


def test_the_median_time_is_where_the_schedule_is_half_way() -> None:
    """The sampler maps t = 1/2 by the same shift that the training times have."""
    assert draw_times(40_001, 64, generator()).median().item() == pytest.approx(schedule(2, 64)[1], abs=0.01)


def test_the_true_velocity_has_no_loss() -> None:
    """Data that is one constant c: v = (x_t - c) / t everywhere, since x_t = (1 - t) c + t eps."""
    constant = 0.7

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - constant) / t[:, None, None]

    data = torch.full((8, 64, 4), constant)
    assert flow_loss(velocity, data, generator()).item() < 1e-8
    assert flow_loss(lambda x, t: -velocity(x, t), data, generator()).item() > 1  # noise - data, not data - noise


def test_predicting_nothing_costs_the_variance_of_noise_and_data() -> None:
    data = 0.5 * torch.randn(64, 64, 16, generator=generator(1))
    loss = flow_loss(lambda x, _: torch.zeros_like(x), data, generator(2))
    assert loss.item() == pytest.approx(1.25, abs=0.03)


def test_what_has_no_loss_samples_the_data() -> None:
    """Objective and sampler agree in sign and time: Euler steps with the true velocity end at the data."""
    constant, times = 0.7, schedule(4, 64)
    x = torch.randn(1, 64, 4, generator=generator(3))
    for t, t_next in pairwise(times):
        x = euler_step(x, (x - constant) / t, t, t_next)
    torch.testing.assert_close(x, torch.full_like(x, constant))


def test_the_same_generator_gives_the_same_loss() -> None:
    data = torch.randn(4, 64, 4, generator=generator(4))
    losses = [flow_loss(lambda x, t: x * t[:, None, None], data, generator(seed)).item() for seed in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]
