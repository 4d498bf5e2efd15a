"""Dropped recipes in SQL: each (URI, ETag) is claimed by one of the watchers and has one run.

A drop is claimed under a token and a time limit, as a time of a schedule is: a watcher that dies over it loses it to
the next one, and one that was thought dead cannot start a second run. Its answers are looked at in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound, SettingsError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.audit import acted
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.runs import cancel_run
from kontext_batch.lineage.sql import among, dialect_insert, now, now_plus, stored_text
from kontext_batch.planning.inbox import (
    ENDED,
    SPEAKING,
    AnsweredDrop,
    Cancel,
    ClaimedDrop,
    DropRow,
    DropState,
    NewDrop,
)
from kontext_batch.ports import Act

INBOX, RUNS = t.inbox.c, t.runs.c
S = DropState
CLAIMABLE = (S.SEEN, S.CLAIMED)
BUSY: list[sa.ColumnElement[Any]] = [sa.literal_column("'accepted'"), sa.literal_column("'claimed'")]
"""Written out: a parameter would keep the partial index from use."""


def claimable_drops(conn: sa.Connection, found: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the (URI, ETag) pairs that nobody has acted on, nor acts on now, in their order."""
    free = sa.and_(INBOX.state.in_(CLAIMABLE), INBOX.claimed_until <= now())
    query = sa.select(INBOX.uri, INBOX.etag, sa.case((free, 1), else_=0).label("free"))
    rows = conn.execute(query.where(among(INBOX.uri, sorted({uri for uri, _ in found}))))
    known = {(row.uri, row.etag): bool(row.free) for row in rows}
    return [pair for pair in found if known.get(pair, True)]


def claim_drop(conn: sa.Connection, new: NewDrop, *, seconds: float) -> ClaimedDrop | None:
    insert = dialect_insert(conn, t.inbox)
    values = {
        "uri": new.uri,
        "etag": new.etag,
        "stem": new.stem,
        "modified": new.modified,
        "owner": new.owner,
        "state": S.SEEN,
        "token": 0,
        "claimed_until": now_plus(new.settle_seconds),
        "tries": 0,
        "created": now(),
    }
    unless = insert.on_conflict_do_nothing(index_elements=["uri", "etag"])
    added = conn.execute(unless.values(values).returning(INBOX.id)).first()
    if added is not None:
        # What the same file looked like while it was being written.
        conn.execute(sa.delete(t.inbox).where(INBOX.uri == new.uri, INBOX.id != added.id, INBOX.state == S.SEEN))
        if new.settle_seconds:
            return None
    free = sa.and_(INBOX.state.in_(CLAIMABLE), INBOX.claimed_until <= now())
    return _claim(conn, sa.and_(INBOX.uri == new.uri, INBOX.etag == new.etag, free), seconds)


def claim_lost_drop(conn: sa.Connection, *, seconds: float) -> ClaimedDrop | None:
    """The oldest one whose watcher was lost over it, or put it off until now."""
    lost = conn.scalar(_lost().order_by(INBOX.id).limit(1).with_for_update(skip_locked=True))
    return None if lost is None else _claim(conn, INBOX.id == lost, seconds)


def any_lost_drop(conn: sa.Connection) -> bool:
    return conn.scalar(_lost().limit(1)) is not None


def _lost() -> sa.Select[tuple[int]]:
    return sa.select(INBOX.id).where(INBOX.state.in_(BUSY), INBOX.state == S.CLAIMED, INBOX.claimed_until <= now())


def _claim(conn: sa.Connection, which: sa.ColumnElement[bool], seconds: float) -> ClaimedDrop | None:
    row = conn.execute(
        sa.update(t.inbox)
        .where(which)
        .values(state=S.CLAIMED, token=INBOX.token + 1, tries=INBOX.tries + 1, claimed_until=now_plus(seconds))
        .returning(INBOX.id, INBOX.token, INBOX.uri, INBOX.etag, INBOX.tries)
    ).first()
    return None if row is None else ClaimedDrop(row.id, row.token, row.uri, row.etag, row.tries)


