"""Which artifacts a pass of `verify` has still to read, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.rows import artifact_of
from kontext_batch.lineage.sql import now, rows_of, stored_text
from kontext_batch.ports import Artifact, DamagedArtifact

ARTIFACTS, OUTPUTS = t.artifacts.c, t.step_outputs.c


def _unread(since: datetime) -> list[sa.ColumnElement[bool]]:
    """Kept, and not read since. What was read in the very millisecond is read once more."""
    return [
        ARTIFACTS.collected_at.is_(None),
        sa.or_(ARTIFACTS.verified.is_(None), ARTIFACTS.verified <= since),
    ]


def unread(conn: sa.Connection, *, since: datetime, after: str, limit: int) -> list[Artifact]:
    rows = conn.execute(
        sa.select(t.artifacts).where(*_unread(since), ARTIFACTS.sha256 > after).order_by(ARTIFACTS.sha256).limit(limit)
    )
    return [artifact_of(row) for row in rows]


def unread_size(conn: sa.Connection, *, since: datetime) -> tuple[int, int]:
    size = sa.func.coalesce(sa.func.sum(ARTIFACTS.bytes), 0)
    row = conn.execute(sa.select(sa.func.count().label("artifacts"), size.label("size")).where(*_unread(since))).one()
    return int(row.artifacts), int(row.size)


def note_read(conn: sa.Connection, found: Sequence[tuple[str, str | None]]) -> None:
    """What was collected meanwhile is no matter of theirs."""
    if not found:
        return
    types = {"sha256": ARTIFACTS.sha256.type, "problem": ARTIFACTS.problem.type}
    rows = [
        {"sha256": sha256, "problem": None if problem is None else stored_text(problem)}
        for sha256, problem in sorted(found)
    ]
    read = rows_of(conn, "read", types, rows)
    conn.execute(
        sa.update(t.artifacts)
        .where(ARTIFACTS.sha256 == read.c.sha256, ARTIFACTS.collected_at.is_(None))
        .values(verified=now(), problem=read.c.problem)
    )


def damaged(conn: sa.Connection) -> list[DamagedArtifact]:
    """There are few: each asks for its steps by itself."""
    rows = conn.execute(
        sa.select(t.artifacts)
        .where(ARTIFACTS.problem.is_not(None), ARTIFACTS.collected_at.is_(None))
        .order_by(ARTIFACTS.sha256)
    ).all()
    mine = OUTPUTS.sha256 == sa.bindparam("sha256")
    steps = sa.select(OUTPUTS.step_id).where(mine).order_by(OUTPUTS.step_id).limit(10)
    return [
        DamagedArtifact(artifact_of(row), row.problem, row.verified, tuple(conn.scalars(steps, {"sha256": row.sha256})))
        for row in rows
    ]


def is_kept(conn: sa.Connection, sha256: str) -> bool:
    kept = sa.select(ARTIFACTS.sha256).where(ARTIFACTS.sha256 == sha256, ARTIFACTS.collected_at.is_(None))
    return conn.scalar(kept) is not None
