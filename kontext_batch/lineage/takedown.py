"""A photo is forgotten: what came from it, the fence that keeps it from coming back, and how its objects end.

`take_down` writes everything down in one transaction that holds the graph alone: from then on no plan is stored that
reads the photo (`submit`), no step made from it is retried (`runs`), and no worker commits one: a leased step is
fenced, its uploads are orphans. What a worker has committed before is among what is taken down. Objects are deleted
after that, one by one, by whoever comes first: the same command, or a later collection.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import Held, PlanRefused
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.garbage import Delete, delete_unless_announced
from kontext_batch.lineage.graph import end_attempts
from kontext_batch.lineage.holds import holds, holds_on_steps
from kontext_batch.lineage.rows import ARTIFACT_ROW, artifact_of
from kontext_batch.lineage.sql import among, dialect_insert, exists, in_state, insert_rows, now, stored_text
from kontext_batch.planning.inbox import ENDED, DropState
from kontext_batch.planning.limits import forgotten_inputs, sources
from kontext_batch.planning.plan import Plan
from kontext_batch.planning.states import LIVE, StepState
from kontext_batch.ports import TAKEN_DOWN, DescendedDelivery, Descent, Hold, SettledDelivery, Tombstone

STEPS, EDGES, SOURCES, OUTPUTS = t.steps.c, t.edges.c, t.step_sources.c, t.step_outputs.c
ARTIFACTS, UPLOADS, DELIVERIES, STONES = t.artifacts.c, t.uploads.c, t.deliveries.c, t.tombstones.c
PHOTO, ARTIFACT, FILE, CLAIM = "photo", "artifact", "file", "claim"
BLOCKING = sa.or_(STONES.kind != ARTIFACT, STONES.note.is_(None))
"""Of an artifact that stays, because others made the same bytes, nothing is kept from anybody."""


NOT_OURS = "the photo itself: not deleted; `--source-too` deletes it where the settings let it be written"


@dataclass(frozen=True, slots=True)
class _Stone:
    """A row of `tombstones`."""

    sha256: str
    uri: str
    kind: str
    note: str | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """What came from a photo, as rows."""

    steps: list[int]
    artifacts: list[sa.Row[Any]]
    shared: set[str]
    """Of `artifacts`: sha256 of what other steps made too."""
    deliveries: list[sa.Row[Any]]


# ------------------------------------------------------------------------------------------------------- questions


def places(conn: sa.Connection, photo: str) -> list[str]:
    seen = sa.select(t.inputs.c.uri).where(t.inputs.c.sha256 == photo)
    read = sa.select(SOURCES.uri).where(SOURCES.sha256 == photo)
    told = sa.select(STONES.uri).where(STONES.sha256 == photo, STONES.kind == PHOTO)
    return sorted(conn.scalars(sa.union(seen, read, told)))


def descent(conn: sa.Connection, photo: str) -> Descent:
    return _descent(conn, photo, _found(conn, photo))


def _descent(conn: sa.Connection, photo: str, found: _Found) -> Descent:
    live = among(STEPS.id, found.steps), in_state(STEPS.state, *LIVE)
    wanted = sa.select(t.run_steps.c.run_id).where(among(t.run_steps.c.step_id, found.steps))
    runs = conn.execute(sa.select(t.runs.c.id, t.runs.c.source).where(t.runs.c.id.in_(wanted)).order_by(t.runs.c.id))
    listed = runs.all()
    kept = [row for row in found.artifacts if row.collected_at is None]
    return Descent(
        photo=photo,
        uris=tuple(places(conn, photo)),
        steps=len(found.steps),
        live=int(conn.scalar(sa.select(sa.func.count()).select_from(t.steps).where(*live)) or 0),
        runs=tuple(row.id for row in listed),
        recipes=tuple(sorted({row.source for row in listed})),
        artifacts=tuple(artifact_of(row) for row in kept if row.sha256 not in found.shared),
        shared=tuple(artifact_of(row) for row in kept if row.sha256 in found.shared),
        deliveries=tuple(
            DescendedDelivery(row.run_id, row.path, row.state, row.delivered_path, row.withdrawn)
            for row in found.deliveries
        ),
        holds=tuple(_holds(conn, photo, found)),
    )


def _holds(conn: sa.Connection, photo: str, found: _Found) -> list[Hold]:
    """Of the photo itself, and of any picture that would be deleted."""
    named = holds_on_steps(conn, found.steps, [row.sha256 for row in found.artifacts])
    of_photo = [each for each in holds(conn) if each.subject == f"photo:{photo}"]
    return [*named, *(each for each in of_photo if each not in named)]


def _found(conn: sa.Connection, photo: str) -> _Found:
    """Steps that read the photo, all below them, and all that read one of their pictures as a photo."""
    pictures = {photo}
    while True:
        first = sa.select(SOURCES.step_id.label("id")).where(among(SOURCES.sha256, sorted(pictures)))
        walk = first.cte("below", recursive=True)
        walk = walk.union(sa.select(EDGES.child).join(walk, EDGES.parent == walk.c.id))
        below = set(conn.scalars(sa.select(walk.c.id)))
        listed = sorted(below)
        artifacts = _artifacts(conn, listed)
        shared = _shared(conn, {row.sha256 for row in artifacts}, below)
        deliveries = _deliveries(conn, listed)
        files = {row.file_sha256 for row in deliveries if row.file_sha256 is not None}
        known = {photo, *files, *(row.sha256 for row in artifacts if row.sha256 not in shared)}
        if known <= pictures or not _any_reader(conn, known - pictures):
            return _Found(listed, artifacts, shared, deliveries)
        pictures = known


def _any_reader(conn: sa.Connection, pictures: Collection[str]) -> bool:
    return bool(conn.scalar(sa.select(exists(among(SOURCES.sha256, sorted(pictures))))))


def _artifacts(conn: sa.Connection, step_ids: Sequence[int]) -> list[sa.Row[Any]]:
    """Those that the steps have made, or had made before they were asked for anew."""
    now_made = sa.select(OUTPUTS.sha256).where(among(OUTPUTS.step_id, step_ids))
    before = sa.select(ARTIFACTS.sha256).join(t.uploads, UPLOADS.uri == ARTIFACTS.uri)
    before = before.where(among(UPLOADS.step_id, step_ids), UPLOADS.state.in_(("committed", "deleted")))
    delivered = sa.select(DELIVERIES.sha256).where(among(DELIVERIES.step_id, step_ids), DELIVERIES.sha256.is_not(None))
    made = sa.union(now_made, before, delivered).subquery("made")
    query = (
        sa.select(*ARTIFACT_ROW, ARTIFACTS.collected_at)
        .join(made, made.c.sha256 == ARTIFACTS.sha256)
        .order_by(ARTIFACTS.sha256)
    )
    return list(conn.execute(query))


def _shared(conn: sa.Connection, shas: Collection[str], steps: set[int]) -> set[str]:
    """Those that a step made too that has nothing to do with this photo, nor with another that was forgotten."""
    query = sa.select(OUTPUTS.sha256, OUTPUTS.step_id).where(among(OUTPUTS.sha256, sorted(shas)))
    others = [row for row in conn.execute(query) if row.step_id not in steps]
    gone = forgotten_steps(conn, sorted({row.step_id for row in others})) if others else set()
    return {row.sha256 for row in others if row.step_id not in gone}


def _deliveries(conn: sa.Connection, step_ids: Sequence[int]) -> list[sa.Row[Any]]:
    columns = (
        DELIVERIES.id,
        DELIVERIES.run_id,
        DELIVERIES.path,
        DELIVERIES.state,
        DELIVERIES.delivered_path,
        DELIVERIES.sha256,
        DELIVERIES.file_sha256,
        DELIVERIES.withdrawn,
        DELIVERIES.claimed_by,
    )
    return list(conn.execute(sa.select(*columns).where(among(DELIVERIES.step_id, step_ids)).order_by(DELIVERIES.id)))


# -------------------------------------------------------------------------------------------------------- the act


def take_down(
    conn: sa.Connection,
    photo: str,
    reason: str,
    who: str,
    *,
    uris: Collection[str],
    removes: Callable[[str], bool],
    despite_hold: bool,
) -> Descent:
    lock_graph(conn, alone=True)
    found = _found(conn, photo)
    _lock_deliveries(conn, found.steps)
    found = replace(found, deliveries=_deliveries(conn, found.steps))  # all else is locked with the graph
    told = _descent(conn, photo, found)
    if told.holds and not despite_hold:
        reasons = "; ".join(f"{each.subject} is held by {each.who}: {each.reason}" for each in told.holds)
        raise Held(
            f"nothing was forgotten, for a legal hold says that it is kept ({reasons}); release it, or say "
            "--despite-hold"
        )
    why = stored_text(TAKEN_DOWN + reason)
    _cancel(conn, found.steps, why)
    mine = {uri: None if removes(uri) else NOT_OURS for uri in {*told.uris, *uris}}
    stones = [_Stone(photo, uri, PHOTO, note) for uri, note in mine.items()]
    stones += [_Stone(row.sha256, row.path, CLAIM) for row in _claims(conn, found.steps)]
    there: list[_Stone] = []
    for artifact in found.artifacts:
        if artifact.sha256 not in found.shared:
            known = stones if artifact.collected_at is not None else there
            known.append(_Stone(artifact.sha256, artifact.uri, ARTIFACT))
    for row in found.deliveries:
        brought = row.state == "delivered" and row.delivered_path is not None and row.withdrawn is None
        if brought and not _delivered_by_others(conn, row, found):
            there.append(_Stone(row.file_sha256 or row.sha256 or "", row.delivered_path, FILE))
    _bury(conn, stones, photo, reason, who)
    _bury(conn, there, photo, reason, who, again=True)
    conn.execute(
        sa.update(t.deliveries)
        .where(among(DELIVERIES.step_id, found.steps), DELIVERIES.state.in_(("waiting", "pending", "failed")))
        .values(state="skipped", error=why)
    )
    _report_anew(conn, told.runs)
    return told


def _cancel(conn: sa.Connection, step_ids: Sequence[int], why: str) -> None:
    """Whoever wants them. A leased one goes by way of ready, as a lease that is given back."""
    live = sa.select(STEPS.id, STEPS.state, STEPS.lease_token)
    rows = conn.execute(
        live.where(among(STEPS.id, step_ids), in_state(STEPS.state, *LIVE))
        .order_by(STEPS.id)
        .with_for_update(key_share=True)
    ).all()
    leased = [(row.id, row.lease_token) for row in rows if row.state == StepState.LEASED]
    if leased:
        conn.execute(
            sa.update(t.steps)
            .where(among(STEPS.id, [step_id for step_id, _ in leased]))
            .values(state=StepState.READY, lease_owner=None, lease_until=None)
        )
        end_attempts(conn, leased, "fenced", why)
    conn.execute(
        sa.update(t.steps)
        .where(among(STEPS.id, [row.id for row in rows]))
        .values(state=StepState.CANCELLED, error=why, not_before=None)
    )


def _delivered_by_others(conn: sa.Connection, row: sa.Row[Any], found: _Found) -> bool:
    """Whether a step that has nothing to do with the photo brought the same bytes to the same place."""
    if row.sha256 not in found.shared:
        return False
    same = DELIVERIES.sha256 == row.sha256, DELIVERIES.delivered_path == row.delivered_path
    others = conn.scalars(sa.select(DELIVERIES.step_id).where(*same, DELIVERIES.withdrawn.is_(None)))
    return not set(others) <= set(found.steps)


def _lock_deliveries(conn: sa.Connection, step_ids: Sequence[int]) -> None:
    """What is settled from here on waits until they are taken down."""
    rows = sa.select(DELIVERIES.id).where(among(DELIVERIES.step_id, step_ids)).order_by(DELIVERIES.id)
    conn.execute(rows.with_for_update(key_share=True)).all()


def _claims(conn: sa.Connection, step_ids: Sequence[int]) -> Sequence[Any]:
    """What workers may be writing at this moment."""
    return conn.execute(
        sa.select(OUTPUTS.sha256, DELIVERIES.path)
        .join(t.deliveries, DELIVERIES.step_id == OUTPUTS.step_id)
        .where(
            among(OUTPUTS.step_id, step_ids),
            OUTPUTS.slot == "image",
            DELIVERIES.state == "pending",
            DELIVERIES.claimed_by.is_not(None),
        )
    ).all()


def _bury(
    conn: sa.Connection, stones: Iterable[_Stone], photo: str, reason: str, who: str, *, again: bool = False
) -> None:
    """New rows; of those that are there, what was left is tried once more. The first who said so stays the one.

    `again`: what is there was seen just now, though it may have been deleted before.
    """
    rows = [asdict(each) for each in {(each.sha256, each.uri): each for each in stones}.values()]
    if not rows:
        return
    insert = dialect_insert(conn, t.tombstones)
    anew = {"note": insert.excluded.note, **({"deleted": None} if again else {})}
    where = None if again else STONES.deleted.is_(None)
    insert = insert.on_conflict_do_update(index_elements=["sha256", "uri"], set_=anew, where=where)
    said = {"source": photo, "reason": stored_text(reason), "who": stored_text(who)}
    values = {name: sa.literal(value) for name, value in said.items()}
    columns = ("sha256", "uri", "kind", "note")
    conn.execute(insert_rows(conn, t.tombstones, columns, rows, into=insert, at=now(), **values))


# -------------------------------------------------------------------------------------------- what is kept from it


def forgotten(conn: sa.Connection, sha256s: Iterable[str]) -> dict[str, Tombstone]:
    if conn.scalar(sa.select(STONES.sha256).limit(1)) is None:
        return {}
    rows = conn.execute(sa.select(t.tombstones).where(among(STONES.sha256, sorted(set(sha256s))), BLOCKING))
    return {row.sha256: _tombstone(row) for row in rows}


def refuse_forgotten(conn: sa.Connection, plan: Plan) -> None:
    """Under the graph's lock: a plan may be older than the takedown. Raises `PlanRefused`."""
    read = {each.sha256 for each in sources(plan).values()}
    reasons = forgotten_inputs(plan, {sha256: each.reason for sha256, each in forgotten(conn, read).items()})
    if reasons:
        raise PlanRefused(reasons)


