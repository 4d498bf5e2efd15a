"""Everything that is known of a run's instances, a page at a time; and of one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.queries import attempts_of, step_rows
from kontext_batch.lineage.rows import picture_of
from kontext_batch.planning.states import StepState
from kontext_batch.ports import BatchMemberRow, BatchRow, ExportedDelivery, ExportedInstance

PAGE = 1000
"""Instances that are read at once."""
RUN_STEPS, DELIVERIES, ATTEMPTS, BATCHES, MEMBERS = (
    t.run_steps.c,
    t.deliveries.c,
    t.attempts.c,
    t.batches.c,
    t.batch_members.c,
)


def page(conn: sa.Connection, run_id: int, after: int) -> list[ExportedInstance]:
    """Of the run: the `PAGE` instances behind place `after` of the plan, less at its end. Raises `ObjectNotFound`."""
    if after < 0 and conn.scalar(sa.select(t.runs.c.id).where(t.runs.c.id == run_id)) is None:
        raise ObjectNotFound(f"there is no run {run_id}")
    rows = conn.execute(
        step_rows()
        .add_columns(RUN_STEPS.ordinal, RUN_STEPS.take, RUN_STEPS.cached)
        # A range, for places follow one another: PostgreSQL sorts the whole run for a limit.
        .where(RUN_STEPS.run_id == run_id, RUN_STEPS.ordinal.between(after + 1, after + PAGE))
        .order_by(RUN_STEPS.ordinal)
    ).all()
    attempts = attempts_of(conn, sorted({row.id for row in rows}))
    deliveries = _deliveries(conn, run_id, [row.ordinal for row in rows])
    return [
        ExportedInstance(
            ordinal=row.ordinal,
            node=row.node,
            axes=row.axes,
            candidate=row.candidate,
            take=row.take,
            step_id=row.id,
            key=row.key,
            operation=row.operation,
            lane=row.lane,
            state=StepState(row.state),
            cached=row.cached,
            error=row.error,
            artifact=picture_of(row),
            deliveries=tuple(deliveries[row.ordinal]),
            attempts=tuple(attempts[row.id]),
        )
        for row in rows
    ]


def _deliveries(conn: sa.Connection, run_id: int, ordinals: Sequence[int]) -> dict[int, list[ExportedDelivery]]:
    found: dict[int, list[ExportedDelivery]] = defaultdict(list)
    if ordinals:
        query = sa.select(t.deliveries).where(
            DELIVERIES.run_id == run_id, DELIVERIES.ordinal.between(ordinals[0], ordinals[-1])
        )
        for row in conn.execute(query.order_by(DELIVERIES.id)):
            found[row.ordinal].append(
                ExportedDelivery(row.path, row.state, row.delivered_path, row.delivered, row.withdrawn, row.error)
            )
    return found


def batch(conn: sa.Connection, batch_id: int) -> BatchRow:
    row = conn.execute(sa.select(t.batches).where(BATCHES.id == batch_id)).first()
    if row is None:
        raise ObjectNotFound(f"there is no batch {batch_id}; `steps logs STEP` shows those of a step")
    members = conn.execute(
        sa.select(t.batch_members, t.steps.c.key, ATTEMPTS.outcome, ATTEMPTS.timings)
        .join(t.steps, t.steps.c.id == MEMBERS.step_id)
        .outerjoin(t.attempts, (ATTEMPTS.step_id == MEMBERS.step_id) & (ATTEMPTS.batch_id == MEMBERS.batch_id))
        .where(MEMBERS.batch_id == batch_id)
        .order_by(MEMBERS.step_id)
    )
    return BatchRow(
        id=row.id,
        worker_id=row.worker_id,
        lane=row.lane,
        device=row.device,
        model_sha256=row.model_sha256,
        numeric_mode=row.numeric_mode,
        libraries=row.libraries,
        committed=row.committed,
        members=tuple(
            BatchMemberRow(each.step_id, each.key, each.joined, each.left, each.place, each.outcome, each.timings or {})
            for each in members
        ),
    )
