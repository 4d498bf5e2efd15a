"""The gate: approximate sampling held against exact on a model's own weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from engine.gate import drawn_requests, gate
from engine.pipeline import Approximation, EditRequest, EditResult, KontextEngine
from engine.reuse import Velocities
from kontext_batch.cli.main import app
from kontext_batch.registry import shipped_folder


@pytest.fixture(scope="module")
def shipped() -> KontextEngine:
    return KontextEngine.load(shipped_folder(), device="cpu")


def test_settings_are_held_against_exact_images(shipped: KontextEngine) -> None:
    told: list[tuple[int, int]] = []
    requests = drawn_requests(shipped, 2, steps=8)
    assert {request.width for request in requests} == {128}  # the shipped model's native size
    settings = (Approximation(step_tolerance=0.2), Approximation(context_every=8))
    steps, context = gate(shipped, requests, settings, on_done=lambda done, total: told.append((done, total)))
    assert [steps.approximation, context.approximation] == list(settings)
    for verdict in (steps, context):
        assert verdict.worst <= verdict.median
        assert 20 < verdict.worst < 99  # near, and not the same
    assert told == [(done, 6) for done in range(1, 7)]
    assert shipped.approximation.exact


def test_the_first_edit_of_an_arm_is_not_timed(shipped: KontextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are chosen and compiled in it."""
    met: list[Approximation] = []
    edit = shipped.edit

    def timed(requests: Sequence[EditRequest]) -> list[EditResult]:
        new = shipped.approximation not in met
        met.append(shipped.approximation)
        return [replace(each, timings={"sample": 100.0 * len(met) if new else 1.0}) for each in edit(requests)]

    monkeypatch.setattr(shipped, "edit", timed)
    settings = (Approximation(step_tolerance=0.2), Approximation(context_every=2))
    verdicts = gate(shipped, drawn_requests(shipped, 1, steps=2), settings)
    assert [verdict.quicker for verdict in verdicts] == [1.0, 1.0]


def test_a_setting_that_spoils_images_fails_the_gate(shipped: KontextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Velocities, "extrapolated", lambda velocities, t: -velocities._computed[-1][2])
    monkeypatch.setattr(Velocities, "due", lambda velocities, step: step < 3)
    (spoilt,) = gate(shipped, drawn_requests(shipped, 1, steps=8), (Approximation(step_tolerance=0.2),))
    assert spoilt.worst < 20


def test_the_command_says_who_passed() -> None:
    asked = ["models", "gate", "tiny", "--images", "1", "--steps", "4", "--context-every", "2", "--json"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.output)
    assert (found["step_tolerance"], found["context_every"], found["passed"]) == (0.0, 2, True)
    failing = CliRunner().invoke(app, [*asked[:-1], "--least", "98.9"])
    assert failing.exit_code == 1
    assert "below 98.9 dB" in failing.output
