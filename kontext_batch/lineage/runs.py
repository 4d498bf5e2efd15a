"""Runs after they were submitted: retry, cancel, finish, and their summaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.deliveries import IMPORTED
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.events import note_end
from kontext_batch.lineage.graph import cancel_unwanted, charge, collected, open_run, put_back
from kontext_batch.lineage.limits import failed_steps, gpu_seconds, pending_of_run
from kontext_batch.lineage.reasking import Known, deps_left, to_run
from kontext_batch.lineage.sql import among, exists, in_state, now, ordered_by_equal
from kontext_batch.lineage.takedown import forgotten_steps
from kontext_batch.planning.states import LIVE, UNSUCCESSFUL, RunState, StepState
from kontext_batch.ports import RunSummary

RUNS, STEPS, RUN_STEPS, DELIVERIES = t.runs.c, t.steps.c, t.run_steps.c, t.deliveries.c
ARRIVED = ("delivered", "skipped")


def retry_run(conn: sa.Connection, run_id: int, *, keys: Iterable[str] | None = None) -> int:
    lock_graph(conn, alone=True)
    _require(conn, run_id)
    steps, parents = _graph(conn, run_id)
    chosen = None if keys is None else _with_readers(parents, [row.key for row in steps], set(keys))
    lost = collected(conn, [row.id for row in steps if row.state == StepState.DONE])
    known = [Known(row.id, StepState(row.state), row.state == StepState.DONE and row.id not in lost) for row in steps]
    gone = forgotten_steps(conn, [row.id for row in steps])
    wanted = [index for index in (range(len(known)) if chosen is None else chosen) if known[index].id not in gone]
    asked = {index for index in wanted if known[index].state in UNSUCCESSFUL}
    undelivered = _undelivered(conn, run_id)
    pictures = {index for index in wanted if known[index].id in undelivered}
    runs = to_run(parents, known, asked=asked, pictures=pictures)
    again = {
        step.id: deps_left(parents[index], runs)
        for index, step in enumerate(known)
        if runs[index] and step.state not in LIVE
    }
    put_back(conn, again)
    open_again = {known[index].id: not runs[index] for index in pictures}
    for state, done in (("pending", True), ("waiting", False)):
        conn.execute(
            sa.update(t.deliveries)
            .where(
                DELIVERIES.run_id == run_id,
                among(DELIVERIES.step_id, [step_id for step_id, is_done in open_again.items() if is_done is done]),
                DELIVERIES.state.not_in(ARRIVED),
            )
            .values(state=state, error=None)
        )
    if again or pictures:
        conn.execute(
            sa.update(t.runs)
            .where(RUNS.id == run_id, RUNS.state != RunState.PAUSED)
            .values(state=RunState.RUNNING, finished=None, reason=None, drain=False)
        )
        _excuse(conn, run_id)
        charge(conn, [step.id for index, step in enumerate(known) if runs[index]])
    return len(again)


def _graph(conn: sa.Connection, run_id: int) -> tuple[Sequence[Any], list[list[int]]]:
    """The run's distinct steps, parents first, and for each the indices of its parents."""
    query = sa.select(STEPS.id, STEPS.key, STEPS.state).join(t.run_steps, RUN_STEPS.step_id == STEPS.id)
    steps = conn.execute(query.where(RUN_STEPS.run_id == run_id, RUN_STEPS.first).order_by(STEPS.id)).all()
    place = {row.id: index for index, row in enumerate(steps)}
    parents: list[list[int]] = [[] for _ in steps]
    edges = sa.select(t.edges.c.child, t.edges.c.parent).where(among(t.edges.c.child, place))
    for row in conn.execute(edges):
        parents[place[row.child]].append(place[row.parent])
    return steps, parents


def _with_readers(parents: Sequence[Sequence[int]], keys: Sequence[str], wanted: set[str]) -> set[int]:
    chosen: set[int] = set()
    for index, key in enumerate(keys):
        if key in wanted or not chosen.isdisjoint(parents[index]):
            chosen.add(index)
    return chosen


def _undelivered(conn: sa.Connection, run_id: int) -> set[int]:
    """Steps whose picture did not arrive where this run wants it; none of a run that was imported, which wants it in
    a place that an archive names."""
    query = sa.select(DELIVERIES.step_id).join(t.runs, RUNS.id == DELIVERIES.run_id)
    wanted = DELIVERIES.run_id == run_id, DELIVERIES.state.not_in(ARRIVED), RUNS.trigger != IMPORTED
    return set(conn.scalars(query.where(*wanted)))


