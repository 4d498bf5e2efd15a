"""What the limits of runs are compared with: failures by an index that holds no other steps, use by its counters."""

from __future__ import annotations

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import DialectInsert, dialect_insert, in_state
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
    # Equality in two halves, so that PostgreSQL goes by the index that has these rows together: see `runs.finishable`.
    of_lane = STEPS.lane >= OPERATIONS_LANE, STEPS.lane <= OPERATIONS_LANE
    steps = sa.select(STEPS.id).where(STEPS.run_id == RUNS.id, *of_lane, in_state(STEPS.state, StepState.READY))
    pending = DELIVERIES.state >= "pending", DELIVERIES.state <= "pending"
    deliveries = sa.select(DELIVERIES.id).where(DELIVERIES.run_id == RUNS.id, *pending)
    waiting = _number(steps.order_by(STEPS.lane), limit) + _number(deliveries.order_by(DELIVERIES.state), limit)
    found = set(conn.scalars(sa.select(RUNS.id).where(RUNS.state == RunState.RUNNING, waiting > limit)))
    if not found:
        return []
    wanted = t.run_steps.join(t.runs, RUNS.id == t.run_steps.c.run_id)
    wanted_elsewhere = (
        sa.exists()
        .select_from(wanted)
        .where(
            t.run_steps.c.step_id == STEPS.id,
            t.run_steps.c.run_id != STEPS.run_id,
            RUNS.state == RunState.RUNNING,
            RUNS.id.not_in(found),
        )
        .correlate(t.steps)
    )
    of_model = in_state(STEPS.state, StepState.READY), STEPS.lane != OPERATIONS_LANE
    shared = sa.select(STEPS.run_id).where(STEPS.run_id.in_(found), *of_model, wanted_elsewhere).distinct()
    return sorted(found - set(conn.scalars(shared)))


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
