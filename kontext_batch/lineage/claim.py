"""Leases: claim, heartbeat, release, and the return of what lost workers held.

A token is the fence: it grows with each claim, and whoever writes a result must show the current one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.deliveries import free_deliveries, pending_deliveries
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.graph import end_attempts, skip_below, welcome_back
from kontext_batch.lineage.provenance import ancestries_query, through_photos
from kontext_batch.lineage.sql import (
    among,
    among_later,
    exists,
    in_state,
    now,
    now_plus,
    ordered_by_equal,
    pair_in,
)
from kontext_batch.planning.marking import Ancestry
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.planning.states import StepState
from kontext_batch.ports import (
    Artifact,
    InHand,
    LeasedStep,
    ParentOutput,
    Ranking,
    Ready,
    ReconcileReport,
    Share,
    SourceInput,
)
from kontext_batch.services.turns import Turns

STEPS = t.steps.c
SILENT_SECONDS = 900.0
"""After which a worker counts as gone, wherever it was; its leases have run out long before."""
IMAGE, LATENTS = "image", "latents"
_CAP_LOCK = 0x6B6F6E76
"""Of claims that keep to caps: what one of them counts, no other may change meanwhile."""


# ---------------------------------------------------------------------------------------------------------- claim


def claim(
    conn: sa.Connection,
    worker_id: str,
    *,
    limit: int,
    lease_seconds: float,
    ranking: Ranking | None = None,
    run_id: int | None = None,
    capped: bool = False,
    in_hand: InHand | None = None,
) -> list[LeasedStep]:
    if capped and conn.dialect.name == "postgresql":
        conn.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_CAP_LOCK})")
    shares = (ranking or Turns())(_ready(conn))
    if run_id is not None:  # its own account first; of the others, the steps that it wants as well
        shares = sorted(shares, key=lambda share: share.run_id != run_id)
    chosen: dict[int, Any] = {}
    of_owner: Counter[str] = Counter()
    lane, beside = "", 0 if in_hand is None else in_hand.steps
    for share in shares:
        if not chosen:
            lane = share.lane
        elif share.lane != lane:
            continue
        room = limit - len(chosen)
        if share.limit is not None:
            room = min(room, share.limit)
        if share.owner_limit is not None:
            room = min(room, share.owner_limit - of_owner[share.owner])
        if room <= 0:
            continue
        # In turn, else a batch that others join and leave might never be small enough.
        found, waits = _choose(conn, share, room, run_id, begun=beside + len(chosen), in_turn=in_hand is not None)
        if found and in_hand is not None and lane != in_hand.lane:
            return []
        of_owner[share.owner] += len(found)
        chosen |= found
        if waits or len(chosen) >= limit or any(step.batch_limit is not None for step in found.values()):
            break
    # None at all: nothing is ready, or other workers hold it at this moment.
    return _lease(conn, worker_id, lane, chosen, lease_seconds) if chosen else []


def _ready(conn: sa.Connection) -> list[Ready]:
    """What may be claimed, by run and lane; and what is leased."""
    rows = conn.execute(_ready_query()).all()
    of_run = {row.id: (row.owner, row.leased) for row in rows}
    of_owner: Counter[str] = Counter()
    for owner, number in of_run.values():
        of_owner[owner] += number
    return [
        Ready(row.id, row.owner, row.priority, row.lane, row.leased, of_owner[row.owner], row.source)
        for row in rows
        if row.lane is not None
    ]


@cache
def _ready_query() -> sa.Select[Any]:
    """This and others are made once: to put a statement together takes longer than to run it."""
    runs, ready = t.runs.c, in_state(STEPS.state, StepState.READY)
    # A walk over the first entry of each run and lane in the index, instead of over every ready step.
    lane = sa.select(sa.func.min(STEPS.lane)).where(ready)
    first = sa.select(runs.id, lane.where(STEPS.run_id == runs.id).scalar_subquery().label("lane"))
    walk = first.where(runs.state == sa.literal_column("'running'")).cte("walk", recursive=True)
    following = lane.where(STEPS.run_id == walk.c.id, STEPS.lane > walk.c.lane).scalar_subquery()
    walk = walk.union_all(sa.select(walk.c.id, following).where(walk.c.lane.is_not(None)))
    leased = (
        sa.select(STEPS.run_id.label("id"), sa.func.count().label("number"))
        .where(in_state(STEPS.state, StepState.LEASED))
        .group_by(STEPS.run_id)
        .subquery("leased")
    )
    return (
        sa.select(
            runs.id,
            runs.owner,
            runs.priority,
            runs.source,
            walk.c.lane,
            sa.func.coalesce(leased.c.number, 0).label("leased"),
        )
        .select_from(t.runs)
        .outerjoin(walk, (walk.c.id == runs.id) & walk.c.lane.is_not(None))
        .outerjoin(leased, leased.c.id == runs.id)
        .where(sa.or_(walk.c.id.is_not(None), leased.c.id.is_not(None)))
        .order_by(runs.id, walk.c.lane)
    )


def waiting_lanes(conn: sa.Connection) -> dict[str, int]:
    """Of steps whose time to wait is not over none is counted."""
    found: Counter[str] = Counter()
    for each in _ready(conn):
        if each.lane not in found and _choose(conn, Share(each.run_id, each.lane), 1, None, begun=0)[0]:
            found[each.lane] = 1
    if OPERATIONS_LANE not in found and pending_deliveries(conn, limit=1):
        found[OPERATIONS_LANE] = 1
    return dict(found)


def _choose(
    conn: sa.Connection, share: Share, limit: int, run_id: int | None, *, begun: int, in_turn: bool = False
) -> tuple[dict[int, Any], bool]:
    """The first steps of a share that may join a batch of `begun` steps.

    One for which the batch is too large is left out; `in_turn`: and so is all that comes after it. Says whether it was.
    """
    others = run_id is not None and run_id != share.run_id
    parameters = {"account": share.run_id, "in_lane": share.lane, "most": limit}
    rows = conn.execute(_choose_query(others=others), {**parameters, "wanted_by": run_id} if others else parameters)
    chosen: dict[int, Any] = {}
    for row in rows:
        if row.batch_limit is not None and row.batch_limit <= begun + len(chosen):
            if in_turn:
                return chosen, True
            continue
        chosen[row.id] = row
        if row.batch_limit is not None:
            limit = min(limit, row.batch_limit - begun)
        if len(chosen) >= limit:
            break
    return chosen, False


@cache
def _choose_query(*, others: bool) -> sa.Select[Any]:
    """`others`: of steps on another run's account only what this run wants as well."""
    query = (
        sa.select(
            STEPS.id,
            STEPS.run_id,
            STEPS.key,
            STEPS.operation,
            STEPS.batch_limit,
            STEPS.losses,
            t.step_params.c.params,
        )
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
        .where(
            in_state(STEPS.state, StepState.READY),
            STEPS.run_id == sa.bindparam("account"),
            ordered_by_equal(STEPS.lane, sa.bindparam("in_lane")),
            sa.or_(STEPS.not_before.is_(None), STEPS.not_before <= now()),
        )
        .order_by(STEPS.lane, STEPS.id)
        .limit(sa.bindparam("most", type_=sa.Integer))
        .with_for_update(skip_locked=True, key_share=True, of=t.steps)
    )
    if not others:
        return query
    wanted = t.run_steps.c.run_id == sa.bindparam("wanted_by")
    return query.where(exists(t.run_steps.c.step_id == STEPS.id, wanted, outer=t.steps))


