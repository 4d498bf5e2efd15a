"""Approximate sampling: what it leaves out, row by row, and how far its results are from the exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.batching import Batch, Row
from engine.errors import ConfigError
from engine.modes import Mode
from engine.packed import Condition, Place, velocities
from engine.pipeline import Approximation, EditRequest, KontextEngine
from engine.reuse import MOST_LEFT_OUT, ContextMemory, Velocities
from engine.sampling import schedule
from kontext_batch.registry import shipped_folder
from tests.engine.test_packed import cases, model
from tests.engine.tiny import picture, worst

STEPS = 20


class Smooth:
    """A forward pass whose velocity is a function of t alone; remembers the steps it was asked for."""

    def __init__(self, velocity: Callable[[float], float], times: Sequence[float]) -> None:
        self.velocity, self.times = velocity, times
        self.passes: list[list[int]] = []

    def __call__(self, places: Sequence[Place]) -> list[Tensor]:
        self.passes.append([place.step for place in places])
        return [torch.full_like(place.x, self.velocity(self.times[place.step])) for place in places]


def row(tolerance: float, steps: int = STEPS) -> Row:
    bare = Condition(torch.zeros(1, 2), torch.zeros(0, 2), torch.zeros(3, 1, dtype=torch.complex64), ())
    return Row(torch.zeros(2, 4), bare, schedule(steps, 256), velocities=Velocities(tolerance, steps - 1))


def sample(forward: Smooth, *rows: Row) -> None:
    batch = Batch(forward)
    for each in rows:
        batch.admit(each)
    while batch.rows:
        batch.step()
        batch.retire()


def test_a_straight_velocity_is_extrapolated_and_nothing_is_lost() -> None:
    times = schedule(STEPS, 256)
    forward, exact = Smooth(lambda t: 1 + 2 * t, times), Smooth(lambda t: 1 + 2 * t, times)
    quick, full = row(0.01), row(0.01)
    full.velocities = None
    sample(forward, quick)
    sample(exact, full)
    assert worst(quick.x, full.x) < 1e-5
    asked = [step for each in forward.passes for step in each]
    assert asked[:3] == [0, 1, 2]  # two to draw a line through, one to hold it against
    assert asked[-1] == STEPS - 1  # the last step is computed in any case
    assert max(b - a for a, b in pairwise(asked)) == MOST_LEFT_OUT + 1
    assert len(exact.passes) == STEPS


def test_a_tighter_tolerance_computes_more_and_comes_closer() -> None:
    times = schedule(STEPS, 256)
    full = row(0.01)
    full.velocities = None
    sample(Smooth(math.exp, times), full)
    found = []
    for tolerance in (0.001, 0.01, 0.2):
        forward, quick = Smooth(math.exp, times), row(tolerance)
        sample(forward, quick)
        found.append((len([each for each in forward.passes if each]), worst(quick.x, full.x)))
    computed, errors = zip(*found, strict=True)
    assert computed[0] > computed[1] > computed[2]
    assert errors[0] < errors[1] < errors[2] < 0.05


def test_each_row_leaves_out_steps_of_its_own_and_takes_no_place_then() -> None:
    """One row's velocity is straight, the other's bends: passes hold the second alone while the first skips."""
    times = schedule(STEPS, 256)
    straight, bent = row(0.001), row(0.001)

    class Both(Smooth):
        def __call__(self, places: Sequence[Place]) -> list[Tensor]:
            self.passes.append([0 if place.condition is straight.condition else 1 for place in places])
            return [
                torch.full_like(place.x, times[place.step] if which == 0 else math.sin(20 * times[place.step]) + 2)
                for which, place in zip(self.passes[-1], places, strict=True)
            ]

    forward = Both(math.exp, times)
    sample(forward, straight, bent)
    asked = [which for each in forward.passes for which in each]
    assert asked.count(0) < STEPS / 2
    assert asked.count(1) == STEPS
    assert [1] in forward.passes


def test_a_step_that_nobody_is_due_for_makes_no_pass() -> None:
    forward = Smooth(lambda t: t, schedule(STEPS, 256))
    sample(forward, row(0.01), row(0.01))
    assert [] not in forward.passes
    assert len(forward.passes) < STEPS / 2


# Context


def test_a_remembered_context_is_what_was_computed_and_brings_no_tokens() -> None:
    flow, case = model(), cases()[0]
    made, memory = case.condition(flow), ContextMemory(3)
    first = Place(case.x, made, 0, memory)
    assert (first.tokens, first.remembers) == (55, False)
    (exact,) = velocities(flow, [Place(case.x, made, 0)])
    (found,) = velocities(flow, [first])
    assert torch.equal(found, exact)
    assert memory.computed == 0
    memory.computed = -1
    again = Place(case.x, made, 0, memory)
    assert (again.tokens, again.remembers) == (31, True)
    (found,) = velocities(flow, [again])  # at the same time and place the memory is right
    assert worst(found, exact) < 2e-5
    later = Place(case.x, made, 1, memory)
    assert later.remembers
    (found,) = velocities(flow, [later])
    assert worst(found, velocities(flow, [Place(case.x, made, 1)])[0]) > 1e-4
    old = Place(case.x, made, 2, memory)
    assert not old.remembers  # three steps are over, whether or not each of them was computed
    (found,) = velocities(flow, [old])
    assert torch.equal(found, velocities(flow, [Place(case.x, made, 2)])[0])


def test_rows_at_different_ages_of_their_contexts_share_a_pass() -> None:
    flow = model()
    memories = [ContextMemory(2) for _ in cases()]
    conditions = [case.condition(flow) for case in cases()]
    velocities(flow, [Place(cases()[1].x, conditions[1], 0, memories[1])])
    memories[1].computed = -1
    places = [Place(case.x, made, 0, memory) for case, made, memory in zip(cases(), conditions, memories, strict=True)]
    assert [place.remembers for place in places] == [False, True, False, False]
    found = velocities(flow, places)
    for case, made, velocity in zip(cases(), conditions, found, strict=True):
        assert worst(velocity, velocities(flow, [Place(case.x, made, 0)])[0]) < 2e-5


# Through the engine


@pytest.fixture(scope="module")
def shipped() -> KontextEngine:
    return KontextEngine.load(shipped_folder(), device="cpu")


def requests() -> list[EditRequest]:
    plain = EditRequest("make the mug red", image=picture(256, 256), steps=12)
    return [
        plain,
        replace(plain, seed=1, steps=8, prompt="a blue mug", negative_prompt="a bottle", true_cfg_scale=1.5),
        replace(plain, seed=2, image=None, width=128, height=128),
    ]


@pytest.mark.parametrize(
    "approximation",
    [Approximation(step_tolerance=0.05), Approximation(context_every=2), Approximation(0.05, 3)],
    ids=["steps", "context", "both"],
)
def test_approximate_results_are_close_and_not_the_same(shipped: KontextEngine, approximation: Approximation) -> None:
    exact = shipped.edit(requests())
    shipped.approximation = approximation
    try:
        near = shipped.edit(requests())
    finally:
        shipped.approximation = Approximation()
    apart = [(a.latents - b.latents).std() / a.latents.std() for a, b in zip(exact, near, strict=True)]
    assert 0 < max(apart) < 0.1, apart


def test_approximations_that_mean_nothing_are_refused() -> None:
    for wrong in ({"step_tolerance": -0.1}, {"step_tolerance": 1.0}, {"context_every": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Approximation(**wrong)
    assert Approximation().exact
    assert not Approximation(step_tolerance=0.1).exact
    assert not Approximation(context_every=2).exact


def test_times_that_are_equal_in_fp32_tell_nothing() -> None:
    """A picture of 4096x4096 has such in a schedule of 500 steps."""
    times = schedule(500, 256 * 256)
    equal = next(step for step in range(499) if times[step] == times[step + 1])
    velocities = Velocities(0.05, 499)
    for step in range(equal, equal + 8):
        if velocities.due(step):
            velocities.computed(step, times[step], torch.full((2, 2), 1.0 + step))
    assert torch.isfinite(velocities.extrapolated(times[equal + 8])).all()


def test_a_mode_is_written_as_it_is_read() -> None:
    for tolerance in (0.05, 1e-5, 0.9999999, 1 / 3):
        mode = Mode("float32", Approximation(step_tolerance=tolerance, context_every=3))
        assert Mode.parse(str(mode)) == mode
    assert str(Mode("bfloat16", Approximation(step_tolerance=0.05))) == "bfloat16+steps=0.05"
