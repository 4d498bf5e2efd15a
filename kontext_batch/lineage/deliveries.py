"""What is to be brought where the recipe wants it."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.sql import now, stored_text
from kontext_batch.ports import Artifact, PendingDelivery

DELIVERIES = t.deliveries.c


def pending_deliveries(conn: sa.Connection, run_id: int | None = None, *, limit: int) -> list[PendingDelivery]:
    """Of open runs: what a cancelled or finished run left behind is delivered when that run is retried."""
    artifacts = t.artifacts.c
    query = (
        sa.select(DELIVERIES.id, DELIVERIES.run_id, DELIVERIES.path, DELIVERIES.if_exists, *_columns())
        .join(t.runs, t.runs.c.id == DELIVERIES.run_id)
        .join(t.step_outputs, t.step_outputs.c.step_id == DELIVERIES.step_id)
        .join(t.artifacts, artifacts.sha256 == t.step_outputs.c.sha256)
        .where(open_run(), DELIVERIES.state == "pending", t.step_outputs.c.slot == "image")
        .order_by(DELIVERIES.id)
        .limit(limit)
    )
    if run_id is not None:
        query = query.where(DELIVERIES.run_id == run_id)
    return [_delivery(row) for row in conn.execute(query)]


def record_delivery(conn: sa.Connection, delivery_id: int, *, path: str, version: int, skipped: str | None) -> None:
    outputs = t.step_outputs.c
    sha256 = sa.select(outputs.sha256).where(outputs.step_id == DELIVERIES.step_id, outputs.slot == "image")
    conn.execute(
        sa.update(t.deliveries)
        .where(DELIVERIES.id == delivery_id)
        .values(
            state="delivered" if skipped is None else "skipped",
            sha256=sha256.scalar_subquery(),
            delivered_path=path,
            version=version,
            delivered=now(),
            error=None if skipped is None else stored_text(skipped),
        )
    )


def made_files(conn: sa.Connection, run_id: int) -> list[str]:
    instances = t.run_steps.c
    query = (
        sa.select(DELIVERIES.delivered_path)
        .join(t.run_steps, (instances.run_id == DELIVERIES.run_id) & (instances.ordinal == DELIVERIES.ordinal))
        .where(DELIVERIES.run_id == run_id, DELIVERIES.state == "delivered", sa.not_(instances.cached))
        .order_by(DELIVERIES.id)
    )
    return list(conn.scalars(query))


def newer_delivery(conn: sa.Connection, run_id: int, path: str) -> PendingDelivery | None:
    """By way of the newer runs, of which there are few, and the index over run and path."""
    query = (
        sa.select(DELIVERIES.id, DELIVERIES.run_id, DELIVERIES.path, DELIVERIES.if_exists, *_columns())
        .select_from(t.runs)
        .join(t.deliveries, (DELIVERIES.run_id == t.runs.c.id) & (DELIVERIES.path == path))
        .join(t.artifacts, t.artifacts.c.sha256 == DELIVERIES.sha256)
        .where(t.runs.c.id > run_id, DELIVERIES.state == "delivered", DELIVERIES.delivered_path == path)
        .order_by(t.runs.c.id.desc())
        .limit(1)
    )
    newest = conn.execute(query).first()
    return None if newest is None else _delivery(newest)


def not_arrived(conn: sa.Connection, run_id: int, state: str) -> list[tuple[str, str]]:
    """(path as the recipe wants it, why) of the run's deliveries that are `failed` or `skipped`."""
    query = (
        sa.select(DELIVERIES.path, DELIVERIES.error)
        .where(DELIVERIES.run_id == run_id, DELIVERIES.state == state)
        .order_by(DELIVERIES.id)
    )
    return [(row.path, row.error or "") for row in conn.execute(query)]


def fail_delivery(conn: sa.Connection, delivery_id: int, error: str) -> None:
    conn.execute(
        sa.update(t.deliveries).where(DELIVERIES.id == delivery_id).values(state="failed", error=stored_text(error))
    )


def _delivery(row: sa.Row[Any]) -> PendingDelivery:
    artifact = Artifact(row.sha256, row.uri, row.media_type, row.bytes, row.width, row.height)
    return PendingDelivery(row.id, row.run_id, row.path, row.if_exists, artifact)


def _columns() -> list[sa.Column[object]]:
    artifacts = t.artifacts.c
    return [
        artifacts.sha256,
        artifacts.uri,
        artifacts.media_type,
        artifacts.bytes,
        artifacts.width,
        artifacts.height,
    ]
