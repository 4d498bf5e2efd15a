"""What a beat removes by itself, and how much at once."""

from __future__ import annotations

import pytest

from kontext_batch.services import retention
from kontext_batch.services.retention import Collector
from tests.unit.services.conftest import Studio


def test_a_beat_collects_a_part_at_a_time_and_then_rests(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.worker().run_until_done(studio.submit())
    monkeypatch.setattr(retention, "MOST_AT_ONCE", 2)
    now = [0.0]
    collector = Collector(studio.app.repository, studio.app.store, 0.0, studio.app.admit, clock=lambda: now[0])
    count = len(studio.app.repository.expired(days=0))
    assert count > 2
    first = collector.tick()
    assert first is not None
    assert first.by_age.artifacts == 2
    assert collector.tick() is None
    now[0] += retention.MORE_SECONDS
    while (done := collector.tick()) is not None and done.artifacts == 2:
        now[0] += retention.MORE_SECONDS
    assert studio.app.repository.expired(days=0) == []
    now[0] += retention.MORE_SECONDS
    assert collector.tick() is None, "nothing was left to do"
    now[0] += retention.TICK_SECONDS
    assert collector.tick() is not None


def test_a_beat_without_a_policy_removes_no_artifact(studio: Studio) -> None:
    studio.worker().run_until_done(studio.submit())
    before = list(studio.app.repository.artifact_uris())
    done = Collector(studio.app.repository, studio.app.store, None).tick()
    assert done is not None
    assert (done.artifacts, list(studio.app.repository.artifact_uris())) == (0, before)