def _lease(
    conn: sa.Connection, worker_id: str, lane: str, chosen: Mapping[int, Any], lease_seconds: float
) -> list[LeasedStep]:
    lease = (
        sa.update(t.steps)
        .where(among(STEPS.id, chosen))
        .values(
            state=StepState.LEASED,
            lease_owner=worker_id,
            lease_token=STEPS.lease_token + 1,
            lease_until=now_plus(lease_seconds),
            attempts=STEPS.attempts + 1,
        )
        .returning(STEPS.id, STEPS.lease_token, STEPS.asked, STEPS.attempts)
    )
    if conn.dialect.name == "postgresql":  # in one round trip
        leased = lease.cte("leased")
        begun = _begin_attempts(sa.select(*leased.c), worker_id).cte("begun")
        rows = conn.execute(sa.select(leased).add_cte(begun)).all()
    else:
        rows = conn.execute(lease).all()
        held = sa.select(STEPS.id, STEPS.lease_token, STEPS.asked, STEPS.attempts).where(among(STEPS.id, chosen))
        conn.execute(_begin_attempts(held, worker_id))
    by_id = {row.id: row for row in rows}
    parents, sources, ancestries = _pictures(conn, list(chosen))
    return [
        LeasedStep(
            id=step_id,
            run_id=step.run_id,
            key=step.key,
            operation=step.operation,
            params=step.params,
            lane=lane,
            token=by_id[step_id].lease_token,
            attempt=by_id[step_id].attempts,
            losses=step.losses,
            parents=tuple(parents.get(step_id, ())),
            sources=tuple(sources.get(step_id, ())),
            batch_limit=step.batch_limit,
            ancestry=ancestries[step_id],
        )
        for step_id, step in chosen.items()
    ]


