"""The processes that compute: they say hello and goodbye, are looked at, and are told what nobody wants any more."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.claim import give_back
from kontext_batch.lineage.deliveries import free_deliveries
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.sql import exists, in_state, now, seconds_between
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import Orders, WorkerInfo, WorkerRow

WORKERS, STEPS, RUNS = t.workers.c, t.steps.c, t.runs.c


def register_worker(conn: sa.Connection, worker: WorkerInfo) -> None:
    values: dict[str, Any] = {
        "host": worker.host,
        "pid": worker.pid,
        "process_started": worker.process_started,
        "device": worker.device,
        "engine": dict(worker.engine),
        "registered": now(),
        "heartbeat": now(),
        "retired": None,
        "drain": False,
    }
    if not conn.execute(sa.update(t.workers).where(WORKERS.id == worker.id).values(values)).rowcount:
        conn.execute(sa.insert(t.workers).values(id=worker.id, **values))


def workers(conn: sa.Connection) -> list[WorkerInfo]:
    rows = conn.execute(sa.select(t.workers).where(WORKERS.retired.is_(None)).order_by(WORKERS.registered))
    return [WorkerInfo(row.id, row.host, row.pid, row.process_started, row.device, row.engine) for row in rows]


def retire_worker(conn: sa.Connection, worker_id: str) -> None:
    release_all(conn, worker_id)
    conn.execute(sa.update(t.workers).where(WORKERS.id == worker_id).values(retired=now()))


def release_all(conn: sa.Connection, worker_id: str) -> None:
    lock_graph(conn, alone=True)
    held = conn.execute(
        sa.select(STEPS.id, STEPS.lease_token)
        .where(in_state(STEPS.state, StepState.LEASED), STEPS.lease_owner == worker_id)
        .order_by(STEPS.id)
        .with_for_update(key_share=True)
    )
    give_back(conn, [(row.id, row.lease_token) for row in held])
    free_deliveries(conn, [worker_id])


def worker_rows(conn: sa.Connection, *, retired: bool) -> list[WorkerRow]:
    held = (
        sa.select(sa.func.count())
        .select_from(t.steps)
        .where(in_state(STEPS.state, StepState.LEASED), STEPS.lease_owner == WORKERS.id)
        .correlate(t.workers)
        .scalar_subquery()
    )
    age = seconds_between(WORKERS.heartbeat, now())
    query = sa.select(t.workers, held.label("held"), age.label("age")).order_by(WORKERS.registered, WORKERS.id)
    if not retired:
        query = query.where(WORKERS.retired.is_(None))
    return [
        WorkerRow(
            id=row.id,
            host=row.host,
            pid=row.pid,
            device=row.device,
            registered=row.registered,
            heartbeat_age=max(0.0, float(row.age)),
            held=row.held,
            draining=row.drain,
            retired=row.retired,
        )
        for row in conn.execute(query)
    ]


def drain_workers(conn: sa.Connection, worker_id: str | None) -> list[str]:
    meant = WORKERS.retired.is_(None) if worker_id is None else WORKERS.id == worker_id
    found = conn.scalars(sa.select(WORKERS.id).where(meant, WORKERS.retired.is_(None))).all()
    if worker_id is not None and not found:
        raise ObjectNotFound(f"no worker '{worker_id}' is at work; `workers list` shows those that are")
    told = conn.scalars(
        sa.update(t.workers)
        .where(meant, WORKERS.retired.is_(None), sa.not_(WORKERS.drain))
        .values(drain=True)
        .returning(WORKERS.id)
    )
    return sorted(told)


def orders(conn: sa.Connection, worker_id: str) -> Orders:
    """What it holds is wanted by open runs, and by cancelled ones that let what was begun be finished."""
    drain = conn.scalar(sa.select(WORKERS.drain).where(WORKERS.id == worker_id))
    wanted = exists(
        t.run_steps.c.step_id == STEPS.id,
        RUNS.id == t.run_steps.c.run_id,
        sa.or_(open_run(), (RUNS.state == RunState.CANCELLED) & RUNS.drain),
        outer=t.steps,
    )
    unwanted = conn.execute(
        sa.select(STEPS.id, STEPS.lease_token).where(
            in_state(STEPS.state, StepState.LEASED), STEPS.lease_owner == worker_id, sa.not_(wanted)
        )
    )
    return Orders(bool(drain), frozenset((row.id, row.lease_token) for row in unwanted))
