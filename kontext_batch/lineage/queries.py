"""Questions to the database: what the planner wants to know, and what people ask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from kontext_batch.hashing import ALGORITHM
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.rows import ARTIFACT_ROW, picture_of, with_picture
from kontext_batch.lineage.sql import among, dialect_insert, now
from kontext_batch.lineage.submit import known_steps
from kontext_batch.planning.plan import InstanceId
from kontext_batch.planning.states import StepState
from kontext_batch.ports import (
    AttemptRow,
    InputRecord,
    ModelRow,
    SourceInput,
    StepRow,
    StepUse,
    StoredInstance,
)

STEPS, RUN_STEPS, EDGES, SOURCES = t.steps.c, t.run_steps.c, t.edges.c, t.step_sources.c
RECENT_BATCHES = 20
"""Of each lane, for its mean time."""
SHORTEST_PREFIX = 4
"""Of a key or hash, for `find_steps`: shorter ones are found everywhere."""

# ------------------------------------------------------------------------------------------------------- planning


def step_states(conn: sa.Connection, keys: Iterable[str]) -> dict[str, StepState]:
    found = known_steps(conn, keys)
    return {key: step.state for key, step in found.items() if step.kept or step.state is not StepState.DONE}


def latest_instances(conn: sa.Connection, recipe: str) -> dict[InstanceId, StoredInstance]:
    age = sa.func.row_number().over(
        partition_by=(RUN_STEPS.node, RUN_STEPS.axes, RUN_STEPS.candidate), order_by=RUN_STEPS.run_id.desc()
    )
    ranked = (
        sa.select(t.run_steps, age.label("age"))
        .join(t.runs, t.runs.c.id == RUN_STEPS.run_id)
        .where(t.runs.c.recipe == recipe)
        .subquery("ranked")
    )
    rows = conn.execute(
        sa.select(ranked, STEPS.key, STEPS.operation, STEPS.state, t.step_params.c.params)
        .join(t.steps, STEPS.id == ranked.c.step_id)
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
        .where(ranked.c.age == 1)
        .order_by(ranked.c.run_id, ranked.c.ordinal)
    ).all()
    inputs = step_inputs(conn, {row.step_id for row in rows})
    return {(row.node, row.axes, row.candidate): _instance(row, inputs.get(row.step_id, ())) for row in rows}


def _instance(row: sa.Row[Any], inputs: Sequence[tuple[str, int, str, str]]) -> StoredInstance:
    return StoredInstance(
        node=row.node,
        axes=row.axes,
        candidate=row.candidate,
        take=row.take,
        key=row.key,
        operation=row.operation,
        params=row.params,
        inputs=tuple(inputs),
        state=StepState(row.state),
    )


def step_inputs(conn: sa.Connection, step_ids: Iterable[int]) -> dict[int, list[tuple[str, int, str, str]]]:
    ids = sorted(step_ids)
    found: dict[int, list[tuple[str, int, str, str]]] = {}
    for row in conn.execute(sa.select(t.step_sources).where(among(SOURCES.step_id, ids))):
        found.setdefault(row.step_id, []).append((row.role, row.position, row.uri, row.sha256))
    read = sa.select(EDGES.child, EDGES.role, EDGES.position, STEPS.key).join(t.steps, STEPS.id == EDGES.parent)
    for row in conn.execute(read.where(among(EDGES.child, ids))):
        found.setdefault(row.child, []).append((row.role, row.position, "", row.key))
    for inputs in found.values():
        inputs.sort()
    return found


def lane_seconds(conn: sa.Connection) -> dict[str, float]:
    """What a step of the last batches took of the device or, where none sampled it, of the processor."""
    batches, attempts = t.batches.c, t.attempts.c
    seconds = sa.func.coalesce(attempts.timings["sample"].as_float(), attempts.timings["operate"].as_float())
    ranked = sa.select(
        batches.id,
        batches.lane,
        sa.func.row_number().over(partition_by=batches.lane, order_by=batches.id.desc()).label("age"),
    ).subquery("ranked")
    means = (
        sa.select(ranked.c.lane, sa.func.avg(seconds).label("mean"))
        .join(t.attempts, attempts.batch_id == ranked.c.id)
        .where(ranked.c.age <= RECENT_BATCHES, attempts.outcome == "ok", seconds.is_not(None))
        .group_by(ranked.c.lane)
    )
    return {row.lane: float(row.mean) for row in conn.execute(means)}


def inputs(conn: sa.Connection, uris: Iterable[str]) -> dict[str, InputRecord]:
    rows = conn.execute(sa.select(t.inputs).where(among(t.inputs.c.uri, uris)))
    return {
        row.uri: InputRecord(row.uri, row.etag, row.sha256, row.bytes, row.width, row.height, row.format, row.problem)
        for row in rows
    }


def remember_inputs(conn: sa.Connection, records: Sequence[InputRecord]) -> None:
    _upsert(
        conn,
        t.inputs,
        ["uri"],
        [
            {
                "uri": each.uri,
                "etag": each.etag,
                "sha256": each.sha256,
                "bytes": each.bytes,
                "width": each.width,
                "height": each.height,
                "format": each.format,
                "problem": each.problem,
            }
            for each in sorted({each.uri: each for each in records}.values(), key=lambda each: each.uri)
        ],
        seen=now(),
    )


def remember_models(conn: sa.Connection, rows: Sequence[ModelRow]) -> None:
    _upsert(
        conn,
        t.models,
        ["sha256", "name"],
        [
            {"sha256": each.sha256, "name": each.name, "layout": each.layout, "licence": each.licence}
            for each in sorted(rows, key=lambda each: (each.sha256, each.name))
        ],
    )


def models(conn: sa.Connection) -> list[ModelRow]:
    rows = conn.execute(sa.select(t.models).order_by(t.models.c.name, t.models.c.sha256))
    return [ModelRow(row.name, row.layout, row.sha256, row.licence) for row in rows]


def _upsert(
    conn: sa.Connection, table: sa.Table, by: Sequence[str], rows: Sequence[Mapping[str, Any]], **values: Any
) -> None:
    """Insert or replace; locked in the order of `rows`."""
    if not rows:
        return
    insert = dialect_insert(conn, table)
    replaced = {name: insert.excluded[name] for name in [*rows[0], *values] if name not in by}
    statement = insert.values(**values) if values else insert
    conn.execute(statement.on_conflict_do_update(index_elements=list(by), set_=replaced), list(rows))


# ------------------------------------------------------------------------------------------------------ questions


def run_steps(conn: sa.Connection, run_id: int, *, states: Iterable[StepState] | None = None) -> list[StepRow]:
    query = step_rows().where(RUN_STEPS.run_id == run_id).order_by(RUN_STEPS.ordinal)
    if states is not None:
        query = query.where(among(STEPS.state, [state.value for state in states]))
    return [step_row(row) for row in conn.execute(query)]


def steps_by_id(conn: sa.Connection, ids: Iterable[int]) -> list[StepRow]:
    return _newest(conn, step_rows().where(among(STEPS.id, ids)))


def find_steps(conn: sa.Connection, text: str, *, run_id: int | None = None) -> list[StepRow]:
    text = text.strip()
    if not text:
        return []
    place = (RUN_STEPS.run_id, RUN_STEPS.ordinal)
    deliveries, outputs = t.deliveries.c, t.step_outputs.c
    by_step = sa.select(*place).join(t.steps, STEPS.id == RUN_STEPS.step_id)
    by_output = sa.select(*place).join(t.step_outputs, outputs.step_id == RUN_STEPS.step_id)
    by_delivery = sa.select(deliveries.run_id, deliveries.ordinal)
    found = [sa.select(*place).where(RUN_STEPS.node == text), by_step.where(STEPS.key == text)]
    ends = {text.lstrip("/"), quote(text.lstrip("/"))}  # file: URIs are percent-encoded, s3: URIs are not
    for column in (deliveries.path, deliveries.delivered_path):
        at_end = (column.endswith(f"/{end}", autoescape=True) for end in ends)
        found.append(by_delivery.where(sa.or_(column == text, *at_end)))
    if len(text) >= SHORTEST_PREFIX:
        for prefix in (text, f"{ALGORITHM}:{text}"):
            found.append(by_step.where(STEPS.key.startswith(prefix, autoescape=True)))
        found.append(by_output.where(outputs.sha256.startswith(text, autoescape=True)))
        found.append(by_delivery.where(deliveries.sha256.startswith(text, autoescape=True)))
    places = sa.union(*found).subquery("places")
    query = step_rows().join(
        places, sa.and_(places.c.run_id == RUN_STEPS.run_id, places.c.ordinal == RUN_STEPS.ordinal)
    )
    if run_id is not None:
        rows = conn.execute(query.where(RUN_STEPS.run_id == run_id).order_by(RUN_STEPS.ordinal))
        return [step_row(row) for row in rows]
    return _newest(conn, query)


def _newest(conn: sa.Connection, query: sa.Select[Any]) -> list[StepRow]:
    """Each step once, as the newest of the runs found has it, in order of step ids."""
    found: dict[int, StepRow] = {}
    for row in conn.execute(query.order_by(STEPS.id, RUN_STEPS.run_id.desc(), RUN_STEPS.ordinal)):
        if row.id not in found:
            found[row.id] = step_row(row)
    return list(found.values())


def step_rows() -> sa.Select[Any]:
    """Instances with their steps and pictures."""
    return with_picture(
        sa.select(
            STEPS.id,
            STEPS.key,
            RUN_STEPS.node,
            RUN_STEPS.axes,
            RUN_STEPS.candidate,
            STEPS.operation,
            STEPS.lane,
            STEPS.state,
            STEPS.attempts,
            STEPS.losses,
            STEPS.error,
            t.step_params.c.params,
            *ARTIFACT_ROW,
        )
        .select_from(t.run_steps)
        .join(t.steps, STEPS.id == RUN_STEPS.step_id)
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
    )


def step_row(row: sa.Row[Any]) -> StepRow:
    return StepRow(
        id=row.id,
        key=row.key,
        node=row.node,
        axes=row.axes,
        candidate=row.candidate,
        operation=row.operation,
        lane=row.lane,
        state=StepState(row.state),
        attempts=row.attempts,
        losses=row.losses,
        error=row.error,
        params=row.params,
        artifact=picture_of(row),
    )


def attempts(conn: sa.Connection, step_id: int) -> list[AttemptRow]:
    columns = t.attempts.c
    rows = conn.execute(sa.select(t.attempts).where(columns.step_id == step_id).order_by(columns.token))
    return [attempt_row(row) for row in rows]


def attempts_of(conn: sa.Connection, step_ids: Iterable[int]) -> dict[int, list[AttemptRow]]:
    """The same of many steps."""
    found: dict[int, list[AttemptRow]] = defaultdict(list)
    query = sa.select(t.attempts).where(among(t.attempts.c.step_id, step_ids))
    for row in conn.execute(query.order_by(t.attempts.c.step_id, t.attempts.c.token)):
        found[row.step_id].append(attempt_row(row))
    return found


def attempt_row(row: sa.Row[Any]) -> AttemptRow:
    return AttemptRow(
        row.number, row.worker_id, row.batch_id, row.started, row.ended, row.outcome, row.error, row.timings, row.asked
    )


def step_uses(conn: sa.Connection, step_id: int) -> list[StepUse]:
    rows = conn.execute(
        sa.select(t.run_steps, t.runs.c.recipe, t.runs.c.created)
        .join(t.runs, t.runs.c.id == RUN_STEPS.run_id)
        .where(RUN_STEPS.step_id == step_id, RUN_STEPS.first)
        .order_by(RUN_STEPS.run_id)
    )
    return [
        StepUse(
            run_id=row.run_id,
            recipe=row.recipe,
            created=row.created,
            node=row.node,
            axes=row.axes,
            candidate=row.candidate,
            cached=row.cached,
            file=row.file,
            line=row.line,
        )
        for row in rows
    ]


def nearest_instance(conn: sa.Connection, use: StepUse, *, later: bool) -> tuple[int, int, StoredInstance] | None:
    beyond = RUN_STEPS.run_id > use.run_id if later else RUN_STEPS.run_id < use.run_id
    row = conn.execute(
        sa.select(t.run_steps, STEPS.key, STEPS.operation, STEPS.state, t.step_params.c.params)
        .join(t.runs, t.runs.c.id == RUN_STEPS.run_id)
        .join(t.steps, STEPS.id == RUN_STEPS.step_id)
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
        .where(
            t.runs.c.recipe == use.recipe,
            beyond,
            RUN_STEPS.node == use.node,
            RUN_STEPS.axes == use.axes,
            RUN_STEPS.candidate == use.candidate,
        )
        .order_by(RUN_STEPS.run_id if later else RUN_STEPS.run_id.desc())
        .limit(1)
    ).first()
    if row is None:
        return None
    return row.run_id, row.step_id, _instance(row, step_inputs(conn, [row.step_id]).get(row.step_id, ()))


def ancestors(conn: sa.Connection, step_id: int) -> list[tuple[int, int, str]]:
    above = sa.select(EDGES.child, EDGES.parent, EDGES.role).where(EDGES.child == step_id)
    walk = above.cte("above", recursive=True)
    walk = walk.union(sa.select(EDGES.child, EDGES.parent, EDGES.role).join(walk, EDGES.child == walk.c.parent))
    query = sa.select(walk.c.child, walk.c.parent, walk.c.role)
    rows = conn.execute(query.order_by(walk.c.child.desc(), walk.c.parent, walk.c.role))
    return [(row.child, row.parent, row.role) for row in rows]


def step_sources(conn: sa.Connection, step_id: int) -> list[SourceInput]:
    query = sa.select(t.step_sources).where(SOURCES.step_id == step_id).order_by(SOURCES.role, SOURCES.position)
    return [SourceInput(row.role, row.position, row.uri, row.sha256) for row in conn.execute(query)]