def forgotten_steps(conn: sa.Connection, step_ids: Sequence[int]) -> set[int]:
    """Those of these steps that were made from something that was taken down."""
    if conn.scalar(sa.select(STONES.sha256).limit(1)) is None:
        return set()
    own = sa.select(STEPS.id.label("step"), STEPS.id.label("above")).where(among(STEPS.id, step_ids))
    walk = own.cte("forgotten_above", recursive=True)
    walk = walk.union(sa.select(walk.c.step, EDGES.parent).join(walk, EDGES.child == walk.c.above))
    read = exists(SOURCES.step_id == walk.c.above, STONES.sha256 == SOURCES.sha256, BLOCKING, outer=walk)
    return set(conn.scalars(sa.select(walk.c.step).where(read).distinct()))


def note_late(conn: sa.Connection, worker_id: str, arrived: Sequence[SettledDelivery]) -> None:
    """Files that were brought while their photo was forgotten: they are taken away like those before."""
    places = {each.id: each for each in arrived if each.skipped is None}
    rows = conn.execute(
        sa.select(DELIVERIES.id, DELIVERIES.step_id, OUTPUTS.sha256)
        .join(t.step_outputs, OUTPUTS.step_id == DELIVERIES.step_id)
        .where(among(DELIVERIES.id, sorted(places)), DELIVERIES.state == "skipped", OUTPUTS.slot == "image")
    ).all()
    lost = forgotten_steps(conn, sorted({row.step_id for row in rows}))
    for row in rows:
        if row.step_id in lost:
            taken = sa.select(t.tombstones).where(STONES.sha256 == row.sha256, STONES.kind == ARTIFACT)
            stone = conn.execute(taken.limit(1)).first()
            if stone is not None:
                late = places[row.id]
                _bury_again(conn, late.file_sha256 or row.sha256, late.path, stone)
    mine = DELIVERIES.claimed_by == worker_id
    conn.execute(
        sa.update(t.deliveries)
        .where(among(DELIVERIES.id, sorted(places)), DELIVERIES.state == "skipped", mine)
        .values(claimed_by=None, claimed_until=None)
    )