def note_drop(conn: sa.Connection, drop_id: int, sha256: str) -> int | None:
    """That the bytes were read; the run that the same bytes have under this name, if there is one."""
    conn.execute(sa.update(t.inbox).where(INBOX.id == drop_id).values(sha256=sha256))
    earlier = t.inbox.alias()
    query = (
        sa.select(earlier.c.run_id)
        .join(t.inbox, sa.and_(INBOX.uri == earlier.c.uri, INBOX.id == drop_id))
        .where(earlier.c.id != drop_id, earlier.c.sha256 == sha256, earlier.c.run_id.is_not(None))
        .order_by(earlier.c.id.desc())
        .limit(1)
    )
    run_id: int | None = conn.scalar(query)
    return run_id


def is_answered(conn: sa.Connection, drop_id: int) -> bool:
    """Whether the answers beside a drop are about it: no newer one has its stem."""
    stem = sa.select(INBOX.stem).where(INBOX.id == drop_id).scalar_subquery()
    newer = sa.select(INBOX.id).where(INBOX.stem == stem, INBOX.id > drop_id, INBOX.state.in_(SPEAKING))
    return conn.scalar(newer.limit(1)) is None


def settle_drop(conn: sa.Connection, drop_id: int, token: int, state: DropState, error: str) -> bool:
    """That no run comes of it, and why; False when the claim has moved on."""
    return _fenced(
        conn, drop_id, token, S.CLAIMED, state=state, error=stored_text(error), claimed_until=None, answered=now()
    )


def postpone_drop(conn: sa.Connection, drop_id: int, token: int, *, seconds: float, blame: bool) -> bool:
    """To be tried again in so long; `blame`: whether this try counts against it."""
    tries = INBOX.tries if blame else INBOX.tries - 1
    return _fenced(conn, drop_id, token, S.CLAIMED, tries=tries, claimed_until=now_plus(seconds))


def taken_by(conn: sa.Connection, drop_id: int, token: int, run_id: int) -> bool:
    """That the drop has its run; False when the claim has moved on."""
    return _fenced(
        conn,
        drop_id,
        token,
        S.CLAIMED,
        state=S.ACCEPTED,
        run_id=run_id,
        error=None,
        answer=None,
        cancelled_by=None,
        claimed_until=now(),
    )


def _fenced(conn: sa.Connection, drop_id: int, token: int, held: DropState, **values: Any) -> bool:
    mine = (INBOX.id == drop_id, INBOX.token == token, INBOX.state == held)
    return bool(conn.execute(sa.update(t.inbox).where(*mine).values(values)).rowcount)


# ------------------------------------------------------------------------------------------------------- answers


def claim_answers(conn: sa.Connection, *, limit: int, seconds: float) -> list[AnsweredDrop]:
    """Accepted drops whose answers are due, those that waited longest first."""
    reopened = conn.scalars(_reopened()).all()
    again = sa.update(t.inbox).where(among(INBOX.id, reopened), INBOX.state.in_(ENDED))
    conn.execute(again.values(state=S.ACCEPTED, answer=None, claimed_until=now()))
    due = _due().order_by(INBOX.claimed_until, INBOX.id).limit(limit).with_for_update(skip_locked=True)
    rows = conn.execute(
        sa.update(t.inbox)
        .where(among(INBOX.id, conn.scalars(due).all()))
        .values(token=INBOX.token + 1, claimed_until=now_plus(seconds))
        .returning(INBOX.id, INBOX.token, INBOX.uri, INBOX.stem, INBOX.run_id, INBOX.answer)
    ).all()
    speaking = (
        sa.select(INBOX.stem, sa.func.max(INBOX.id).label("id"))
        .where(among(INBOX.stem, sorted({row.stem for row in rows})), INBOX.state.in_(SPEAKING))
        .group_by(INBOX.stem)
    )
    newest = {row.stem: row.id for row in conn.execute(speaking)}
    return [
        AnsweredDrop(row.id, row.token, row.uri, row.stem, row.run_id, row.answer, newest[row.stem] == row.id)
        for row in sorted(rows, key=lambda row: row.id)
    ]


def any_answer_due(conn: sa.Connection) -> bool:
    return any(conn.scalar(query.limit(1)) is not None for query in (_due(), _reopened()))


def _due() -> sa.Select[tuple[int]]:
    return sa.select(INBOX.id).where(INBOX.state.in_(BUSY), INBOX.state == S.ACCEPTED, INBOX.claimed_until <= now())


