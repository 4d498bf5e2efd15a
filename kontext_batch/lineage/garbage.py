"""What may be removed: artifacts that can be computed again, and uploads that came to nothing.

Keys are content hashes, so an orphan's object may be somebody's artifact, or be announced by somebody right now. An
object is therefore deleted inside the transaction that has made sure of the contrary and that keeps all others who
would name it waiting: `delete` below is called there. Should the process die in between, the object may be gone while
the database names it as garbage still; the next collection deletes it once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.holds import held, is_held
from kontext_batch.lineage.rows import artifact_of
from kontext_batch.lineage.sql import among, exists, in_state, now, now_plus
from kontext_batch.planning.states import LIVE
from kontext_batch.ports import Artifact

ARTIFACTS, OUTPUTS, UPLOADS = t.artifacts.c, t.step_outputs.c, t.uploads.c
Delete = Callable[[str], None]


def artifact_uris(conn: sa.Connection) -> list[str]:
    return list(conn.scalars(sa.select(ARTIFACTS.uri).where(ARTIFACTS.collected_at.is_(None)).order_by(ARTIFACTS.uri)))


def expired(conn: sa.Connection, *, days: float, limit: int | None = None) -> list[Artifact]:
    query = (
        sa.select(t.artifacts)
        .where(ARTIFACTS.collected_at.is_(None), *_unneeded(), _expired(days), sa.not_(held(conn)))
        .order_by(ARTIFACTS.created, ARTIFACTS.sha256)
        .limit(limit)
    )
    return [artifact_of(row) for row in conn.execute(query)]


def collectable(conn: sa.Connection, *, keep_bytes: int, expired_days: float | None = None) -> list[Artifact]:
    kept: sa.ColumnElement[bool] = ARTIFACTS.collected_at.is_(None)
    unheld = sa.not_(held(conn))
    if expired_days is not None:  # they go anyway
        kept = sa.and_(kept, sa.not_(sa.and_(*_unneeded(), _expired(expired_days), unheld)))
    total = int(conn.scalar(sa.select(sa.func.coalesce(sa.func.sum(ARTIFACTS.bytes), 0)).where(kept)) or 0)
    if total <= keep_bytes:
        return []
    last_wanted = (
        sa.select(sa.func.max(t.runs.c.created))
        .join(t.run_steps, t.run_steps.c.run_id == t.runs.c.id)
        .join(t.step_outputs, OUTPUTS.step_id == t.run_steps.c.step_id)
        .where(OUTPUTS.sha256 == ARTIFACTS.sha256)
        .correlate(t.artifacts)
        .scalar_subquery()
    )
    rows = conn.execute(
        sa.select(t.artifacts)
        .where(kept, *_unneeded(), unheld)
        .order_by(
            sa.case((_is_output(), 1), else_=0),
            sa.func.coalesce(last_wanted, ARTIFACTS.created),
            ARTIFACTS.created,
            ARTIFACTS.sha256,
        )
    )
    chosen = []
    for row in rows:
        if total <= keep_bytes:
            break
        chosen.append(artifact_of(row))
        total -= row.bytes
    return chosen


def forget_artifact(
    conn: sa.Connection, sha256: str, delete: Delete | None, *, expired_days: float | None = None
) -> bool:
    lock_graph(conn, alone=True)
    if is_held(conn, sha256):
        return False
    conditions = _unneeded() if expired_days is None else [*_unneeded(), _expired(expired_days)]
    uri = conn.scalar(_collect(ARTIFACTS.sha256 == sha256, *conditions).returning(ARTIFACTS.uri))
    if uri is None:
        return False
    gone = delete_unless_announced(conn, uri, delete)
    state = "deleted" if gone else "orphaned"
    conn.execute(sa.update(t.uploads).where(UPLOADS.uri == uri, UPLOADS.state != "intent").values(state=state))
    return True


def lost_artifact(conn: sa.Connection, sha256: str, delete: Delete | None) -> None:
    """Live steps that read it fail, or wait for it when it is made again (see `graph.put_back`)."""
    lock_graph(conn, alone=True)
    uri = conn.scalar(_collect(ARTIFACTS.sha256 == sha256).returning(ARTIFACTS.uri))
    if uri is not None:
        delete_unless_announced(conn, uri, delete)


def lost_artifacts(conn: sa.Connection, sha256s: Sequence[str]) -> bool:
    """`lost_artifact` of many whose objects are gone already; False when nobody kept any of them."""
    lock_graph(conn, alone=True)
    return bool(conn.execute(_collect(among(ARTIFACTS.sha256, sha256s))).rowcount)


def _collect(*which: sa.ColumnElement[bool]) -> sa.Update:
    """Such of these as are kept have no bytes from now on."""
    return sa.update(t.artifacts).where(*which, ARTIFACTS.collected_at.is_(None)).values(collected_at=now())


def delete_unless_announced(conn: sa.Connection, uri: str, delete: Delete | None) -> bool:
    """Under the graph's lock: whoever has announced the object may have put it anew. True when it was deleted."""
    if delete is None or conn.scalar(sa.select(_announced(uri))):
        return False
    delete(uri)
    return True


