"""The objective against what is known in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.latents import unpack
from engine.sampling import euler_step, schedule, shift_mu
from engine.training.data import encode_all, stacked
from engine.training.objective import SCHEDULED, Objective, Velocity, draw_times, flow_loss, pixel_metric
from engine.training.products import Scene, render
from engine.weights import find_model, load_autoencoder
from tests.engine.conftest import SHIPPED


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
    late, early = (
        flow_loss(lambda x, t: t[:, None, None] + 0 * x, nothing, generator(), Objective(mean)) for mean in (0.0, 2.0)
    )
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


def test_a_model_for_few_steps_is_trained_at_the_times_that_it_will_see() -> None:
    times = draw_times(40_000, 64, generator(), for_steps=(2, 3))
    expected = [*schedule(2, 64)[:-1], *schedule(3, 64)[:-1]]
    for t in set(expected):
        share = (times == torch.tensor(t)).float().mean().item()
        assert share == pytest.approx(SCHEDULED * expected.count(t) / len(expected), abs=0.01)
    others = times[~torch.isin(times, torch.tensor(expected))]
    assert len(others) / len(times) == pytest.approx(1 - SCHEDULED, abs=0.01)


def test_a_row_that_cannot_be_guessed_does_not_outweigh_the_others() -> None:
    """Rows whose error is 100 times as large: 100 times the loss of squared errors, some 10 times that of the root."""
    velocity = constant_error(0.1), constant_error(1.0)
    data = torch.zeros(4, 64, 4)
    squared = [flow_loss(each, data, generator()).item() for each in velocity]
    assert squared == pytest.approx([0.01, 1.0], rel=1e-4)
    robust = [flow_loss(each, data, generator(), Objective(huber=0.01)).item() for each in velocity]
    assert robust[1] / robust[0] == pytest.approx(10, rel=0.15)
    nearly = flow_loss(velocity[0], data, generator(), Objective(huber=10.0)).item()
    assert nearly == pytest.approx(squared[0], rel=1e-3)  # far below the root's range: the squared error


def constant_error(size: float) -> Velocity:
    """The true velocity of data that are zero, x_t / t, and an error of `size` everywhere."""
    return lambda x, t: x / t[:, None, None] + size


@pytest.mark.parametrize("metric", [None, torch.eye(4)])
def test_the_loss_is_fp32_under_autocast(metric: Tensor | None) -> None:
    data = torch.zeros(2, 6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = flow_loss(constant_error(0.1), data, generator(), Objective(metric=metric, huber=0.3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2 * 0.3 * ((0.01 + 0.09) ** 0.5 - 0.3), rel=1e-4)


class OneChannel:
    """Decodes the first channel of the latents, and nothing of the others."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :1]


def test_the_pixel_metric_counts_what_the_decoder_shows() -> None:
    x = torch.randn(8, 6, 16, generator=generator(5))
    root = pixel_metric(OneChannel(), x, (2, 3), 1.0, generator(6))  # type: ignore[arg-type]
    gram = root @ root.T
    assert gram.trace().item() == pytest.approx(16, rel=1e-4)
    assert gram[:4, :4].trace().item() == pytest.approx(16, rel=1e-4)  # packed: channel, row, column
    half = pixel_metric(OneChannel(), x, (2, 3), 0.5, generator(6))  # type: ignore[arg-type]
    torch.testing.assert_close(half @ half.T, 0.5 * torch.eye(16) + 0.5 * gram, atol=1e-4, rtol=0)


def test_the_pixel_metric_of_the_shipped_autoencoder_tells_what_errors_cost() -> None:
    """Errors along its dearest and its cheapest directions, decoded: the pixels differ as it says."""
    autoencoder = load_autoencoder(find_model(SHIPPED), device=torch.device("cpu"))
    pictures = stacked(render(Scene("mug", colour)) for colour in ("red", "blue", "teal", "pink"))
    x = encode_all(autoencoder, pictures)
    many = x.repeat(16, 1, 1)  # of few random pixels the spread of the eigenvalues would be that of chance
    root = pixel_metric(autoencoder, many, (8, 8), 1.0, generator(7))
    values, vectors = torch.linalg.eigh(root @ root.T)

    def cost(directions: Tensor) -> float:
        error = 1e-3 * torch.randn(*x.shape[:2], directions.shape[1], generator=generator(8)) @ directions.T
        with torch.no_grad():
            moved, still = (autoencoder.decode(unpack(z, 8, 8)) for z in (x + error, x))
        return (moved - still).square().mean().item()

    measured = cost(vectors[:, -8:]) / cost(vectors[:, :8])
    assert measured > 5
    assert measured == pytest.approx((values[-8:].sum() / values[:8].sum()).item(), rel=0.3)
