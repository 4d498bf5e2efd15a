"""Schedules in SQL: added, paused, removed, and their times claimed by one of the beats.

A fire is claimed under a token and a time limit, as a step is leased: a beat that dies over it loses it to the next
one, and a beat that was thought dead cannot start a second run.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound, SettingsError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.sql import UtcTime, dialect_insert, now, now_plus, stored_text
from kontext_batch.planning.schedules import (
    CatchUp,
    ClaimedFire,
    FireRow,
    Overlap,
    Schedule,
    ScheduledRun,
    StoredSchedule,
    due,
)

SCHEDULES, FIRES, RUNS = t.schedules.c, t.fires.c, t.runs.c
KEPT = SCHEDULES.removed.is_(None)


def add_schedule(conn: sa.Connection, new: Schedule) -> None:
    insert = dialect_insert(conn, t.schedules)
    values = {
        "name": new.name,
        "recipe": new.recipe,
        "cron": new.cron,
        "tz": new.tz,
        "catch_up": new.catch_up,
        "overlap": new.overlap,
        "stop_at": new.stop_at,
        "only_changed": new.only_changed,
        "priority": new.priority,
        "paused": False,
        "created": now(),
        "considered": now(),
    }
    unless = insert.on_conflict_do_nothing(index_elements=["name"], index_where=sa.text("removed IS NULL"))
    if conn.execute(unless.values(values).returning(SCHEDULES.id)).first() is None:
        raise SettingsError(f"there is a schedule '{new.name}' already; remove it first, or name this one otherwise")


def schedules(conn: sa.Connection) -> list[StoredSchedule]:
    """By name."""
    return [_row(row) for row in conn.execute(sa.select(t.schedules).where(KEPT).order_by(SCHEDULES.name))]


def pause_schedule(conn: sa.Connection, name: str, *, paused: bool) -> bool:
    """Says whether that changed anything. Times that go by while it is paused are not made up for."""
    _require(conn, name)
    return bool(
        conn.execute(
            sa.update(t.schedules)
            .where(SCHEDULES.name == name, KEPT, SCHEDULES.paused != paused)
            .values(paused=paused, considered=now())
        ).rowcount
    )


def remove_schedule(conn: sa.Connection, name: str) -> None:
    _require(conn, name)
    conn.execute(sa.update(t.schedules).where(SCHEDULES.name == name, KEPT).values(removed=now()))


def fires(conn: sa.Connection, name: str, *, limit: int) -> list[FireRow]:
    """Newest first."""
    _require(conn, name)
    query = (
        sa.select(FIRES.fire_at, FIRES.state, FIRES.run_id, FIRES.reason)
        .join(t.schedules, SCHEDULES.id == FIRES.schedule_id)
        .where(SCHEDULES.name == name, KEPT)
        .order_by(FIRES.fire_at.desc())
        .limit(limit)
    )
    return [FireRow(row.fire_at, row.state, row.run_id, row.reason) for row in conn.execute(query)]


def claim_fires(conn: sa.Connection, *, seconds: float) -> list[ClaimedFire]:
    """The times that have come, and those whose beat was lost over them, oldest first."""
    moment: datetime = conn.execute(sa.select(sa.type_coerce(now(), UtcTime()))).scalar_one()
    _note_times(conn, moment)
    lost = sa.select(FIRES.id).where(FIRES.state == "claimed", FIRES.claimed_until <= now())
    if conn.dialect.name == "postgresql":
        lost = lost.with_for_update(skip_locked=True)
    claimed = conn.scalars(
        sa.update(t.fires)
        .where(FIRES.id.in_(lost))
        .values(token=FIRES.token + 1, claimed_until=now_plus(seconds))
        .returning(FIRES.id)
    ).all()
    rows = conn.execute(
        sa.select(t.schedules, FIRES.id.label("fire"), FIRES.token, FIRES.fire_at)
        .join(t.fires, FIRES.schedule_id == SCHEDULES.id)
        .where(FIRES.id.in_(claimed))
        .order_by(FIRES.fire_at, FIRES.id)
    )
    return [ClaimedFire(row.fire, row.token, row.fire_at, _row(row)) for row in rows]


def _note_times(conn: sa.Connection, moment: datetime) -> None:
    """A row for each time that has come since the last look: to be claimed at once, or missed."""
    waiting = sa.select(t.schedules).where(KEPT, sa.not_(SCHEDULES.paused), SCHEDULES.considered < moment)
    for row in conn.execute(waiting.with_for_update(skip_locked=True)).all():
        found = due(row.cron, row.tz, since=row.considered, now=moment, catch_up=CatchUp(row.catch_up))
        if not found:
            continue
        conn.execute(
            sa.insert(t.fires),
            [
                {
                    "schedule_id": row.id,
                    "fire_at": fire.at,
                    "state": "missed" if fire.missed else "claimed",
                    "token": 0,
                    "claimed_until": None if fire.missed else moment,  # free for whoever is first
                    "reason": "nobody was there to fire it" if fire.missed else None,
                    "decided": moment if fire.missed else None,
                }
                for fire in found
            ],
        )
        conn.execute(sa.update(t.schedules).where(SCHEDULES.id == row.id).values(considered=found[-1].at))


def settle_fire(conn: sa.Connection, fire_id: int, token: int, state: str, reason: str) -> bool:
    """`skipped` or `refused`, and why; False when the claim has moved on."""
    return bool(
        conn.execute(
            sa.update(t.fires)
            .where(FIRES.id == fire_id, FIRES.token == token, FIRES.state == "claimed")
            .values(state=state, reason=stored_text(reason), decided=now(), claimed_until=None)
        ).rowcount
    )


def started_by(conn: sa.Connection, fire_id: int, token: int, run_id: int) -> bool:
    """Note the run of a fire, in the transaction that stores the run; False when the claim has moved on."""
    return bool(
        conn.execute(
            sa.update(t.fires)
            .where(FIRES.id == fire_id, FIRES.token == token, FIRES.state == "claimed")
            .values(state="run", run_id=run_id, decided=now(), claimed_until=None)
        ).rowcount
    )


def scheduled_runs(conn: sa.Connection) -> list[ScheduledRun]:
    """Open runs that schedules have started, oldest first."""
    rows = conn.execute(
        sa.select(
            RUNS.id,
            RUNS.created,
            SCHEDULES.id.label("schedule"),
            SCHEDULES.stop_at,
            SCHEDULES.tz,
            sa.type_coerce(now(), UtcTime()).label("now"),
        )
        .join(t.fires, FIRES.run_id == RUNS.id)
        .join(t.schedules, SCHEDULES.id == FIRES.schedule_id)
        .where(open_run())
        .order_by(RUNS.id)
    )
    return [ScheduledRun(row.id, row.schedule, row.created, row.stop_at, row.tz, row.now) for row in rows]


def _require(conn: sa.Connection, name: str) -> None:
    if conn.scalar(sa.select(SCHEDULES.id).where(SCHEDULES.name == name, KEPT)) is None:
        raise ObjectNotFound(f"there is no schedule '{name}'")


def _row(row: sa.Row[Any]) -> StoredSchedule:
    values = row._mapping
    return StoredSchedule(
        id=values[SCHEDULES.id],
        name=values[SCHEDULES.name],
        recipe=values[SCHEDULES.recipe],
        cron=values[SCHEDULES.cron],
        tz=values[SCHEDULES.tz],
        catch_up=CatchUp(values[SCHEDULES.catch_up]),
        overlap=Overlap(values[SCHEDULES.overlap]),
        stop_at=values[SCHEDULES.stop_at],
        only_changed=values[SCHEDULES.only_changed],
        priority=values[SCHEDULES.priority],
        paused=values[SCHEDULES.paused],
        created=values[SCHEDULES.created],
    )
