"""The tick: times become runs, nights end, and what stands against a run is written down."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kontext_batch.errors import InfrastructureError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.planning.schedules import Overlap, Schedule
from kontext_batch.planning.states import RunState
from kontext_batch.ports import Orders
from kontext_batch.services.schedules import Scheduler
from kontext_batch.storage.uris import file_uri
from tests.unit.services.conftest import Studio


@pytest.fixture
def scheduler(studio: Studio) -> Scheduler:
    return Scheduler(studio.app.repository, studio.app.wake_ups, lambda uri: studio.app.planner())


def wait_for_a_minute_that_lasts() -> None:
    """The clock is the database's: a minute that begins between two looks would fire a time that no test asked for."""
    second = datetime.now(UTC).second
    if second >= 45:
        time.sleep(60.5 - second)


def add(studio: Studio, **values: Any) -> None:
    wait_for_a_minute_that_lasts()
    values = {"name": "nightly", "recipe": file_uri(studio.recipe), "cron": "* * * * *", **values}
    studio.app.repository.add_schedule(Schedule(**values))


def let_time_pass(studio: Studio, **values: Any) -> None:
    """As if the last look had been a minute ago; `values`: when the runs were created, for one."""
    wait_for_a_minute_that_lasts()
    engine = open_database(studio.app.database_url)
    with engine.begin() as conn:
        conn.execute(sa.update(t.schedules).values(considered=datetime.now(UTC) - timedelta(seconds=60)))
        for row in conn.execute(sa.select(t.fires.c.id, t.fires.c.fire_at).order_by(t.fires.c.fire_at)).all():
            earlier = row.fire_at - timedelta(seconds=60)
            conn.execute(sa.update(t.fires).where(t.fires.c.id == row.id).values(fire_at=earlier))
        if values:
            conn.execute(sa.update(t.runs).values(values))
    close_database(engine)


def told(studio: Studio) -> list[tuple[str, int | None, str | None]]:
    """State, run and reason of every time, oldest first."""
    rows = studio.app.repository.fires("nightly")
    return [(row.state, row.run_id, row.reason) for row in reversed(rows)]


def test_a_time_that_has_come_starts_its_recipe(studio: Studio, scheduler: Scheduler) -> None:
    add(studio, priority=4)
    assert scheduler.tick() == []
    let_time_pass(studio)
    [run_id] = scheduler.tick()
    summary = studio.app.repository.run(run_id)
    assert (summary.trigger, summary.priority, summary.recipe) == ("schedule", 4, "shop")
    assert scheduler.tick() == []
    assert studio.worker().run_until_done(run_id).state is RunState.DONE
    assert told(studio) == [("run", run_id, None)]


@pytest.mark.parametrize("overlap", Overlap)
def test_a_run_that_is_still_open_meets_the_next_time(studio: Studio, scheduler: Scheduler, overlap: Overlap) -> None:
    add(studio, overlap=overlap)
    let_time_pass(studio)
    [first] = scheduler.tick()
    let_time_pass(studio)
    later = scheduler.tick()
    states = [run.state for run in reversed(studio.app.repository.runs())]
    if overlap is Overlap.SKIP:
        assert (later, states) == ([], [RunState.RUNNING])
        assert told(studio)[1:] == [("skipped", None, f"run {first} of a time before is still open")]
    elif overlap is Overlap.QUEUE:
        assert states == [RunState.RUNNING, RunState.RUNNING]
    else:
        assert states == [RunState.CANCELLED, RunState.RUNNING]
        assert studio.app.repository.run(first).reason == "schedule 'nightly' has started the next one"
    for run_id in later:
        assert studio.worker().run_until_done(run_id).state is RunState.DONE


def test_only_changed_starts_nothing_when_all_is_done(studio: Studio, scheduler: Scheduler) -> None:
    add(studio, only_changed=True)
    let_time_pass(studio)
    [first] = scheduler.tick()
    studio.worker().run_until_done(first)
    let_time_pass(studio)
    assert scheduler.tick() == []
    assert told(studio)[1:] == [("skipped", None, "nothing has changed since the last run")]
    studio.recipe.write_text(studio.recipe.read_text().replace("deep snow", "fresh snow"))
    let_time_pass(studio)
    assert len(scheduler.tick()) == 1


def test_a_recipe_that_is_wrong_by_now_is_refused_with_its_line(studio: Studio, scheduler: Scheduler) -> None:
    add(studio)
    studio.recipe.write_text(studio.recipe.read_text().replace("${clean}", "${claen}"))
    let_time_pass(studio)
    assert scheduler.tick() == []
    [(state, _, reason)] = told(studio)
    assert state == "refused"
    assert reason is not None
    assert "shop.yaml:17" in reason
    assert "did you mean 'clean'" in reason


def test_a_store_that_does_not_answer_is_asked_again(
    studio: Studio, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(studio)
    let_time_pass(studio)

    def silent(uri: str) -> Any:
        raise InfrastructureError("no answer")

    away = Scheduler(studio.app.repository, studio.app.wake_ups, silent)
    with monkeypatch.context() as patch:
        patch.setattr("kontext_batch.services.schedules.CLAIM_SECONDS", 0.0)
        assert away.tick() == []
    assert [state for state, _, _ in told(studio)] == ["claimed"]
    assert len(scheduler.tick()) == 1


def test_work_stops_when_the_night_is_over(studio: Studio, scheduler: Scheduler) -> None:
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    add(studio, stop_at=f"{datetime.now(UTC) - timedelta(minutes=1):%H:%M}")
    let_time_pass(studio)
    [run_id] = scheduler.tick()
    worker = studio.worker(batch_rows=1)
    studio.app.repository.register_worker(worker.info)
    assert worker.work_once(until=0.0)  # one step, and then the night goes on
    assert studio.app.repository.claim(worker.info.id, limit=1, lease_seconds=60)
    scheduler.tick()
    assert studio.app.repository.run(run_id).state is RunState.RUNNING  # its stop is tomorrow's
    let_time_pass(studio, created=hour_ago)
    studio.app.repository.pause_schedule("nightly", paused=True)
    scheduler.tick()
    summary = studio.app.repository.run(run_id)
    assert summary.state is RunState.CANCELLED
    assert summary.reason is not None
    assert summary.reason.startswith("its schedule stops it at ")
    assert studio.app.repository.orders(worker.info.id) == Orders(), "what was begun is finished: it drains"
    studio.app.repository.retire_worker(worker.info.id)
    studio.editor.jobs.clear()
    assert studio.worker().run_until_done(studio.submit()).state is RunState.DONE
    assert len(studio.editor.jobs) == 5  # what was finished at night is kept
