"""What made pictures what they are, for many steps at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.links import makers, walk_up
from kontext_batch.lineage.queries import attempts_of, step_row, step_rows
from kontext_batch.lineage.sql import among, by_indices
from kontext_batch.ports.tracing import BatchMate, Origin, StepBatch, StepDelivery, StepRead, TracedStep

RUNS, RUN_STEPS, STEPS, EDGES = t.runs.c, t.run_steps.c, t.steps.c, t.edges.c
SOURCES, OUTPUTS, ARTIFACTS = t.step_sources.c, t.step_outputs.c, t.artifacts.c
BATCHES, MEMBERS, DELIVERIES = t.batches.c, t.batch_members.c, t.deliveries.c


def above(conn: sa.Connection, step_ids: Iterable[int]) -> list[tuple[int, int]]:
    by_indices(conn)
    return [(child, parent) for parent, child in walk_up(conn, list(step_ids))]


def traced(conn: sa.Connection, step_ids: Iterable[int]) -> list[TracedStep]:
    by_indices(conn)
    ids = sorted(set(step_ids))
    reads, batches, attempts = _reads(conn, ids), _batches(conn, ids), attempts_of(conn, ids)
    delivered = deliveries(conn, ids)
    return [
        TracedStep(
            step=step_row(row),
            origin=Origin(
                run_id=row.run_id,
                created=row.asked,
                recipe=row.recipe,
                recipe_sha256=row.recipe_sha256,
                source=row.source,
                owner=row.owner,
                trigger=row.trigger,
                file=row.file,
                line=row.line,
            ),
            made=row.created,
            collected=row.collected_at,
            reads=tuple(reads[row.id]),
            batches=tuple(batches[row.id]),
            attempts=tuple(attempts[row.id]),
            deliveries=tuple(delivered[row.id]),
        )
        for row in conn.execute(_newest(ids))
    ]


def _newest(ids: Sequence[int]) -> sa.Select[Any]:
    """Each step once, as the first instance of the newest run has it."""
    return (
        step_rows()
        .add_columns(
            RUN_STEPS.run_id,
            RUN_STEPS.file,
            RUN_STEPS.line,
            RUNS.created.label("asked"),
            RUNS.recipe,
            RUNS.recipe_sha256,
            RUNS.source,
            RUNS.owner,
            RUNS.trigger,
            ARTIFACTS.created,
            ARTIFACTS.collected_at,
        )
        .join(t.runs, RUNS.id == RUN_STEPS.run_id)
        .where(among(STEPS.id, ids), in_newest_run())
        .order_by(STEPS.id)
    )


def in_newest_run() -> sa.ColumnElement[bool]:
    """The row of `run_steps` is the first of its step in the newest run that has the step."""
    other = t.run_steps.alias("newer")
    newest = sa.select(sa.func.max(other.c.run_id)).where(other.c.step_id == STEPS.id)
    return sa.and_(RUN_STEPS.first, RUN_STEPS.run_id == newest.correlate(t.steps).scalar_subquery())


def _reads(conn: sa.Connection, ids: Sequence[int]) -> dict[int, list[StepRead]]:
    """By role and position; a photo that was made here names its step."""
    found: dict[int, list[StepRead]] = defaultdict(list)
    pictures = sa.select(
        EDGES.child, EDGES.role, EDGES.position, EDGES.parent, ARTIFACTS.uri, ARTIFACTS.sha256
    ).outerjoin_from(
        sa.outerjoin(t.edges, t.step_outputs, sa.and_(OUTPUTS.step_id == EDGES.parent, OUTPUTS.slot == "image")),
        t.artifacts,
        ARTIFACTS.sha256 == OUTPUTS.sha256,
    )
    for row in conn.execute(pictures.where(among(EDGES.child, ids))):
        found[row.child].append(StepRead(row.role, row.position, row.parent, row.uri, row.sha256))
    photos = conn.execute(sa.select(t.step_sources).where(among(SOURCES.step_id, ids))).all()
    made: dict[str, list[int]] = defaultdict(list)
    for sha256, step_id in makers(conn, {row.sha256 for row in photos}):
        made[sha256].append(step_id)
    for row in photos:  # of several that made these bytes the first: the others may come from what it made
        maker = min((each for each in made[row.sha256] if each != row.step_id), default=None)
        found[row.step_id].append(StepRead(row.role, row.position, maker, row.uri, row.sha256))
    for reads in found.values():
        reads.sort(key=lambda read: (read.role != "image", read.role, read.position))
    return found


def _batches(conn: sa.Connection, ids: Sequence[int]) -> dict[int, list[StepBatch]]:
    rows = conn.execute(
        sa.select(t.batches, MEMBERS.step_id, MEMBERS.joined, MEMBERS.left, MEMBERS.place)
        .join(t.batch_members, MEMBERS.batch_id == BATCHES.id)
        .where(among(MEMBERS.step_id, ids))
        .order_by(BATCHES.id)
    ).all()
    mates = _mates(conn, ids)
    found: dict[int, list[StepBatch]] = defaultdict(list)
    for row in rows:
        found[row.step_id].append(
            StepBatch(
                id=row.id,
                worker_id=row.worker_id,
                device=row.device,
                model_sha256=row.model_sha256,
                numeric_mode=row.numeric_mode,
                libraries=row.libraries,
                committed=row.committed,
                joined=row.joined,
                left=row.left,
                place=row.place,
                mates=tuple(mates[row.step_id, row.id]),
            )
        )
    return found


def _mates(conn: sa.Connection, ids: Sequence[int]) -> dict[tuple[int, int], list[BatchMate]]:
    """(step, batch) -> those that were in during some of the same denoise steps."""
    other = t.batch_members.alias("mate")
    rows = conn.execute(
        sa.select(
            MEMBERS.step_id.label("of"),
            MEMBERS.batch_id,
            other.c.step_id,
            STEPS.key,
            other.c.joined,
            other.c.left,
            other.c.place,
        )
        .join(other, other.c.batch_id == MEMBERS.batch_id)
        .join(t.steps, STEPS.id == other.c.step_id)
        .where(
            among(MEMBERS.step_id, ids),
            other.c.step_id != MEMBERS.step_id,
            other.c.joined < MEMBERS.left,
            other.c.left > MEMBERS.joined,
        )
        .order_by(other.c.joined, other.c.place, other.c.step_id)
    )
    found: dict[tuple[int, int], list[BatchMate]] = defaultdict(list)
    for row in rows:
        found[row.of, row.batch_id].append(BatchMate(row.step_id, row.key, row.joined, row.left, row.place))
    return found


def deliveries(
    conn: sa.Connection, ids: Sequence[int], *, run_ids: Sequence[int] | None = None
) -> dict[int, list[StepDelivery]]:
    """Of these steps, in order of runs; `run_ids`: only of those runs."""
    query = sa.select(t.deliveries).where(among(DELIVERIES.step_id, ids))
    if run_ids is not None:
        query = query.where(among(DELIVERIES.run_id, run_ids))
    found: dict[int, list[StepDelivery]] = defaultdict(list)
    for row in conn.execute(query.order_by(DELIVERIES.run_id, DELIVERIES.id)):
        found[row.step_id].append(
            StepDelivery(
                step_id=row.step_id,
                run_id=row.run_id,
                path=row.path,
                state=row.state,
                delivered_path=row.delivered_path,
                version=row.version,
                sha256=row.sha256,
                file_sha256=row.file_sha256,
                delivered=row.delivered,
                withdrawn=row.withdrawn,
            )
        )
    return found
