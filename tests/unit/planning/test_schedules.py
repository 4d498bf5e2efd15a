"""When schedules fire and stop, over the nights on which clocks change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest

from kontext_batch.planning.schedules import CatchUp, Fire, due, fire_times, next_fire, stop_moment

BERLIN = "Europe/Berlin"
NIGHTLY = "0 22 * * *"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def times(cron: str, tz: str, after: str, count: int) -> list[str]:
    return [moment.strftime("%m-%d %H:%M") for moment in islice(fire_times(cron, tz, at(after)), count)]


def test_times_are_those_of_the_zone() -> None:
    assert times(NIGHTLY, BERLIN, "2026-11-23 21:30", 2) == ["11-24 21:00", "11-25 21:00"]
    assert times(NIGHTLY, "Asia/Tokyo", "2026-11-23 21:30", 1) == ["11-24 13:00"]
    assert next_fire(NIGHTLY, "UTC", at("2026-11-24 22:00")) == at("2026-11-25 22:00")


def test_a_fixed_time_fires_once_when_clocks_go_back() -> None:
    """02:30 comes twice in the night to 2026-10-25."""
    assert times("30 2 * * *", BERLIN, "2026-10-24 12:00", 2) == ["10-25 00:30", "10-26 01:30"]


def test_a_time_that_clocks_jump_over_fires_when_they_have_jumped() -> None:
    """There is no 02:30 in the night to 2026-03-29; 03:00 is 01:00 UTC."""
    assert times("30 2 * * *", BERLIN, "2026-03-28 12:00", 2) == ["03-29 01:00", "03-30 00:30"]


def test_every_hour_means_every_hour_of_the_sun() -> None:
    assert times("0 * * * *", BERLIN, "2026-10-24 23:30", 4) == [f"10-25 0{hour}:00" for hour in range(4)]


@pytest.mark.parametrize(
    ("catch_up", "acted"),
    [("last", ["11-23"]), ("all", ["11-21", "11-22", "11-23"]), ("none", [])],
)
def test_missed_times_are_made_up_for_as_the_schedule_says(catch_up: str, acted: list[str]) -> None:
    fires = due(NIGHTLY, "UTC", since=at("2026-11-20 22:00"), now=at("2026-11-24 09:00"), catch_up=CatchUp(catch_up))
    assert [fire.at.day for fire in fires] == [21, 22, 23]
    assert [fire.at.strftime("%m-%d") for fire in fires if not fire.missed] == acted


@pytest.mark.parametrize("catch_up", ["last", "none"])
def test_a_time_that_is_on_time_makes_up_for_the_missed_ones(catch_up: str) -> None:
    now = at("2026-11-24 22:00:03")
    fires = due(NIGHTLY, "UTC", since=at("2026-11-22 22:00"), now=now, catch_up=CatchUp(catch_up))
    assert fires == [Fire(at("2026-11-23 22:00"), True), Fire(at("2026-11-24 22:00"), False)]


def test_the_edges_belong_to_one_tick_alone() -> None:
    first = due("* * * * *", "UTC", since=at("2026-11-24 10:00"), now=at("2026-11-24 10:02"), catch_up=CatchUp.ALL)
    assert [fire.at for fire in first] == [at("2026-11-24 10:01"), at("2026-11-24 10:02")]
    assert due("* * * * *", "UTC", since=first[-1].at, now=at("2026-11-24 10:02:59"), catch_up=CatchUp.ALL) == []


def test_a_year_of_silence_is_bounded() -> None:
    fires = due("* * * * *", "UTC", since=at("2025-11-24"), now=at("2026-11-24"), catch_up=CatchUp.ALL)
    assert len(fires) == 1000
    assert fires[-1].at == at("2026-11-24")


def test_a_date_that_no_year_has_never_fires() -> None:
    assert next_fire("0 0 29 2 *", "UTC", at("2026-01-01")) == at("2028-02-29")


@pytest.mark.parametrize(
    ("started", "stop"),
    [
        ("2026-11-24 21:00", "2026-11-25 05:00"),
        ("2026-11-25 04:59", "2026-11-25 05:00"),
        ("2026-11-25 05:00", "2026-11-26 05:00"),
        ("2026-03-28 22:00", "2026-03-29 04:00"),
    ],
)
def test_work_stops_when_clocks_show_the_time_next(started: str, stop: str) -> None:
    assert stop_moment("06:00", BERLIN, at(started)) == at(stop)


def test_a_stop_that_clocks_jump_over_still_comes() -> None:
    moment = stop_moment("02:30", BERLIN, at("2026-03-28 22:00"))
    assert moment - at("2026-03-29 00:30") <= timedelta(hours=1)
