"""Schedules in both databases: each time fires once, whoever looks and dies."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from kontext_batch.errors import LeaseLost, ObjectNotFound, SettingsError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.schedules import CatchUp, ClaimedFire, Schedule
from tests.contract.plans import make_plan, new_run

HOURLY = Schedule(name="hourly", recipe="s3://shop/r.yaml", cron="0 * * * *", catch_up=CatchUp.ALL)


def come_to_pass(engine: sa.Engine, hours: float) -> None:
    """Let the times of the last `hours` be new."""
    with engine.begin() as conn:
        conn.execute(sa.update(t.schedules).values(considered=datetime.now(UTC) - timedelta(hours=hours)))


def claim(repository: SqlRepository, seconds: float = 60) -> list[ClaimedFire]:
    return list(repository.claim_fires(seconds=seconds))


def start(repository: SqlRepository, fire: ClaimedFire) -> int:
    plan = make_plan({f"a{fire.id}": []})
    return repository.create_run(new_run(plan), plan, fire=(fire.id, fire.token))


def test_a_schedule_is_stored_as_it_was_given(repository: SqlRepository) -> None:
    repository.add_schedule(HOURLY)
    nightly = Schedule(
        name="nightly", recipe="file:///r.yaml", cron="0 22 * * *", tz="Europe/Berlin", stop_at="06:00", priority=3
    )
    repository.add_schedule(nightly)
    with pytest.raises(SettingsError, match="'hourly' already"):
        repository.add_schedule(HOURLY)
    hourly, stored = repository.schedules()
    assert (hourly.name, hourly.catch_up, hourly.paused) == ("hourly", CatchUp.ALL, False)
    assert (stored.tz, stored.stop_at, stored.priority, stored.only_changed) == ("Europe/Berlin", "06:00", 3, False)
    repository.remove_schedule("hourly")
    repository.add_schedule(HOURLY)
    assert [each.name for each in repository.schedules()] == ["hourly", "nightly"]


def test_nothing_fires_before_its_time(repository: SqlRepository) -> None:
    repository.add_schedule(Schedule(name="rare", recipe="r", cron="0 0 29 2 *"))
    assert claim(repository) == []


def test_a_time_becomes_one_run(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.add_schedule(HOURLY)
    come_to_pass(engine, 2)
    fires = claim(repository)
    assert len(fires) == 2
    assert [fire.at.minute for fire in fires] == [0, 0]
    assert fires[0].at < fires[1].at <= datetime.now(UTC)
    run_id = start(repository, fires[0])
    assert claim(repository) == []
    assert repository.settle_fire(fires[1].id, fires[1].token, "skipped", "run 1 is still open")
    newest, oldest = repository.fires("hourly")
    assert (newest.state, newest.reason, newest.run_id) == ("skipped", "run 1 is still open", None)
    assert (oldest.state, oldest.run_id) == ("run", run_id)
    assert [each.run_id for each in repository.scheduled_runs()] == [run_id]
    repository.cancel_run(run_id)
    assert repository.scheduled_runs() == []


def test_missed_times_are_noted(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.add_schedule(Schedule(name="never", recipe="r", cron="30 * * * *", catch_up=CatchUp.NONE))
    with engine.begin() as conn:  # the last half hour is not on time, whatever the minute is
        conn.execute(
            sa.update(t.schedules).values(cron=f"{(datetime.now(UTC) - timedelta(minutes=20)).minute} * * * *")
        )
    come_to_pass(engine, 3)
    assert claim(repository) == []
    assert {fire.state for fire in repository.fires("never")} == {"missed"}
    assert len(repository.fires("never")) == 3


def test_a_beat_that_died_over_a_time_loses_it_to_the_next(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.add_schedule(HOURLY)
    come_to_pass(engine, 1)
    [dead] = claim(repository, seconds=0)
    [heir] = claim(repository)
    assert (heir.id, heir.token) == (dead.id, dead.token + 1)
    runs = len(repository.runs())
    with pytest.raises(LeaseLost):
        start(repository, dead)
    assert len(repository.runs()) == runs  # and left nothing behind
    assert not repository.settle_fire(dead.id, dead.token, "refused", "late")
    start(repository, heir)
    assert [fire.state for fire in repository.fires("hourly")] == ["run"]


def test_many_beats_at_once_fire_each_time_once(repository: SqlRepository, engine: sa.Engine) -> None:
    for number in range(5):
        repository.add_schedule(Schedule(name=f"s{number}", recipe="r", cron="*/10 * * * *", catch_up=CatchUp.ALL))
    come_to_pass(engine, 5)
    started: list[int] = []

    def beat() -> None:
        for _ in range(4):
            started.extend(start(repository, fire) for fire in claim(repository))

    beats = [threading.Thread(target=beat) for _ in range(4)]
    for each in beats:
        each.start()
    for each in beats:
        each.join()
    fires = [fire for number in range(5) for fire in repository.fires(f"s{number}", limit=1000)]
    assert {fire.state for fire in fires} == {"run"}
    assert len(fires) == len(started) == 5 * 30
    assert sorted(fire.run_id or 0 for fire in fires) == sorted(started)


def test_a_paused_schedule_does_not_fire_and_makes_up_for_nothing(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.add_schedule(HOURLY)
    assert repository.pause_schedule("hourly", paused=True)
    assert not repository.pause_schedule("hourly", paused=True)
    come_to_pass(engine, 4)
    assert claim(repository) == []
    assert repository.pause_schedule("hourly", paused=False)
    assert claim(repository) == []


def test_a_removed_schedule_keeps_its_past_and_fires_no_more(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.add_schedule(HOURLY)
    come_to_pass(engine, 1)
    [fire] = claim(repository)
    repository.remove_schedule("hourly")
    start(repository, fire)  # what was begun is finished
    come_to_pass(engine, 4)
    assert claim(repository) == []
    with engine.begin() as conn:
        assert conn.execute(sa.select(sa.func.count()).select_from(t.fires)).scalar_one() == 1
    for act in (repository.remove_schedule, repository.fires):
        with pytest.raises(ObjectNotFound, match="no schedule 'hourly'"):
            act("hourly")
