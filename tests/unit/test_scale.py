"""The arithmetic of `benchmarks.scale`, on cases whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.scale import MEASURED, Fleet, Limit, costs_of, fill, generations, limits, run_seconds

COSTS = replace(MEASURED, worker_ms=1.0, database_ms=1.0, wait_ms=2.0, start_ms=500.0)


def test_one_worker_computes_and_waits_in_turn() -> None:
    assert run_seconds(COSTS, workers=1, steps=800, cores=2) == pytest.approx(0.5 + 800 * 0.004)


def test_two_workers_on_two_cores_take_half_as_long() -> None:
    assert run_seconds(COSTS, workers=2, steps=800, cores=2) == pytest.approx(0.5 + 400 * 0.004)


def test_many_workers_are_as_fast_as_the_cores() -> None:
    took = run_seconds(COSTS, workers=16, steps=8000, cores=2)
    assert took == pytest.approx(0.5 + 8000 * 0.002 / 2, rel=0.01)


def test_a_core_that_others_use_is_missing() -> None:
    whole = run_seconds(COSTS, workers=16, steps=8000, cores=2) - 0.5
    assert run_seconds(COSTS, workers=16, steps=8000, cores=1.5) - 0.5 == pytest.approx(whole * 2 / 1.5, rel=0.01)


def test_batches_of_one_lane_are_full_where_gpus_are_short() -> None:
    short = fill(Fleet(gpus=1, steps_a_day=86_400, lanes=1, batch_seconds=4, row_seconds=4), seconds=3600)
    assert short.rows == pytest.approx(8, abs=0.1)
    assert short.busy == pytest.approx(1, abs=0.02)
    assert short.late == pytest.approx(3600 - 3600 * 8 / 36, abs=20)


def test_a_gpu_takes_what_is_there_be_it_one_row() -> None:
    idle = fill(Fleet(gpus=100, steps_a_day=86_400, lanes=1, batch_seconds=4, row_seconds=4), seconds=3600)
    assert idle.rows == 1
    assert idle.switching == 0
    assert idle.busy == pytest.approx(8 / 100, rel=0.01)


def test_many_lanes_are_loaded_again_and_again() -> None:
    fleet = Fleet(gpus=50, steps_a_day=86_400, lanes=2)
    few, many = fill(fleet, seconds=1800), fill(replace(fleet, lanes=500), seconds=1800)
    assert many.switching > few.switching
    assert many.rows < 8


def test_rings_double() -> None:
    assert [generations(workers) for workers in (1, 8, 9, 16, 1000)] == [1, 1, 2, 2, 8]


def test_what_has_least_room_comes_first() -> None:
    found = limits(COSTS, Fleet())
    assert [each.room for each in found] == sorted(each.room for each in found)
    assert Limit("x", 2.0, 10.0, "", "").room == 5


def test_twice_the_steps_leave_half_the_room_for_puts() -> None:
    def puts(steps: float) -> float:
        return next(each.room for each in limits(COSTS, Fleet(steps_a_day=steps)) if each.name.startswith("PUT"))

    assert puts(20e6) == pytest.approx(puts(10e6) / 2)


def test_measured_costs_replace_those_of_the_table() -> None:
    told = costs_of({"worker_cpu_ms": 3.0, "wal_bytes": 7.0, "unknown": 1.0}, COSTS)
    assert (told.worker_ms, told.wal_bytes, told.database_ms) == (3.0, 7.0, COSTS.database_ms)
