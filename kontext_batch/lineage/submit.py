"""A plan becomes a run: the one transaction that stores run, steps, edges, instances and deliveries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import sqlalchemy as sa

from kontext_batch.errors import LeaseLost
from kontext_batch.hashing import canonical_json
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.graph import charge, collected, put_back
from kontext_batch.lineage.inbox import taken_by
from kontext_batch.lineage.reasking import Known, deps_left, to_run
from kontext_batch.lineage.schedules import started_by
from kontext_batch.lineage.sql import UtcTime, among, axes_text, bulk_insert, now
from kontext_batch.lineage.takedown import refuse_forgotten
from kontext_batch.planning.params import materials
from kontext_batch.planning.plan import Plan, PlannedStep
from kontext_batch.planning.states import LIVE, RunState, StepState
from kontext_batch.ports import NewRun

ANALYZE_FROM = 1000
"""Steps from which PostgreSQL is told to look at the tables anew: it plans badly for tables that it takes for empty."""

MOST_RANGES = 16
"""A run mostly has the steps that were made with it, whose ids follow one another, and those of an earlier run."""


def create_run(
    conn: sa.Connection,
    run: NewRun,
    plan: Plan,
    fire: tuple[int, int] | None = None,
    drop: tuple[int, int] | None = None,
) -> int:
    lock_graph(conn, alone=True)
    refuse_forgotten(conn, plan)
    run_id = _insert_run(conn, run)
    if fire is not None and not started_by(conn, *fire, run_id):
        raise LeaseLost("another process has taken over this time of the schedule")
    if drop is not None and not taken_by(conn, *drop, run_id):
        raise LeaseLost("another process has taken over this dropped recipe")
    place = {step.key: index for index, step in enumerate(plan.steps)}
    parents = [[place[each.parent] for each in step.inputs if each.parent is not None] for step in plan.steps]
    found = known_steps(conn, place)
    known = [found.get(step.key) for step in plan.steps]
    pictures = {place[delivery.key] for delivery in plan.deliveries}
    runs = to_run(parents, known, asked=range(len(parents)), pictures=pictures)

    new = [index for index, step in enumerate(known) if step is None]
    ids = [-1 if step is None else step.id for step in known]
    for index, number in zip(new, next_step_ids(conn, len(new)), strict=True):
        ids[index] = number
    waits = {index: deps_left(parents[index], runs) for index in range(len(runs)) if runs[index]}
    _insert_steps(conn, run_id, [(ids[index], plan.steps[index], waits[index]) for index in new])
    bulk_insert(
        conn,
        t.edges,
        ("child", "parent", "role", "position"),
        [
            (ids[index], ids[place[each.parent]], each.role, each.position)
            for index in new
            for each in plan.steps[index].inputs
            if each.parent is not None
        ],
    )

    again = [index for index, step in enumerate(known) if step is not None and runs[index] and step.state not in LIVE]
    _reword(conn, [(ids[index], plan.steps[index]) for index in again])
    put_back(conn, {ids[index]: waits[index] for index in again})
    running = [index for index, step in enumerate(known) if step is not None and runs[index]]
    conn.execute(sa.delete(t.step_sources).where(among(t.step_sources.c.step_id, [ids[index] for index in running])))
    _insert_sources(conn, [(ids[index], plan.steps[index]) for index in sorted({*new, *running})])

    stored = {key: (ids[index], not runs[index]) for key, index in place.items()}
    _insert_instances(conn, run_id, plan, stored)
    _insert_deliveries(conn, run_id, plan, stored)
    charge(conn, [ids[index] for index in running])
    _note_size(conn, run_id, ids, cached=runs.count(False))
    if len(new) >= ANALYZE_FROM and conn.dialect.name == "postgresql":
        conn.exec_driver_sql("ANALYZE steps, edges, run_steps, step_sources, deliveries")
    return run_id


def _note_size(conn: sa.Connection, run_id: int, ids: Sequence[int], *, cached: int) -> None:
    """What is for good: which steps the run has, and how many of them were done."""
    ranges: list[list[int]] = []
    for step_id in sorted(ids):
        if ranges and step_id == ranges[-1][1] + 1:
            ranges[-1][1] = step_id
        else:
            ranges.append([step_id, step_id])
    kept = ranges if len(ranges) <= MOST_RANGES else None
    conn.execute(sa.update(t.runs).where(t.runs.c.id == run_id).values(size=len(ids), cached=cached, ranges=kept))


def known_steps(conn: sa.Connection, keys: Iterable[str]) -> dict[str, Known]:
    """Those of `keys` that the database has."""
    rows = conn.execute(sa.select(t.steps.c.key, t.steps.c.id, t.steps.c.state).where(among(t.steps.c.key, keys)))
    listed = rows.all()
    lost = collected(conn, [row.id for row in listed if row.state == StepState.DONE])
    return {
        row.key: Known(row.id, StepState(row.state), row.state == StepState.DONE and row.id not in lost)
        for row in listed
    }


def _insert_run(conn: sa.Connection, run: NewRun) -> int:
    values = {
        "recipe": run.recipe,
        "recipe_sha256": run.recipe_sha256,
        "recipe_text": run.recipe_text,
        "source": run.source,
        "owner": run.owner,
        "trigger": run.trigger,
        "priority": run.priority,
        "selection": dict(run.selection),
        "budget": dict(run.budget),
        "state": RunState.RUNNING,
        "created": now(),
    }
    return int(conn.execute(sa.insert(t.runs).values(values).returning(t.runs.c.id)).scalar_one())


def next_step_ids(conn: sa.Connection, count: int) -> list[int]:
    """Ascending ids for `count` new steps."""
    if conn.dialect.name == "postgresql":
        rows = conn.exec_driver_sql(
            "SELECT nextval(pg_get_serial_sequence('steps', 'id')) FROM generate_series(1, %s)", (count,)
        )
        return sorted(row[0] for row in rows)
    last = conn.execute(sa.select(sa.func.coalesce(sa.func.max(t.steps.c.id), 0))).scalar_one()
    return list(range(last + 1, last + 1 + count))


def _insert_steps(conn: sa.Connection, run_id: int, new: Sequence[tuple[int, PlannedStep, int]]) -> None:
    moment = UtcTime().process_bind_param(conn.execute(sa.select(now())).scalar_one(), conn.dialect)
    columns = ("id", "key", "operation", "lane", "state", "deps_left", "run_id", "ready_since")
    bulk_insert(
        conn,
        t.steps,
        (*columns, "asked", "attempts", "losses", "lease_token"),
        [
            (
                step_id,
                step.key,
                step.operation,
                step.lane,
                (StepState.BLOCKED if count else StepState.READY).value,
                count,
                run_id,
                None if count else moment,
                1,
                0,
                0,
                0,
            )
            for step_id, step, count in new
        ],
    )
    bulk_insert(
        conn,
        t.step_params,
        ("step_id", "params"),
        [(step_id, canonical_json(step.params)) for step_id, step, _ in new],
    )
    bulk_insert(
        conn,
        t.step_materials,
        ("sha256", "step_id", "kind"),
        [(sha256, step_id, kind) for step_id, step, _ in new for sha256, kind in materials(step.params).items()],
    )


def _insert_sources(conn: sa.Connection, wanted: Sequence[tuple[int, PlannedStep]]) -> None:
    bulk_insert(
        conn,
        t.step_sources,
        ("step_id", "role", "position", "uri", "sha256"),
        [
            (step_id, each.role, each.position, each.source.uri, each.source.sha256)
            for step_id, step in wanted
            for each in step.inputs
            if each.source is not None
        ],
    )


def _reword(conn: sa.Connection, again: Sequence[tuple[int, PlannedStep]]) -> None:
    """Of equal keys the newest wording counts: a model or adapter may have another name by now."""
    if not again:
        return
    conn.execute(
        sa.update(t.steps).where(t.steps.c.id == sa.bindparam("step")),
        [{"step": step_id, "lane": step.lane} for step_id, step in again],
    )
    conn.execute(
        sa.update(t.step_params).where(t.step_params.c.step_id == sa.bindparam("step")),
        [{"step": step_id, "params": dict(step.params)} for step_id, step in again],
    )


def _insert_instances(conn: sa.Connection, run_id: int, plan: Plan, stored: dict[str, tuple[int, bool]]) -> None:
    steps = {step.key: step for step in plan.steps}
    seen: set[str] = set()
    rows = []
    for ordinal, instance in enumerate(plan.instances):
        step = steps[instance.key]
        step_id, cached = stored[instance.key]
        take = step.params.get("take", 0)
        place = (instance.node, axes_text(instance.axes), instance.candidate, take, step.origin.file, step.origin.line)
        rows.append((run_id, ordinal, step_id, *place, instance.key not in seen, cached))
        seen.add(instance.key)
    assert len(seen) == len(steps), "every step of a plan has an instance"
    columns = ("node", "axes", "candidate", "take", "file", "line", "first", "cached")
    bulk_insert(conn, t.run_steps, ("run_id", "ordinal", "step_id", *columns), rows)


def _insert_deliveries(conn: sa.Connection, run_id: int, plan: Plan, stored: dict[str, tuple[int, bool]]) -> None:
    ordinals = {instance: ordinal for ordinal, instance in enumerate(plan.instances)}
    rows = []
    for each in plan.deliveries:
        step_id, done = stored[each.key]
        state = "pending" if done else "waiting"
        rows.append((run_id, ordinals[each.instance], step_id, each.path, each.if_exists, state))
    bulk_insert(conn, t.deliveries, ("run_id", "ordinal", "step_id", "path", "if_exists", "state"), rows)
