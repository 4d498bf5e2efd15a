"""Legal holds: what `gc` may not take, whatever its policy says.

A hold names a run, a step, a picture by its sha256, or a photo. It keeps the pictures of the named steps and of all
steps above them, which explain them; of a photo, those of its descendants and of all above these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.sql import among, exists, now, stored_text
from kontext_batch.ports import Hold

HOLDS, EDGES, OUTPUTS, ARTIFACTS = t.holds.c, t.edges.c, t.step_outputs.c, t.artifacts.c
UPLOADS, DELIVERIES, SOURCES = t.uploads.c, t.deliveries.c, t.step_sources.c


def add_hold(conn: sa.Connection, subject: str, reason: str, who: str) -> bool:
    lock_graph(conn, alone=True)  # a collection that has looked already is over, the next one sees it
    kind, _, name = subject.partition(":")
    table = {"run": t.runs, "step": t.steps}.get(kind)
    if table is not None and conn.scalar(sa.select(table.c.id).where(table.c.id == int(name))) is None:
        raise ObjectNotFound(f"there is no {kind} {name}")
    if conn.scalar(sa.select(HOLDS.id).where(HOLDS.subject == subject, HOLDS.released.is_(None))) is not None:
        return False
    conn.execute(
        sa.insert(t.holds).values(subject=subject, reason=stored_text(reason), who=stored_text(who), placed=now())
    )
    return True


def release_hold(conn: sa.Connection, subject: str) -> bool:
    lock_graph(conn, alone=True)
    standing = sa.update(t.holds).where(HOLDS.subject == subject, HOLDS.released.is_(None))
    return bool(conn.execute(standing.values(released=now())).rowcount)


def holds(conn: sa.Connection, *, released: bool = False) -> list[Hold]:
    query = sa.select(t.holds).order_by(HOLDS.id)
    if not released:
        query = query.where(HOLDS.released.is_(None))
    return [Hold(row.id, row.subject, row.reason, row.who, row.placed, row.released) for row in conn.execute(query)]


@dataclass(slots=True)
class Subjects:
    """What standing holds name."""

    runs: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    photos: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)


def subjects(standing: Iterable[Hold]) -> Subjects:
    """Sorted by what they are."""
    found = Subjects()
    for hold in standing:
        kind, _, name = hold.subject.partition(":")
        match kind:
            case "run":
                found.runs.append(int(name))
            case "step":
                found.steps.append(int(name))
            case "photo":
                found.photos.append(name)
            case "picture":
                found.pictures.append(name)
    return found


def held(conn: sa.Connection) -> sa.ColumnElement[bool]:
    """That a hold keeps the artifact of the enclosing statement: worked out once for all of them."""
    standing = holds(conn)
    if not standing:
        return sa.false()
    named = subjects(standing)
    kept = sa.select(_held_steps(named).c.id)
    return sa.or_(
        among(ARTIFACTS.sha256, named.pictures),
        ARTIFACTS.sha256.in_(sa.select(OUTPUTS.sha256).where(OUTPUTS.step_id.in_(kept))),
        # What its step made before it was made anew.
        ARTIFACTS.uri.in_(sa.select(UPLOADS.uri).where(UPLOADS.step_id.in_(kept))),
    )


def _held_steps(named: Subjects) -> sa.CTE:
    below = sa.select(SOURCES.step_id.label("id")).where(among(SOURCES.sha256, named.photos))
    descended = below.cte("held_below", recursive=True)
    descended = descended.union(sa.select(EDGES.child).join(descended, EDGES.parent == descended.c.id))
    of_picture = sa.select(OUTPUTS.step_id).where(among(OUTPUTS.sha256, named.pictures))
    delivered = sa.select(DELIVERIES.step_id).where(
        sa.or_(among(DELIVERIES.sha256, named.pictures), among(DELIVERIES.file_sha256, named.pictures))
    )
    roots = sa.union(
        sa.select(descended.c.id),
        sa.select(t.run_steps.c.step_id).where(among(t.run_steps.c.run_id, named.runs)),
        sa.select(t.steps.c.id).where(among(t.steps.c.id, named.steps)),
        of_picture,
        delivered,
    ).subquery("held_roots")
    kept = sa.select(roots.c.id).cte("held_steps", recursive=True)
    return kept.union(sa.select(EDGES.parent).join(kept, EDGES.child == kept.c.id))


def holds_on_steps(conn: sa.Connection, step_ids: Iterable[int], shas: Iterable[str] = ()) -> list[Hold]:
    """Those that keep one of these steps' pictures: by what lies below it, of which there is mostly little."""
    standing = holds(conn)
    if not standing:
        return []
    own = sa.select(t.steps.c.id).where(among(t.steps.c.id, sorted(step_ids)))
    walk = own.cte("held_own", recursive=True)
    below = set(conn.scalars(sa.select(walk.union(sa.select(EDGES.child).join(walk, EDGES.parent == walk.c.id)).c.id)))
    found = set(shas)
    listed = sorted(below)
    found |= set(conn.scalars(sa.select(OUTPUTS.sha256).where(among(OUTPUTS.step_id, listed))))
    for row in conn.execute(
        sa.select(DELIVERIES.sha256, DELIVERIES.file_sha256).where(among(DELIVERIES.step_id, listed))
    ):
        found |= {sha256 for sha256 in row if sha256 is not None}
    return [hold for hold in standing if _names(conn, hold, below, found)]


def _names(conn: sa.Connection, hold: Hold, steps: set[int], pictures: set[str]) -> bool:
    named = subjects([hold])
    if not steps.isdisjoint(named.steps) or not pictures.isdisjoint(named.pictures):
        return True
    if named.runs:
        of_run = exists(among(t.run_steps.c.run_id, named.runs), among(t.run_steps.c.step_id, sorted(steps)))
        return bool(conn.scalar(sa.select(of_run)))
    if not named.photos:
        return False
    own = sa.select(t.steps.c.id).where(among(t.steps.c.id, sorted(steps)))
    walk = own.cte("held_above", recursive=True)
    above = walk.union(sa.select(EDGES.parent).join(walk, EDGES.child == walk.c.id))
    read = exists(SOURCES.step_id.in_(sa.select(above.c.id)), among(SOURCES.sha256, named.photos))
    return bool(conn.scalar(sa.select(read)))


def is_held(conn: sa.Connection, sha256: str) -> bool:
    """Whether a hold keeps the artifact: `held` of one, under the lock in which it would be deleted."""
    if conn.scalar(sa.select(HOLDS.id).where(HOLDS.released.is_(None)).limit(1)) is None:
        return False
    made = sa.select(OUTPUTS.step_id).where(OUTPUTS.sha256 == sha256)
    before = (
        sa.select(UPLOADS.step_id).join(t.artifacts, ARTIFACTS.uri == UPLOADS.uri).where(ARTIFACTS.sha256 == sha256)
    )
    return bool(holds_on_steps(conn, conn.scalars(sa.union(made, before)), [sha256]))
