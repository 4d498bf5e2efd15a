"""The beat's look at everything, as Prometheus sees it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kontext_batch.errors import InfrastructureError
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.observability.fleet import Fleet
from kontext_batch.ports import Standing
from kontext_batch.services.watch import LOOK_SECONDS, PAUSE, Watch
from tests.unit.services.conftest import Studio


def test_everything_live_is_told(studio: Studio) -> None:
    fleet = Fleet()
    registry = CollectorRegistry()
    registry.register(fleet)
    assert generate_latest(registry) == b""
    repository = studio.app.repository
    run_id = studio.submit()
    worker = studio.worker()
    repository.register_worker(worker.info)
    [step, *_] = repository.claim(worker.info.id, limit=1, lease_seconds=60)
    assert Watch(repository, fleet).tick()
    text = generate_latest(registry).decode()
    assert f'kontext_batch_live_steps{{lane="{step.lane}",state="leased"}} 1.0' in text
    assert f'kontext_batch_live_steps{{lane="{step.lane}",state="ready"}} 1.0' in text
    assert 'kontext_batch_live_steps{lane="operations",state="blocked"} 4.0' in text
    assert 'kontext_batch_open_runs{state="running"} 1.0' in text
    assert "kontext_batch_workers 1.0" in text
    age = registry.get_sample_value("kontext_batch_queue_age_seconds", {"lane": step.lane})
    assert age is not None
    assert 0 <= age < 60
    repository.retire_worker(worker.info.id)
    repository.cancel_run(run_id)
    Watch(repository, fleet).tick()
    assert "live_steps{" not in generate_latest(registry).decode()  # nothing of the look before is left


@dataclass
class Slow:
    """A database in which each look takes `took` seconds."""

    took: float
    now: float = 0.0
    looks: int = 0

    def standing(self) -> Standing:
        self.looks += 1
        self.now += self.took
        return Standing({}, {}, {}, 0, 0, 0.0, {})


def test_it_looks_seldom_enough_to_cost_next_to_nothing() -> None:
    for took, least in ((0.01, LOOK_SECONDS), (2.0, PAUSE * 2.0)):
        database = Slow(took)
        watch = Watch(database, Fleet(), clock=lambda database=database: database.now)  # type: ignore[arg-type,misc]
        assert watch.tick()
        database.now += least - 0.1
        assert not watch.tick()
        database.now += 0.2
        assert watch.tick()
        assert database.looks == 2


def test_ready_is_said_of_database_and_store(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    assert studio.app.readiness().faults() == {}

    def silent(uri: str) -> None:
        raise InfrastructureError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(studio.app.store), "head", lambda self, uri: silent(uri))
        assert studio.app.readiness().faults() == {"store": "no answer"}
    engine = open_database(studio.app.database_url)
    with engine.begin() as conn:
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    close_database(engine)
    assert "db upgrade" in studio.app.readiness().faults()["database"]
