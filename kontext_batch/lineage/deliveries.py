"""What is to be brought where the recipe wants it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.rows import ARTIFACT_ROW, artifact_of
from kontext_batch.lineage.sql import among, now, now_plus, rows_of, stored_text
from kontext_batch.lineage.takedown import note_late
from kontext_batch.ports import PendingDelivery, SettledDelivery

DELIVERIES = t.deliveries.c
DELIVERY: tuple[sa.Column[Any], ...] = (
    DELIVERIES.id,
    DELIVERIES.run_id,
    DELIVERIES.path,
    DELIVERIES.if_exists,
    t.runs.c.source,
    *ARTIFACT_ROW,
)
PENDING = DELIVERIES.state == sa.literal_column("'pending'")
"""Written out: a parameter would keep the partial index from use."""
LATER_SECONDS = 20.0
IMPORTED = "import"
"""Trigger of runs that were restored from an archive: what they delivered, they delivered elsewhere."""


def pending_deliveries(conn: sa.Connection, run_id: int | None = None, *, limit: int) -> list[PendingDelivery]:
    """Of open runs: what a cancelled or finished run left behind is delivered when that run is retried."""
    return [_delivery(row) for row in conn.execute(_pending(run_id, limit))]


def claim_deliveries(
    conn: sa.Connection, worker_id: str, *, limit: int, seconds: float, run_id: int | None
) -> list[PendingDelivery]:
    free = sa.or_(DELIVERIES.claimed_until.is_(None), DELIVERIES.claimed_until <= now())
    query = _pending(run_id, limit).where(free).with_for_update(skip_locked=True, key_share=True, of=t.deliveries)
    claim = sa.update(t.deliveries).values(claimed_by=worker_id, claimed_until=now_plus(seconds))
    if conn.dialect.name == "postgresql":  # in one round trip
        found = query.cte("found")
        claimed = claim.where(DELIVERIES.id.in_(sa.select(found.c.id))).cte("claimed")
        return [_delivery(row) for row in conn.execute(sa.select(found).add_cte(claimed).order_by(found.c.id))]
    rows = conn.execute(query).all()
    if rows:
        conn.execute(claim.where(among(DELIVERIES.id, [row.id for row in rows])))
    return [_delivery(row) for row in rows]


def _pending(run_id: int | None, limit: int) -> sa.Select[Any]:
    query = (
        sa.select(*DELIVERY)
        .join(t.runs, t.runs.c.id == DELIVERIES.run_id)
        .join(t.step_outputs, t.step_outputs.c.step_id == DELIVERIES.step_id)
        .join(t.artifacts, t.artifacts.c.sha256 == t.step_outputs.c.sha256)
        .where(open_run(), PENDING, t.step_outputs.c.slot == "image")
        .order_by(DELIVERIES.id)
        .limit(limit)
    )
    return query if run_id is None else query.where(DELIVERIES.run_id == run_id)


def settle_deliveries(
    conn: sa.Connection,
    worker_id: str,
    settled: Sequence[SettledDelivery],
    back: Sequence[int],
    later: Sequence[int],
) -> None:
    """The first to settle a delivery is believed: a second one brought the same bytes to the same place."""
    outputs = t.step_outputs.c
    brought = sa.select(outputs.sha256).where(outputs.step_id == DELIVERIES.step_id, outputs.slot == "image")
    arrived = [each for each in settled if each.error is None]
    failed = [each for each in settled if each.error is not None]
    free: dict[str, Any] = {"claimed_by": None, "claimed_until": None}
    if arrived:
        types = {
            "delivery": DELIVERIES.id.type,
            "ends": sa.Text(),
            "place": sa.Text(),
            "number": sa.Integer(),
            "why": sa.Text(),
            "file": sa.Text(),
        }
        ends = rows_of(
            conn,
            "ends",
            types,
            [
                {
                    "delivery": each.id,
                    "ends": "delivered" if each.skipped is None else "skipped",
                    "place": each.path,
                    "number": each.version,
                    "why": None if each.skipped is None else stored_text(each.skipped),
                    "file": each.file_sha256,
                }
                for each in arrived
            ],
        )
        settled_now = conn.execute(
            sa.update(t.deliveries)
            .where(DELIVERIES.id == ends.c.delivery, DELIVERIES.state == "pending")
            .values(
                state=ends.c.ends,
                sha256=brought.correlate(t.deliveries).scalar_subquery(),
                delivered_path=ends.c.place,
                version=ends.c.number,
                delivered=now(),
                error=ends.c.why,
                file_sha256=ends.c.file,
                **free,
            )
        )
        if settled_now.rowcount < len(arrived):
            note_late(conn, worker_id, arrived)
    if failed:
        conn.execute(
            sa.update(t.deliveries)
            .where(DELIVERIES.id == sa.bindparam("delivery"), DELIVERIES.state == "pending")
            .values(state="failed", error=sa.bindparam("why"), **free),
            [{"delivery": each.id, "why": stored_text(each.error or "")} for each in failed],
        )
    mine = DELIVERIES.claimed_by == worker_id
    if back:
        conn.execute(sa.update(t.deliveries).where(among(DELIVERIES.id, back), mine).values(**free))
    if later:
        put_off = {**free, "claimed_until": now_plus(LATER_SECONDS)}
        conn.execute(sa.update(t.deliveries).where(among(DELIVERIES.id, later), mine).values(**put_off))


def free_deliveries(conn: sa.Connection, workers: Iterable[str]) -> None:
    """What these workers were about to bring is for others."""
    conn.execute(
        sa.update(t.deliveries)
        .where(DELIVERIES.claimed_by.is_not(None), among(DELIVERIES.claimed_by, workers))
        .values(claimed_by=None, claimed_until=None)
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
        sa.select(*DELIVERY)
        .select_from(t.runs)
        .join(t.deliveries, (DELIVERIES.run_id == t.runs.c.id) & (DELIVERIES.path == path))
        .join(t.artifacts, t.artifacts.c.sha256 == DELIVERIES.sha256)
        .where(t.runs.c.id > run_id, t.runs.c.trigger != IMPORTED)
        .where(DELIVERIES.state == "delivered", DELIVERIES.delivered_path == path, DELIVERIES.withdrawn.is_(None))
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


def _delivery(row: sa.Row[Any]) -> PendingDelivery:
    return PendingDelivery(row.id, row.run_id, row.path, row.if_exists, artifact_of(row), row.source)