def _excuse(conn: sa.Connection, run_id: int) -> None:
    """Somebody lets the run go on: what has failed so far is known."""
    conn.execute(sa.update(t.runs).where(RUNS.id == run_id).values(excused=failed_steps()))


def cancel_run(conn: sa.Connection, run_id: int, *, drain: bool = False, reason: str | None = None) -> int:
    lock_graph(conn, alone=True)
    _require(conn, run_id)
    cancelled = conn.execute(
        sa.update(t.runs)
        .where(RUNS.id == run_id, open_run())
        .values(state=RunState.CANCELLED, finished=now(), drain=drain, reason=reason)
    )
    if not cancelled.rowcount:
        return 0
    live = _live(conn, run_id)
    count = cancel_unwanted(conn, live)
    charge(conn, live)  # what other runs want goes on on their account
    note_end(conn, run(conn, run_id))
    return count


def pause_run(conn: sa.Connection, run_id: int, *, reason: str | None = None) -> bool:
    return _move(conn, run_id, RunState.RUNNING, RunState.PAUSED, reason=reason)


def resume_run(conn: sa.Connection, run_id: int, *, gpu_minutes: float | None = None) -> bool:
    moved = _move(conn, run_id, RunState.PAUSED, RunState.RUNNING)
    if not moved:
        return False
    _excuse(conn, run_id)
    if gpu_minutes is not None:
        budget = conn.scalar(sa.select(RUNS.budget).where(RUNS.id == run_id)) or {}
        raised = {**budget, "gpu_minutes": gpu_minutes}
        conn.execute(sa.update(t.runs).where(RUNS.id == run_id).values(budget=raised))
    return True


def prioritize_run(conn: sa.Connection, run_id: int, priority: int) -> None:
    lock_graph(conn, alone=True)
    _require(conn, run_id)
    conn.execute(sa.update(t.runs).where(RUNS.id == run_id).values(priority=priority))
    charge(conn, _live(conn, run_id))


def _move(conn: sa.Connection, run_id: int, old: RunState, new: RunState, *, reason: str | None = None) -> bool:
    lock_graph(conn, alone=True)
    _require(conn, run_id)
    moved = conn.execute(
        sa.update(t.runs).where(RUNS.id == run_id, RUNS.state == old).values(state=new, reason=reason)
    ).rowcount
    if moved:
        charge(conn, _live(conn, run_id))
        if new is RunState.RUNNING:  # they could not be claimed before: they wait from now on
            ready = sa.and_(STEPS.run_id == run_id, in_state(STEPS.state, StepState.READY))
            conn.execute(sa.update(t.steps).where(ready).values(ready_since=now()))
    return bool(moved)


def _live(conn: sa.Connection, run_id: int) -> Sequence[int]:
    """The run's steps that are live."""
    query = sa.select(STEPS.id).join(t.run_steps, RUN_STEPS.step_id == STEPS.id)
    return conn.scalars(query.where(RUN_STEPS.run_id == run_id, RUN_STEPS.first, in_state(STEPS.state, *LIVE))).all()


def finishable(conn: sa.Connection) -> list[int]:
    """Open runs with no live step and nothing left to deliver.

    PostgreSQL answers EXISTS by reading such rows of all runs, and a LIMIT without an order by reading the table until
    it meets one; so each look has the order of its index.
    """
    # Most open runs have live steps on their own account, which an index tells at once; only the others are asked for
    # steps that they share.
    live = in_state(STEPS.state, *LIVE)
    own = sa.select(STEPS.id).where(ordered_by_equal(STEPS.run_id, RUNS.id), live).order_by(STEPS.run_id)
    idle = list(conn.scalars(sa.select(RUNS.id).where(open_run(), _none(own), _none(pending_of_run()))))
    if not idle:
        return []
    wanted = exists(RUN_STEPS.run_id == RUNS.id, RUN_STEPS.step_id == STEPS.id, outer=(t.runs, t.steps))
    shared = sa.select(STEPS.id).where(live, wanted).order_by(STEPS.run_id)
    return list(conn.scalars(sa.select(RUNS.id).where(among(RUNS.id, idle), _none(shared)).order_by(RUNS.id)))


def _none(rows: sa.Select[tuple[int]]) -> sa.ColumnElement[bool]:
    """The run of the enclosing statement has no such row."""
    return rows.limit(1).correlate(t.runs).scalar_subquery().is_(None)


