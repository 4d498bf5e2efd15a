"""Moves of many steps at once along the graph: free, skip, put back, cancel.

Each keeps what `verify` checks: a blocked step's `deps_left` is the number of its distinct parents that are not done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.sql.dml import ReturningUpdate

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import among, among_later, exists, in_state, now, pair_in
from kontext_batch.planning.states import LIVE, OPEN_RUNS, RunState, StepState

STEPS = t.steps.c


def free_children(conn: sa.Connection, done: Sequence[int]) -> dict[str, int]:
    """Count `done` steps off their blocked children; returns lane -> number of those that became ready."""
    woken: dict[str, int] = {}
    for row in conn.execute(_count_off(conn.dialect.name), {"done": list(done)}):
        if row.state == StepState.READY:
            woken[row.lane] = woken.get(row.lane, 0) + 1
    return woken


@cache
def _count_off(dialect: str) -> ReturningUpdate[Any]:
    waiting = (
        sa.select(t.edges.c.child, sa.func.count(t.edges.c.parent.distinct()).label("freed"))
        .where(among_later(t.edges.c.parent, "done"))
        .group_by(t.edges.c.child)
        .subquery("waiting")
    )
    left = STEPS.deps_left - waiting.c.freed
    update = (
        sa.update(t.steps)
        .where(STEPS.id == waiting.c.child, in_state(STEPS.state, StepState.BLOCKED))
        .values(
            deps_left=left,
            state=sa.case((left == 0, StepState.READY.value), else_=StepState.BLOCKED.value),
            ready_since=sa.case((left == 0, now())),
        )
        .returning(STEPS.lane, STEPS.state)
    )
    if dialect == "postgresql":  # commits that share children lock them in one order
        locked = (
            sa.select(STEPS.id)
            .where(STEPS.id.in_(sa.select(t.edges.c.child).where(among_later(t.edges.c.parent, "done"))))
            .order_by(STEPS.id)
            .with_for_update(key_share=True)
            .cte("locked")
        )
        update = update.where(STEPS.id == locked.c.id)
    return update


def skip_below(conn: sa.Connection, unsuccessful: Sequence[int]) -> int:
    """Skip every blocked step that reads, directly or not, one of these; returns how many."""
    if not unsuccessful:
        return 0
    below = sa.select(t.edges.c.child).where(among(t.edges.c.parent, unsuccessful)).cte("below", recursive=True)
    below = below.union(sa.select(t.edges.c.child).join(below, t.edges.c.parent == below.c.child))
    return conn.execute(
        sa.update(t.steps)
        .where(STEPS.id.in_(sa.select(below.c.child)), in_state(STEPS.state, StepState.BLOCKED))
        .values(state=StepState.SKIPPED)
    ).rowcount


def collected(conn: sa.Connection, step_ids: Sequence[int]) -> set[int]:
    """Those of `step_ids`, done steps, that have an output whose bytes were removed."""
    outputs, artifacts = t.step_outputs, t.artifacts
    query = (
        sa.select(outputs.c.step_id)
        .join(artifacts, artifacts.c.sha256 == outputs.c.sha256)
        .where(among(outputs.c.step_id, step_ids), artifacts.c.collected_at.is_not(None))
    )
    return set(conn.scalars(query))


def put_back(conn: sa.Connection, waits: Mapping[int, int]) -> None:
    """Ask anew for steps in a final state: id -> parents to wait for. What they made before is no longer their output.

    The artifact, the attempts and what was delivered stay for the lineage.
    """
    if not waits:
        return
    conn.execute(sa.delete(t.step_outputs).where(among(t.step_outputs.c.step_id, waits)))
    conn.execute(
        sa.update(t.deliveries)
        .where(among(t.deliveries.c.step_id, waits), t.deliveries.c.state == "pending")
        .values(state="waiting")
    )
    by_count: dict[int, list[int]] = {}
    for step_id, count in waits.items():
        by_count.setdefault(count, []).append(step_id)
    for count, step_ids in by_count.items():
        conn.execute(
            sa.update(t.steps)
            .where(among(STEPS.id, step_ids), sa.not_(in_state(STEPS.state, *LIVE)))
            .values(
                state=StepState.BLOCKED if count else StepState.READY,
                deps_left=count,
                asked=STEPS.asked + 1,
                attempts=0,
                losses=0,
                batch_limit=None,
                not_before=None,
                error=None,
                ready_since=None if count else now(),
            )
        )
    _wait_again(conn, waits)


def _wait_again(conn: sa.Connection, remade: Collection[int]) -> None:
    """Let the blocked and ready steps that read `remade` wait for them; a leased one goes on with what it has read.

    There are such steps only when a picture was lost behind the database's back: what is collected in order is read
    by no live step.
    """
    reading = STEPS.id.in_(sa.select(t.edges.c.child).where(among(t.edges.c.parent, remade)))
    undone = _undone_parents()
    conn.execute(
        sa.update(t.steps)
        .where(reading, in_state(STEPS.state, StepState.BLOCKED), STEPS.deps_left != undone)
        .values(deps_left=undone)
    )
    _block(conn, reading)


def _block(conn: sa.Connection, which: sa.ColumnElement[bool]) -> None:
    """Ready steps that have to wait after all are cancelled and asked for anew: they may not just go back."""
    undone = _undone_parents()
    found = conn.execute(
        sa.select(STEPS.id, undone.label("waits")).where(which, in_state(STEPS.state, StepState.READY), undone > 0)
    )
    early = {row.id: row.waits for row in found}
    if early:
        conn.execute(sa.update(t.steps).where(among(STEPS.id, early)).values(state=StepState.CANCELLED))
        put_back(conn, early)


def _undone_parents() -> sa.ScalarSelect[int]:
    parent = t.steps.alias("parent")
    return (
        sa.select(sa.func.count(t.edges.c.parent.distinct()))
        .where(t.edges.c.child == STEPS.id, parent.c.id == t.edges.c.parent)
        .where(sa.not_(in_state(parent.c.state, StepState.DONE)))
        .correlate(t.steps)
        .scalar_subquery()
    )


def open_run() -> sa.ColumnElement[bool]:
    """A run that still wants its steps."""
    return t.runs.c.state.in_([sa.literal_column(f"'{state.value}'") for state in sorted(OPEN_RUNS)])


def charge(conn: sa.Connection, step_ids: Sequence[int]) -> None:
    """Put live steps on the account of the right one of the open runs that want them.

    A running one before a paused one, then the highest priority, then the oldest. Claims are made run by run, so this
    is what makes priorities, pauses, caps and turns hold for shared steps too.
    """
    if not step_ids:
        return
    right = (
        sa.select(t.runs.c.id)
        .join(t.run_steps, t.run_steps.c.run_id == t.runs.c.id)
        .where(t.run_steps.c.step_id == STEPS.id, open_run())
        .order_by(t.runs.c.state == RunState.PAUSED, t.runs.c.priority.desc(), t.runs.c.id)
        .limit(1)
        .scalar_subquery()
    )
    conn.execute(
        sa.update(t.steps)
        .where(among(STEPS.id, step_ids), in_state(STEPS.state, *LIVE), STEPS.run_id.is_distinct_from(right))
        .values(run_id=sa.func.coalesce(right, STEPS.run_id))
    )


def cancel_unwanted(conn: sa.Connection, step_ids: Sequence[int]) -> int:
    """Cancel those of `step_ids` that are blocked or ready while no open run wants them; returns how many."""
    if not step_ids:
        return 0
    wanted = exists(
        t.run_steps.c.step_id == STEPS.id,
        t.runs.c.id == t.run_steps.c.run_id,
        open_run(),
        outer=t.steps,
    )
    return conn.execute(
        sa.update(t.steps)
        .where(among(STEPS.id, step_ids), in_state(STEPS.state, StepState.BLOCKED, StepState.READY), sa.not_(wanted))
        .values(state=StepState.CANCELLED)
    ).rowcount


def welcome_back(conn: sa.Connection, step_ids: Sequence[int]) -> None:
    """Steps whose lease was given back are ready; those that nobody wants, or that must wait by now, are not."""
    if step_ids:
        cancel_unwanted(conn, step_ids)
        _block(conn, among(STEPS.id, step_ids))


def end_attempts(conn: sa.Connection, pairs: Sequence[tuple[int, int]], outcome: str, error: str | None) -> None:
    """Close attempts that came to nothing; what they were about to upload is nobody's."""
    if not pairs:
        return
    conn.execute(
        sa.update(t.attempts)
        .where(pair_in(t.attempts.c.step_id, t.attempts.c.token, pairs), t.attempts.c.outcome.is_(None))
        .values(outcome=outcome, error=error, ended=now())
    )
    conn.execute(
        sa.update(t.uploads)
        .where(pair_in(t.uploads.c.step_id, t.uploads.c.token, pairs), t.uploads.c.state == "intent")
        .values(state="orphaned")
    )