def _bury_again(conn: sa.Connection, sha256: str, uri: str, stone: sa.Row[Any]) -> None:
    insert = dialect_insert(conn, t.tombstones).values(
        sha256=sha256, uri=uri, source=stone.source, kind=FILE, reason=stone.reason, who=stone.who, at=now()
    )
    conn.execute(
        insert.on_conflict_do_update(
            index_elements=["sha256", "uri"], set_={"deleted": None, "note": None, "kind": FILE}
        )
    )


# ---------------------------------------------------------------------------------------------------- its objects


def tombstones(
    conn: sa.Connection, *, photo: str | None = None, pending: bool = False, limit: int | None = None
) -> list[Tombstone]:
    query = sa.select(t.tombstones).order_by(STONES.kind, STONES.uri, STONES.sha256).limit(limit)
    if photo is not None:
        query = query.where(STONES.source == photo)
    if pending:
        query = query.where(STONES.deleted.is_(None), STONES.note.is_(None))
    return [_tombstone(row) for row in conn.execute(query)]


def _tombstone(row: sa.Row[Any]) -> Tombstone:
    return Tombstone(row.sha256, row.uri, row.source, row.kind, row.reason, row.who, row.at, row.deleted, row.note)


def bury_artifact(conn: sa.Connection, sha256: str, uri: str, delete: Delete) -> bool:
    lock_graph(conn, alone=True)
    makers = list(conn.scalars(sa.select(OUTPUTS.step_id).where(OUTPUTS.sha256 == sha256).order_by(OUTPUTS.step_id)))
    others = sorted(set(makers) - forgotten_steps(conn, makers))
    if others:
        note = f"stays: step {others[0]}, which has nothing to do with the photo, made the same bytes"
        settle_tombstone(conn, sha256, uri, deleted=False, note=note)
        return True
    if not delete_unless_announced(conn, uri, delete):
        return False
    conn.execute(
        sa.update(t.artifacts)
        .where(ARTIFACTS.sha256 == sha256, ARTIFACTS.collected_at.is_(None))
        .values(collected_at=now())
    )
    conn.execute(sa.update(t.uploads).where(UPLOADS.uri == uri).values(state="deleted"))
    settle_tombstone(conn, sha256, uri, deleted=True)
    return True