def _begin_attempts(leased: sa.Select[Any], worker_id: str) -> sa.Insert:
    """`leased`: id, token, asked and attempts of the steps."""
    begun = leased.add_columns(sa.literal(worker_id), sa.literal({}, sa.JSON), now())
    columns = ["step_id", "token", "asked", "number", "worker_id", "timings", "started"]
    return sa.insert(t.attempts).from_select(columns, begun, include_defaults=False)


def _pictures(
    conn: sa.Connection, step_ids: Sequence[int]
) -> tuple[dict[int, list[ParentOutput]], dict[int, list[SourceInput]], dict[int, Ancestry]]:
    """What each step reads: outputs of its parents, its sources, and what all that came from."""
    parents: dict[int, dict[tuple[str, int], dict[str, Any]]] = {}
    found_sources: dict[int, list[SourceInput]] = {}
    ancestries: dict[int, Ancestry] = {}
    for row in conn.execute(_pictures_query(), {"step_ids": list(step_ids)}):
        if row.role is None:
            ancestries[row.step_id] = Ancestry(model=bool(row.width), photo=bool(row.height))
            continue
        if row.key is None:
            found_sources.setdefault(row.step_id, []).append(SourceInput(row.role, row.position, row.uri, row.sha256))
            continue
        slots = parents.setdefault(row.step_id, {}).setdefault((row.role, row.position), {"key": row.key})
        slots[row.slot] = Artifact(row.sha256, row.uri, row.media_type, row.bytes, row.width, row.height)
    found_parents = {
        step_id: [
            ParentOutput(role, position, slots["key"], slots[IMAGE], slots.get(LATENTS))
            for (role, position), slots in by_place.items()
        ]
        for step_id, by_place in parents.items()
    }
    return found_parents, found_sources, through_photos(conn, ancestries)


@cache
def _pictures_query() -> sa.CompoundSelect[Any]:
    edges, outputs, artifacts, sources = t.edges.c, t.step_outputs.c, t.artifacts.c, t.step_sources.c
    made = (
        sa.select(
            edges.child.label("step_id"),
            edges.role.label("role"),
            edges.position.label("position"),
            STEPS.key.label("key"),
            outputs.slot.label("slot"),
            artifacts.sha256.label("sha256"),
            artifacts.uri.label("uri"),
            artifacts.media_type.label("media_type"),
            artifacts.bytes.label("bytes"),
            artifacts.width.label("width"),
            artifacts.height.label("height"),
        )
        .join(t.steps, STEPS.id == edges.parent)
        .join(t.step_outputs, outputs.step_id == edges.parent)
        .join(t.artifacts, artifacts.sha256 == outputs.sha256)
        .where(among_later(edges.child, "step_ids"))
    )
    nothing = sa.literal_column("NULL", sa.Text)
    zero = sa.literal_column("0", sa.Integer)
    given = sa.select(
        sources.step_id,
        sources.role,
        sources.position,
        nothing,
        nothing,
        sources.sha256,
        sources.uri,
        nothing,
        zero,
        zero,
        zero,
    ).where(among_later(sources.step_id, "step_ids"))
    came_from = ancestries_query().subquery("came_from").c
    flags = sa.select(
        came_from.step_id,
        nothing,
        zero,
        nothing,
        nothing,
        nothing,
        nothing,
        nothing,
        zero,
        came_from.model,
        came_from.photo,
    )
    return sa.union_all(made, given, flags).order_by("step_id", "role", "position")