def _reopened() -> sa.Select[tuple[int]]:
    """Drops whose answers were the last ones, until somebody retried the run."""
    return sa.select(INBOX.id).join(t.runs, RUNS.id == INBOX.run_id).where(open_run(), INBOX.state.in_(ENDED))


def settle_answer(
    conn: sa.Connection, drop_id: int, token: int, state: DropState, answer: str | None, *, seconds: float
) -> bool:
    """What was written; while `state` is accepted, look again in `seconds`.

    False when another process has looked meanwhile: older answers may lie over newer ones, so all are written again.
    """
    later = now_plus(seconds) if state is S.ACCEPTED else None
    if _fenced(conn, drop_id, token, S.ACCEPTED, state=state, answer=answer, claimed_until=later, answered=now()):
        return True
    again = sa.update(t.inbox).where(INBOX.id == drop_id, INBOX.run_id.is_not(None))
    conn.execute(again.values(state=S.ACCEPTED, answer=None, claimed_until=now(), token=INBOX.token + 1))
    return False


def cancellable(conn: sa.Connection, stems: Collection[str]) -> bool:
    """Whether a drop with one of these stems has an open run."""
    query = sa.select(INBOX.id).join(t.runs, RUNS.id == INBOX.run_id).where(open_run(), among(INBOX.stem, stems))
    return conn.execute(query.limit(1)).first() is not None


def cancel_drops(conn: sa.Connection, cancels: Sequence[Cancel]) -> list[int]:
    """Cancel the runs that these files ask for; each file does it once. Returns the runs."""
    by_stem: Mapping[str, Cancel] = {each.stem: each for each in cancels}
    query = (
        sa.select(INBOX.id, INBOX.stem, INBOX.modified, INBOX.run_id, INBOX.cancelled_by)
        .join(t.runs, RUNS.id == INBOX.run_id)
        .where(open_run(), among(INBOX.stem, by_stem))
        .order_by(INBOX.id)
    )
    cancelled = []
    for row in conn.execute(query).all():
        asked = by_stem[row.stem]
        if row.cancelled_by == asked.mark or row.modified > asked.modified:
            continue
        by = Act(asked.owner, "inbox", "runs cancel", {"file": asked.uri})
        acted(conn, by, f"run:{row.run_id}", cancel_run, row.run_id)
        noted = sa.update(t.inbox).where(INBOX.id == row.id)
        conn.execute(noted.values(cancelled_by=asked.mark))
        conn.execute(noted.where(INBOX.state == S.ACCEPTED).values(claimed_until=now()))
        cancelled.append(row.run_id)
    return cancelled


# ------------------------------------------------------------------------------------------------------ for people


def drops(conn: sa.Connection, *, limit: int) -> list[DropRow]:
    """Newest first."""
    return [_row(row) for row in conn.execute(sa.select(t.inbox).order_by(INBOX.id.desc()).limit(limit))]


def retry_drop(conn: sa.Connection, drop: int | str) -> DropRow:
    """Let a drop that has no run be acted on anew: by its number, or the newest one of a URI."""
    which = INBOX.id == drop if isinstance(drop, int) else INBOX.uri == drop
    query = sa.select(t.inbox).where(which).order_by(INBOX.id.desc()).limit(1)
    found = conn.execute(query.with_for_update()).first()
    if found is None:
        raise ObjectNotFound(f"there is no drop {drop}; `inbox list` shows them")
    row = _row(found)
    if row.run_id is not None:
        raise SettingsError(f"drop {row.id} has run {row.run_id}: `runs retry {row.run_id}` tries what failed again")
    if row.state in CLAIMABLE:
        raise SettingsError(f"drop {row.id} is {row.state}: `workers beat` acts on it by itself")
    conn.execute(
        sa.update(t.inbox)
        .where(INBOX.id == row.id)
        .values(state=S.CLAIMED, token=INBOX.token + 1, tries=0, error=None, claimed_until=now())
    )
    return row


def subject(row: DropRow) -> str:
    """How records of acts name it."""
    return f"drop:{row.id}"


def _row(row: sa.Row[Any]) -> DropRow:
    return DropRow(
        id=row.id,
        uri=row.uri,
        etag=row.etag,
        owner=row.owner,
        state=DropState(row.state),
        run_id=row.run_id,
        error=row.error,
        tries=row.tries,
        created=row.created,
        answered=row.answered,
    )
