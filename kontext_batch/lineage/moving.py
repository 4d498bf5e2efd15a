"""A workspace that was moved or copied as a whole: its database names objects where they lay before."""

from __future__ import annotations

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.runs import cancel_run
from kontext_batch.lineage.sql import exists, in_state, now
from kontext_batch.planning.states import StepState

ARTIFACTS = t.artifacts.c
UPLOADS = t.uploads.c
STEPS = t.steps.c


def artifact_elsewhere(conn: sa.Connection, prefix: str) -> str | None:
    """URI of some kept artifact that does not lie under `prefix`, which ends in `/`; none while a worker is at work."""
    at_work = exists(in_state(STEPS.state, StepState.LEASED), STEPS.lease_until > now())
    # As ranges, which the index over URIs answers; "0" follows "/". Every command asks this when it starts.
    outside = sa.or_(ARTIFACTS.uri < prefix, ARTIFACTS.uri >= prefix.removesuffix("/") + "0")
    return conn.scalar(sa.select(ARTIFACTS.uri).where(outside, ARTIFACTS.collected_at.is_(None), ~at_work).limit(1))


def follow_artifacts(conn: sa.Connection, old: str, new: str) -> None:
    """Artifacts of the prefix `old` lie under `new`.

    Runs that were not finished end as cancelled: their recipes and outputs lie where they lay before. Run again, the
    recipe goes on, since it shares their steps.
    """
    for run_id in conn.scalars(sa.select(t.runs.c.id).where(open_run())).all():
        cancel_run(conn, run_id, reason="the workspace was moved or copied; run the recipe from where it lies now")
    for column in (ARTIFACTS.uri, UPLOADS.uri):
        rest = sa.func.substr(column, len(old) + 1)
        conn.execute(
            sa.update(column.table)
            .where(sa.func.substr(column, 1, len(old)) == old)
            .values(uri=sa.literal(new).concat(rest))
        )