def orphaned_uploads(conn: sa.Connection) -> list[str]:
    orphans = sa.select(UPLOADS.uri).where(UPLOADS.state == "orphaned").distinct()
    named = sa.select(ARTIFACTS.uri).where(ARTIFACTS.collected_at.is_(None))
    announced = sa.select(UPLOADS.uri).where(UPLOADS.state == "intent")
    free = orphans.where(UPLOADS.uri.not_in(named), UPLOADS.uri.not_in(announced))
    return list(conn.scalars(free.order_by(UPLOADS.uri)))


def forget_upload(conn: sa.Connection, uri: str, delete: Delete | None) -> bool:
    """False when somebody names the object by now."""
    lock_graph(conn, alone=True)
    named = exists(ARTIFACTS.uri == uri, ARTIFACTS.collected_at.is_(None))
    if conn.scalar(sa.select(sa.or_(named, _announced(uri)))):
        return False
    if delete is not None:
        delete(uri)
    conn.execute(sa.update(t.uploads).where(UPLOADS.uri == uri, UPLOADS.state == "orphaned").values(state="deleted"))
    return True


def _unneeded() -> list[sa.ColumnElement[bool]]:
    return [sa.not_(_read_later()), sa.not_(_delivered_later())]


def _expired(days: float) -> sa.ColumnElement[bool]:
    """An intermediate that no open run wants, and none has wanted for so long."""
    limit = now_plus(-days * 86400)
    wanted = exists(
        OUTPUTS.sha256 == ARTIFACTS.sha256,
        t.run_steps.c.step_id == OUTPUTS.step_id,
        t.runs.c.id == t.run_steps.c.run_id,
        sa.or_(open_run(), sa.func.coalesce(t.runs.c.finished, t.runs.c.created) > limit),
        outer=t.artifacts,
    )
    return sa.and_(ARTIFACTS.created <= limit, sa.not_(wanted), sa.not_(_is_output()))


def _is_output() -> sa.ColumnElement[bool]:
    """Its step's picture is a delivery's: what recipes ask for. Those of earlier bytes of a step that was made anew
    count too, where they were delivered."""
    deliveries = t.deliveries.c
    of_step = exists(
        OUTPUTS.sha256 == ARTIFACTS.sha256,
        deliveries.step_id == OUTPUTS.step_id,
        deliveries.withdrawn.is_(None),
        outer=t.artifacts,
    )
    earlier = exists(
        UPLOADS.uri == ARTIFACTS.uri,
        deliveries.step_id == UPLOADS.step_id,
        deliveries.sha256 == ARTIFACTS.sha256,
        deliveries.withdrawn.is_(None),
        outer=t.artifacts,
    )
    return sa.or_(of_step, earlier)


def _read_later() -> sa.ColumnElement[bool]:
    """A live step will read the artifact."""
    child = t.steps.alias("child")
    return exists(
        OUTPUTS.sha256 == ARTIFACTS.sha256,
        t.edges.c.parent == OUTPUTS.step_id,
        child.c.id == t.edges.c.child,
        in_state(child.c.state, *LIVE),
        outer=t.artifacts,
    )


def _delivered_later() -> sa.ColumnElement[bool]:
    """A delivery of an open run needs the artifact."""
    deliveries = t.deliveries.c
    return exists(
        OUTPUTS.sha256 == ARTIFACTS.sha256,
        deliveries.step_id == OUTPUTS.step_id,
        deliveries.state == "pending",
        t.runs.c.id == deliveries.run_id,
        open_run(),
        outer=t.artifacts,
    )


def _announced(uri: str) -> sa.ColumnElement[bool]:
    return exists(UPLOADS.uri == uri, UPLOADS.state == "intent")
