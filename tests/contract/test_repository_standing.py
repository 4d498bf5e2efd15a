"""What the beat tells of all that is live, in both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import RunState, StepState
from tests.contract.plans import done, failed, make_plan, submit, worker

PLAN = make_plan({"a": [], "b": [], "c": ["a"], "d": []}, lanes={"c": "operations"}, deliver=["a", "c"])


def let_pass(engine: sa.Engine, seconds: float) -> None:
    """As if what is ready had been so for `seconds` longer."""
    with engine.begin() as conn:
        for row in conn.execute(sa.select(t.steps.c.id, t.steps.c.ready_since)).all():
            if row.ready_since is not None:
                earlier = row.ready_since - timedelta(seconds=seconds)
                conn.execute(sa.update(t.steps).where(t.steps.c.id == row.id).values(ready_since=earlier))


def test_nothing_stands_in_an_empty_database(repository: SqlRepository) -> None:
    standing = repository.standing()
    assert (standing.steps, standing.queue_age, standing.runs, standing.sends) == ({}, {}, {}, {})
    assert (standing.pending_deliveries, standing.workers, standing.longest_silence) == (0, 0, 0.0)


def test_live_steps_runs_deliveries_and_workers_are_counted(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.register_worker(worker("w1"))
    repository.register_worker(worker("w2", pid=2))
    repository.retire_worker("w2")
    run_id = submit(repository, PLAN)
    repository.pause_run(submit(repository, make_plan({"x": []}, recipe="other")))
    [held, *_] = repository.claim("w1", limit=2, lease_seconds=60)
    standing = repository.standing()
    assert standing.steps == {
        ("edit/tiny", StepState.READY): 2,
        ("edit/tiny", StepState.LEASED): 2,
        ("operations", StepState.BLOCKED): 1,
    }
    assert standing.runs == {RunState.RUNNING: 1, RunState.PAUSED: 1}
    assert (standing.workers, standing.pending_deliveries) == (1, 0)
    repository.commit(None, [done(held)])
    standing = repository.standing()
    assert standing.steps[("operations", StepState.READY)] == 1
    assert standing.pending_deliveries == 1
    with engine.begin() as conn:
        conn.execute(sa.update(t.workers).values(heartbeat=datetime.now(UTC) - timedelta(seconds=100)))
    assert 99 < repository.standing().longest_silence < 130
    repository.cancel_run(run_id)
    assert repository.standing().pending_deliveries == 0


def test_the_queue_is_as_old_as_its_oldest_step(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.register_worker(worker())
    run_id = submit(repository, PLAN)
    let_pass(engine, 100)
    first = repository.claim("w1", limit=2, lease_seconds=60)
    assert 100 <= repository.standing().queue_age["edit/tiny"] < 130
    repository.commit(None, [done(step) for step in first])
    assert 0 <= repository.standing().queue_age["operations"] < 30  # freed a moment ago
    [last] = repository.claim("w1", limit=8, lease_seconds=60, ranking=None)
    assert "edit/tiny" not in repository.standing().queue_age
    repository.release([(last.id, last.token)])
    assert 0 <= repository.standing().queue_age["edit/tiny"] < 30
    let_pass(engine, 100)
    repository.pause_run(run_id)
    assert repository.standing().queue_age["edit/tiny"] == 0
    repository.resume_run(run_id)
    assert 0 <= repository.standing().queue_age["edit/tiny"] < 30  # nobody could have taken it before


@pytest.mark.parametrize("way", ["retry", "lost", "asked anew"])
def test_the_age_begins_anew_when_a_step_comes_back(repository: SqlRepository, engine: sa.Engine, way: str) -> None:
    repository.register_worker(worker())
    run_id = submit(repository, make_plan({"a": []}))
    let_pass(engine, 1000)
    [step] = repository.claim("w1", limit=1, lease_seconds=60)
    if way == "retry":
        repository.commit(None, [failed(step, retry_in=-5)])
    elif way == "lost":
        repository.reconcile(gone_workers=["w1"])
    else:
        repository.commit(None, [failed(step)])
        repository.retry_run(run_id)
    assert 0 <= repository.standing().queue_age["edit/tiny"] < 60
    if way == "retry":
        [step] = repository.claim("w1", limit=1, lease_seconds=60)
        repository.commit(None, [failed(step, retry_in=3600)])
        assert repository.standing().queue_age == {"edit/tiny": 0.0}
