"""`benchmarks.load_weights`: the model that it writes, the figures that it gives, and what it judges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.load_weights import edits, flow_of, missed_goals, rates, write_model
from engine.transformer import FlowTransformer
from engine.weights import find_model
from tests.engine.conftest import SHIPPED


@pytest.mark.parametrize("size", [10**9, 2 * 10**8])
def test_the_model_has_about_the_size_that_is_asked_for(size: int) -> None:
    with torch.device("meta"):
        module = FlowTransformer(flow_of(size, torch.float32, find_model(SHIPPED).config.flow))
    assert sum(each.nbytes for each in module.parameters()) == pytest.approx(size, rel=0.3)


def test_the_shipped_model_is_measured() -> None:
    """A small model: figures are there, whatever they are."""
    found = rates(SHIPPED, turns=1, device=torch.device("cpu"), dtype=torch.float32) | edits(SHIPPED)
    assert found["memory_ratio"] > 0
    assert found["memory_load_gb_s"] > 0
    assert found["second_edit_total_seconds"] > 0


def test_a_model_that_is_written_can_be_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "model", 10**6, torch.bfloat16)
    assert rates(tmp_path / "model", turns=1, device=torch.device("cpu"), dtype=torch.bfloat16)["gb"] > 0.05


@pytest.mark.parametrize(
    ("result", "missed"),
    [
        ({"disk_ratio": 0.9, "first_edit_seconds": 0.1}, []),
        ({"disk_ratio": 0.8, "first_edit_seconds": 5.0}, ["disk_ratio", "first_edit_seconds"]),
        ({"memory_ratio": 0.1, "first_edit_seconds": 0.1}, []),
    ],
)
def test_the_disk_and_the_first_edit_are_judged(result: dict[str, float], missed: list[str]) -> None:
    assert missed_goals(result) == missed