def finish_runs(conn: sa.Connection) -> list[tuple[int, RunState]]:
    lock_graph(conn, alone=True)
    finished = []
    for summary in _summaries(conn, RUNS.id.in_(finishable(conn))):
        state = final_state(summary)
        # A paused run may end: what was begun was all that was left. Then nothing stands against it any more.
        moment = conn.scalar(
            sa.update(t.runs)
            .where(RUNS.id == summary.id)
            .values(state=state, finished=now(), reason=None)
            .returning(RUNS.finished)
        )
        note_end(conn, replace(summary, state=state, finished=moment, reason=None))
        finished.append((summary.id, state))
    return sorted(finished)


def final_state(summary: RunSummary) -> RunState:
    """What a run has come to that has no live step and nothing left to deliver."""
    done = summary.steps.get(StepState.DONE, 0)
    if done == sum(summary.steps.values()) and summary.delivered == summary.deliveries:
        return RunState.DONE
    achieved = summary.delivered if summary.deliveries else done
    return RunState.PARTIAL if achieved else RunState.FAILED


# ------------------------------------------------------------------------------------------------------ summaries


def run(conn: sa.Connection, run_id: int) -> RunSummary:
    found = _summaries(conn, RUNS.id == run_id)
    if not found:
        raise _unknown(run_id)
    return found[0]


def newest_runs(conn: sa.Connection, *, limit: int) -> list[RunSummary]:
    newest = sa.select(RUNS.id).order_by(RUNS.id.desc()).limit(limit)
    return _summaries(conn, RUNS.id.in_(newest))


def recipe_text(conn: sa.Connection, run_id: int) -> str:
    text: str | None = conn.scalar(sa.select(RUNS.recipe_text).where(RUNS.id == run_id))
    if text is None:
        raise _unknown(run_id)
    return text


def _summaries(conn: sa.Connection, wanted: sa.ColumnElement[bool]) -> list[RunSummary]:
    """Newest first."""
    query = sa.select(t.runs, gpu_seconds().label("gpu_seconds")).where(wanted).order_by(RUNS.id.desc())
    rows = conn.execute(query).all()
    return [_summary(row, *_counts(conn, row.id, row.ranges)) for row in rows]


def _counts(
    conn: sa.Connection, run_id: int, ranges: Sequence[Sequence[int]] | None
) -> tuple[dict[StepState, int], dict[str, int]]:
    """The run's distinct steps by state, and its deliveries by state, in one round trip.

    Steps are found by the ranges of their ids where these are known: a third of the work.
    """
    steps = sa.select(sa.literal("step").label("of"), STEPS.state, sa.func.count().label("number"))
    if ranges is None:
        steps = steps.join(t.run_steps, STEPS.id == RUN_STEPS.step_id)
        steps = steps.where(RUN_STEPS.run_id == run_id, RUN_STEPS.first)
    else:
        steps = steps.where(sa.or_(sa.false(), *(STEPS.id.between(first, last) for first, last in ranges)))
    deliveries = sa.select(sa.literal("delivery"), DELIVERIES.state, sa.func.count()).where(DELIVERIES.run_id == run_id)
    rows = conn.execute(sa.union_all(steps.group_by(STEPS.state), deliveries.group_by(DELIVERIES.state))).all()
    return (
        {StepState(row.state): row.number for row in rows if row.of == "step"},
        {row.state: row.number for row in rows if row.of == "delivery"},
    )


def _summary(row: sa.Row[Any], steps: Mapping[StepState, int], deliveries: Mapping[str, int]) -> RunSummary:
    return RunSummary(
        id=row.id,
        recipe=row.recipe,
        recipe_sha256=row.recipe_sha256,
        source=row.source,
        owner=row.owner,
        trigger=row.trigger,
        priority=row.priority,
        state=RunState(row.state),
        created=row.created,
        finished=row.finished,
        steps=steps,
        cached=row.cached,
        deliveries=sum(deliveries.values()),
        delivered=sum(deliveries.get(state, 0) for state in ARRIVED),
        failed_deliveries=deliveries.get("failed", 0),
        skipped_deliveries=deliveries.get("skipped", 0),
        reason=row.reason,
        gpu_seconds=row.gpu_seconds,
        budget=row.budget,
    )


def _require(conn: sa.Connection, run_id: int) -> None:
    if conn.scalar(sa.select(RUNS.id).where(RUNS.id == run_id)) is None:
        raise _unknown(run_id)


def _unknown(run_id: int) -> ObjectNotFound:
    return ObjectNotFound(f"there is no run {run_id}")