def extend_leases(conn: sa.Connection, worker_id: str, lease_seconds: float, held: Collection[tuple[int, int]]) -> int:
    extended = 0
    if held:
        mine = (
            sa.select(STEPS.id)
            .where(
                in_state(STEPS.state, StepState.LEASED),
                STEPS.lease_owner == worker_id,  # such a database may give a token twice
                pair_in(STEPS.id, STEPS.lease_token, list(held)),
            )
            .order_by(STEPS.id)  # the order in which the commit locks them
            .with_for_update(key_share=True)
        )
        extended = conn.execute(
            sa.update(t.steps).where(STEPS.id.in_(mine)).values(lease_until=now_plus(lease_seconds))
        ).rowcount
    conn.execute(sa.update(t.workers).where(t.workers.c.id == worker_id).values(heartbeat=now(), retired=None))
    return extended


# --------------------------------------------------------------------------------------------------------- return


def release(conn: sa.Connection, steps: Sequence[tuple[int, int]]) -> None:
    lock_graph(conn, alone=True)
    give_back(conn, steps)


def give_back(conn: sa.Connection, steps: Sequence[tuple[int, int]]) -> None:
    """`release` under the lock of the graph, which whoever calls it holds alone."""
    if not steps:
        return
    back = conn.execute(
        sa.update(t.steps)
        .where(in_state(STEPS.state, StepState.LEASED), pair_in(STEPS.id, STEPS.lease_token, steps))
        .values(
            state=StepState.READY,
            lease_owner=None,
            lease_until=None,
            attempts=STEPS.attempts - 1,
            ready_since=now(),
        )
        .returning(STEPS.id, STEPS.lease_token)
    ).all()
    end_attempts(conn, [(row.id, row.lease_token) for row in back], "released", None)
    welcome_back(conn, [row.id for row in back])


def reconcile(conn: sa.Connection, *, gone_workers: Iterable[str], max_losses: int) -> ReconcileReport:
    gone = list(gone_workers)
    lock_graph(conn, alone=True)
    lost = conn.execute(_overdue(gone).order_by(STEPS.id).with_for_update(key_share=True)).all()
    conn.execute(
        sa.update(t.workers).where(among(t.workers.c.id, gone), t.workers.c.retired.is_(None)).values(retired=now())
    )
    conn.execute(sa.update(t.workers).where(_silent()).values(retired=now()))
    if gone:
        free_deliveries(conn, gone)
    if not lost:
        return ReconcileReport(returned=0, quarantined=0)
    poison = [row.id for row in lost if row.losses + 1 >= max_losses]
    back = [row.id for row in lost if row.losses + 1 < max_losses]
    free = {"lease_owner": None, "lease_until": None, "losses": STEPS.losses + 1, "batch_limit": 1}
    conn.execute(
        sa.update(t.steps).where(among(STEPS.id, back)).values(state=StepState.READY, ready_since=now(), **free)
    )
    if poison:
        said = f"quarantined: {max_losses} workers were lost while they computed it"
        conn.execute(
            sa.update(t.steps).where(among(STEPS.id, poison)).values(state=StepState.QUARANTINED, error=said, **free)
        )
        skip_below(conn, poison)
    end_attempts(
        conn, [(row.id, row.lease_token) for row in lost], "lost", "the worker is gone, or was silent for too long"
    )
    welcome_back(conn, back)
    return ReconcileReport(returned=len(back), quarantined=len(poison))


def anything_overdue(conn: sa.Connection, *, gone_workers: Iterable[str]) -> bool:
    """Whether `reconcile` has something to do; asked first, since it has to wait for other writers."""
    gone = list(gone_workers)
    unretired = sa.select(t.workers.c.id).where(among(t.workers.c.id, gone), t.workers.c.retired.is_(None))
    return (
        conn.execute(_overdue(gone).limit(1)).first() is not None
        or conn.execute(unretired.limit(1)).first() is not None
        or conn.execute(sa.select(t.workers.c.id).where(_silent()).limit(1)).first() is not None
    )


def _silent() -> sa.ColumnElement[bool]:
    """Workers of other hosts that died without a goodbye; one that comes to is known again by its next heartbeat."""
    return sa.and_(t.workers.c.retired.is_(None), t.workers.c.heartbeat <= now_plus(-SILENT_SECONDS))


def _overdue(gone: Sequence[str]) -> sa.Select[Any]:
    return sa.select(STEPS.id, STEPS.lease_token, STEPS.losses).where(
        in_state(STEPS.state, StepState.LEASED),
        sa.or_(STEPS.lease_until <= now(), among(STEPS.lease_owner, gone)),
    )
