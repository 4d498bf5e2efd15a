"""What the limits of runs are compared with: failures by an index that holds no other steps, use by its counters."""

from __future__ import annotations

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import DialectInsert, among, dialect_insert, exists, in_state, ordered_by_equal
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import RunFigures

RUNS, STEPS, USAGE, DELIVERIES = t.runs.c, t.steps.c, t.run_usage.c, t.deliveries.c


def run_figures(conn: sa.Connection, run_id: int | None) -> list[RunFigures]:
    wanted = RUNS.state == RunState.RUNNING if run_id is None else RUNS.id == run_id
    query = sa.select(
        RUNS.id,
        RUNS.state,
        RUNS.size,
        RUNS.excused,
        RUNS.budget,
        failed_steps().label("failed"),
        gpu_seconds().label("gpu_seconds"),
    )
    return [
        RunFigures(
            id=row.id,
            state=RunState(row.state),
            size=row.size,
            failed=max(0, row.failed - row.excused),
            gpu_seconds=row.gpu_seconds,
            gpu_minutes=row.budget.get("gpu_minutes"),
        )
        for row in conn.execute(query.where(wanted).order_by(RUNS.id))
    ]


def backlogged_runs(conn: sa.Connection, limit: int) -> list[int]:
    """Running runs with more ready steps of Pillow and pending deliveries than that; no more of them are counted.

    None that has a ready step of a model which another running run wants as well: that one would wait with it.
    """
    ready, other_run = in_state(STEPS.state, StepState.READY), t.run_steps.c.run_id
    steps = sa.select(STEPS.id).where(STEPS.run_id == RUNS.id, ordered_by_equal(STEPS.lane, OPERATIONS_LANE), ready)
    waiting = _number(steps.order_by(STEPS.lane), limit) + _number(pending_of_run(), limit)
    found = set(conn.scalars(sa.select(RUNS.id).where(RUNS.state == RunState.RUNNING, waiting > limit)))
    if not found:
        return []
    wanted_elsewhere = exists(
        t.run_steps.c.step_id == STEPS.id,
        other_run == RUNS.id,
        RUNS.state == RunState.RUNNING,
        sa.not_(among(other_run, found)),  # the step's own run is one of these
        outer=t.steps,
    )
    mine = among(STEPS.run_id, found)
    shared = sa.select(STEPS.run_id).where(mine, ready, STEPS.lane != OPERATIONS_LANE, wanted_elsewhere).distinct()
    return sorted(found - set(conn.scalars(shared)))


def pending_of_run() -> sa.Select[tuple[int]]:
    """Deliveries of the run of the enclosing statement that may be brought, by the index that has them together."""
    pending = DELIVERIES.run_id == RUNS.id, ordered_by_equal(DELIVERIES.state, "pending")
    return sa.select(DELIVERIES.id).where(*pending).order_by(DELIVERIES.state)


def _number(rows: sa.Select[tuple[int]], limit: int) -> sa.ScalarSelect[int]:
    """How many rows of the run of the enclosing statement there are, one above `limit` at most."""
    found = rows.limit(limit + 1).correlate(t.runs).subquery()
    return sa.select(sa.func.count()).select_from(found).scalar_subquery()


def failed_steps() -> sa.ScalarSelect[int]:
    """How many steps on the account of the run of the enclosing statement have failed or are quarantined."""
    return (
        sa.select(sa.func.count())
        .select_from(t.steps)
        .where(STEPS.run_id == RUNS.id, in_state(STEPS.state, StepState.FAILED, StepState.QUARANTINED))
        .correlate(t.runs)
        .scalar_subquery()
    )


def gpu_seconds() -> sa.ScalarSelect[float]:
    """What all workers together have sampled for the run of the enclosing statement."""
    used = sa.func.coalesce(sa.func.sum(USAGE.gpu_seconds), 0.0)
    return sa.select(used).where(USAGE.run_id == RUNS.id).correlate(t.runs).scalar_subquery()


def usage_insert(conn: sa.Connection, worker_id: str, seconds: dict[int, float]) -> DialectInsert:
    """Adds run id -> seconds to what that worker has sampled for those runs."""
    insert = dialect_insert(conn, t.run_usage)
    rows = [{"run_id": run_id, "worker_id": worker_id, "gpu_seconds": each} for run_id, each in sorted(seconds.items())]
    # SQLAlchemy keeps the text of a statement with one row, and makes that of several anew each time.
    return insert.values(rows[0] if len(rows) == 1 else rows).on_conflict_do_update(
        index_elements=["run_id", "worker_id"],
        set_={"gpu_seconds": USAGE.gpu_seconds + insert.excluded.gpu_seconds},
    )
