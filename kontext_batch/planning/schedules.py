"""When a recipe runs by itself: fire times, missed ones, times to stop. Pure: moments are arguments, in UTC.

Fire times are those of Debian's cron (cronsim): on the night when clocks go back a fixed time fires once, and one that
the clocks jump over fires when they have jumped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from itertools import islice
from zoneinfo import ZoneInfo

from cronsim import CronSim

ON_TIME = timedelta(minutes=5)
"""How late the tick may look and still be on time: a beat that was restarted has missed nothing."""
MOST_MISSED = 1000
"""Missed times that are looked at, the newest ones."""


class CatchUp(StrEnum):
    """What becomes of times at which nothing was there to fire."""

    LAST = "last"
    """The last of them is made up for."""
    ALL = "all"
    NONE = "none"


class Overlap(StrEnum):
    """What becomes of a time at which the schedule's run before is still open."""

    SKIP = "skip"
    """Nothing is started."""
    QUEUE = "queue"
    """The new run is submitted behind the other: what both want is computed once."""
    CANCEL = "cancel"
    """The run before is cancelled; what it has finished is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What is run when."""

    name: str
    recipe: str
    """Its URI."""
    cron: str
    tz: str = "UTC"
    catch_up: CatchUp = CatchUp.LAST
    overlap: Overlap = Overlap.SKIP
    stop_at: str | None = None
    """HH:MM of the zone at which the run is stopped; what it has finished is kept."""
    only_changed: bool = False
    """Start no run when every step is done and every output is where it shall be."""
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSchedule(Schedule):
    """A schedule of the database."""

    id: int
    paused: bool
    created: datetime


@dataclass(frozen=True, slots=True)
class ClaimedFire:
    """A time that this process acts on; what comes of it is fenced by `token`."""

    id: int
    token: int
    at: datetime
    schedule: StoredSchedule


@dataclass(frozen=True, slots=True)
class FireRow:
    """What became of a time of a schedule."""

    at: datetime
    state: str
    """`claimed` (being planned), `run`, `skipped`, `missed`, `refused`."""
    run_id: int | None
    reason: str | None
    """Why there is no run."""


@dataclass(frozen=True, slots=True)
class ScheduledRun:
    """An open run that a schedule has started."""

    run_id: int
    schedule_id: int
    started: datetime
    stop_at: str | None
    tz: str
    now: datetime
    """By the clock that `started` is of."""


@dataclass(frozen=True, slots=True)
class Fire:
    """One time of a schedule, and whether it is to be acted on."""

    at: datetime
    missed: bool
    """It is only noted: another one makes up for it, or nothing does."""


def fire_times(cron: str, tz: str, after: datetime) -> Iterator[datetime]:
    """The times of a schedule after a moment, for ever; none for a date that no year has."""
    zone = ZoneInfo(tz)
    for local in CronSim(cron, after.astimezone(zone)):
        yield local.astimezone(UTC)


def next_fire(cron: str, tz: str, after: datetime) -> datetime | None:
    return next(fire_times(cron, tz, after), None)


def due(cron: str, tz: str, *, since: datetime, now: datetime, catch_up: CatchUp) -> list[Fire]:
    """The times in (since, now], oldest first.

    Of those that are late by more than `ON_TIME`, `last` acts on the newest unless one is on time, `all` on each and
    `none` on none. Beyond the newest `MOST_MISSED` nothing is said.
    """
    zone = ZoneInfo(tz)
    backwards = CronSim(cron, (now + timedelta(seconds=1)).astimezone(zone), reverse=True)
    found = []
    for local in islice(backwards, MOST_MISSED):
        at = local.astimezone(UTC)
        if at <= since:
            break
        found.append(at)
    found.reverse()
    late = [at for at in found if now - at > ON_TIME]
    timely = [at for at in found if now - at <= ON_TIME]
    if catch_up is CatchUp.ALL:
        acted = set(found)
    elif catch_up is CatchUp.LAST and not timely:
        acted = set(late[-1:])
    else:
        acted = set(timely)
    return [Fire(at, missed=at not in acted) for at in found]


def stop_moment(stop_at: str, tz: str, started: datetime) -> datetime:
    """The first time after `started` at which clocks show `stop_at` (HH:MM), in UTC."""
    zone = ZoneInfo(tz)
    wanted = time.fromisoformat(stop_at)
    day = started.astimezone(zone).date()
    for later in range(3):
        moment = datetime.combine(day + timedelta(days=later), wanted, zone).astimezone(UTC)
        if moment > started:
            return moment
    raise AssertionError("some day has that time")