def is_claimed(conn: sa.Connection, path: str) -> bool:
    held = DELIVERIES.claimed_by.is_not(None), DELIVERIES.claimed_until > now()
    return bool(conn.scalar(sa.select(exists(*held, DELIVERIES.path == path))))


def settle_tombstone(conn: sa.Connection, sha256: str, uri: str, *, deleted: bool, note: str | None = None) -> None:
    conn.execute(
        sa.update(t.tombstones)
        .where(STONES.sha256 == sha256, STONES.uri == uri)
        .values(deleted=now() if deleted else None, note=None if note is None else stored_text(note))
    )


def withdraw(conn: sa.Connection) -> int:
    gone = exists(
        STONES.uri == DELIVERIES.delivered_path,
        STONES.sha256 == sa.func.coalesce(DELIVERIES.file_sha256, DELIVERIES.sha256),
        STONES.kind.in_((FILE, CLAIM)),
        STONES.deleted.is_not(None),
        outer=t.deliveries,
    )
    runs = conn.scalars(
        sa.update(t.deliveries)
        .where(DELIVERIES.state == "delivered", DELIVERIES.withdrawn.is_(None), gone)
        .values(withdrawn=now())
        .returning(DELIVERIES.run_id)
    ).all()
    _report_anew(conn, set(runs))
    return len(runs)


def _report_anew(conn: sa.Connection, runs: Collection[int]) -> None:
    """Reports that lie beside dropped recipes show the pictures: who answers drops writes these once more."""
    drops = t.inbox.c
    conn.execute(
        sa.update(t.inbox)
        .where(among(drops.run_id, sorted(runs)), drops.state.in_((DropState.ACCEPTED, *ENDED)))
        .values(state=DropState.ACCEPTED, answer=None, token=drops.token + 1, claimed_until=now())
    )
