"""The benchmark of fairness, on a small scale: a tenant with few steps does not wait for one with many."""

from __future__ import annotations

import pytest

from benchmarks import fairness
from kontext_batch.ports import Ready
from kontext_batch.services.turns import Turns


def test_a_small_tenant_waits_for_a_few_batches_of_a_large_one(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fairness, "SMALL_RUNS", 2)
    result = fairness.measure(database_url, 600)
    assert {name: result[name] for name, goal in fairness.GOALS.items() if result[name] > goal} == {}
    assert 0 < result["small_wait_seconds_mean"] <= result["small_wait_seconds_worst"]
    assert result["large_steps_a_second"] > 0


def test_without_turns_it_would_wait_longer(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the benchmark can miss its goals."""

    class OldestFirst(Turns):
        def _order(self, each: Ready) -> tuple[float, ...]:
            return (each.run_id,)

    monkeypatch.setattr(fairness, "Turns", OldestFirst)
    monkeypatch.setattr(fairness, "SMALL_RUNS", 1)
    result = fairness.measure(sqlite_url, 600)
    assert result["small_batches_worst"] > fairness.GOALS["small_batches_worst"]
