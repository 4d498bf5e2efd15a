"""Results: intents before the bytes are put, and the one transaction that commits a batch.

Each result is fenced: it counts only while its step is leased under the token that it shows. Whoever shows a stale
token changes nothing but the outcome of its own attempt, and its uploads become orphans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import graph_locked
from kontext_batch.lineage.graph import free_children, skip_below, welcome_back
from kontext_batch.lineage.limits import usage_insert
from kontext_batch.lineage.sql import (
    among,
    among_later,
    dialect_insert,
    execute_all,
    in_state,
    insert_rows,
    now,
    now_plus,
    pair_in,
    rows_of,
    stored_text,
)
from kontext_batch.planning.states import StepState
from kontext_batch.ports import Artifact, BatchRecord, CommitReport, StepDone, StepFailed, StepResult

STEPS, ATTEMPTS, UPLOADS = t.steps.c, t.attempts.c, t.uploads.c
Pairs = Sequence[tuple[int, int]]
"""(step id, token)."""
Held = Mapping[int, tuple[int, int]]
"""Step id -> (token, run on whose account it is), of those that are leased."""


def intend_uploads(conn: sa.Connection, uploads: Sequence[tuple[str, int, int]]) -> None:
    """Of a lease that has moved on, the upload is an orphan from the start."""
    if not uploads:
        return
    held = _held(conn, {step_id for _, step_id, _ in uploads})
    rows = [
        {
            "uri": uri,
            "step_id": step_id,
            "token": token,
            "state": "intent" if _holds(held, step_id, token) else "orphaned",
        }
        for uri, step_id, token in uploads
    ]
    conn.execute(insert_rows(conn, t.uploads, ("uri", "step_id", "token", "state"), rows, created=now()))


def commit(conn: sa.Connection, batch: BatchRecord | None, results: Sequence[StepResult]) -> CommitReport:
    if not results:
        return CommitReport(committed=(), fenced=(), woken={})
    held = _held(conn, {result.step_id for result in results})
    valid = [result for result in results if _holds(held, result.step_id, result.token)]
    stale = [(each.step_id, each.token) for each in results if not _holds(held, each.step_id, each.token)]
    done = [result for result in valid if isinstance(result, StepDone)]
    failed = [result for result in valid if isinstance(result, StepFailed)]

    batch_id = _record_batch(conn, batch) if batch is not None and valid else None
    settled = _settle_uploads(done, [(result.step_id, result.token) for result in failed])
    members = _members(conn, batch, batch_id) if batch is not None and batch_id is not None else []
    sampled = _sampled(results, held)
    used = [usage_insert(conn, batch.worker_id, sampled)] if batch is not None and sampled else []
    execute_all(conn, [*used, *members, *_finish(conn, done, batch_id), *settled])
    woken: Mapping[str, int] = {}
    deliverable = 0
    if done:
        step_ids = [result.step_id for result in done]
        woken = free_children(conn, step_ids)
        deliverable = conn.execute(
            sa.update(t.deliveries)
            .where(among(t.deliveries.c.step_id, step_ids), t.deliveries.c.state == "waiting")
            .values(state="pending")
        ).rowcount
    if failed:
        _fail(conn, failed, batch_id)
    earlier = _fence(conn, stale) if stale else {}
    if batch_id is None:
        batch_id = next(filter(None, earlier.values()), None)
    return CommitReport(
        committed=tuple(
            result.step_id
            for result in results
            if _holds(held, result.step_id, result.token) or (result.step_id, result.token) in earlier
        ),
        fenced=tuple(step_id for step_id, token in stale if (step_id, token) not in earlier),
        woken=woken,
        deliverable=deliverable,
        batch_id=batch_id,
    )


def _held(conn: sa.Connection, step_ids: Iterable[int]) -> Held:
    """Those that are leased; they and the graph are locked until the end of the transaction."""
    rows = conn.execute(_lock_held(conn.dialect.name), {"step_ids": sorted(step_ids)})
    return {row.id: (row.lease_token, row.run_id) for row in rows}


def _holds(held: Held, step_id: int, token: int) -> bool:
    return step_id in held and held[step_id][0] == token


def _sampled(results: Sequence[StepResult], held: Held) -> dict[int, float]:
    """Run -> seconds that the device sampled on its account."""
    seconds: dict[int, float] = {}
    for result in results:
        if result.timings.get("sample") and _holds(held, result.step_id, result.token):
            run_id = held[result.step_id][1]
            seconds[run_id] = seconds.get(run_id, 0.0) + result.timings["sample"]
    return seconds


@cache
def _lock_held(dialect: str) -> sa.Select[Any]:
    """Made once: to put a statement together takes longer than to run it."""
    return (
        sa.select(STEPS.id, STEPS.lease_token, STEPS.run_id)
        .where(*graph_locked(dialect), among_later(STEPS.id, "step_ids"), in_state(STEPS.state, StepState.LEASED))
        .order_by(STEPS.id)
        .with_for_update(key_share=True)
    )


def _record_batch(conn: sa.Connection, batch: BatchRecord) -> int:
    """The number of its row, whose `committed` is that of the last of its members."""
    if batch.id is not None:
        conn.execute(sa.update(t.batches).where(t.batches.c.id == batch.id).values(committed=now()))
        return batch.id
    values = {
        "worker_id": batch.worker_id,
        "lane": batch.lane,
        "device": batch.device,
        "model_sha256": batch.model_sha256,
        "numeric_mode": batch.numeric_mode,
        "libraries": dict(batch.libraries),
        "committed": now(),
    }
    return int(conn.execute(sa.insert(t.batches).values(values).returning(t.batches.c.id)).scalar_one())


def _members(conn: sa.Connection, batch: BatchRecord, batch_id: int) -> list[sa.Insert]:
    """All of them, those with a stale token too: how a batch was composed explains its pixels."""
    rows = [
        {"step_id": each.step_id, "joined": each.joined, "left": each.left, "place": each.place}
        for each in {each.step_id: each for each in batch.members}.values()
    ]
    if not rows:
        return []
    return [
        insert_rows(
            conn,
            t.batch_members,
            ("step_id", "joined", "left", "place"),
            rows,
            batch_id=sa.literal(batch_id, sa.Integer),
        )
    ]


def _finish(conn: sa.Connection, done: Sequence[StepDone], batch_id: int | None) -> list[sa.Insert | sa.Update]:
    """Steps done, with their artifacts, outputs and attempts."""
    if not done:
        return []
    finished = (
        sa.update(t.steps)
        .where(among(STEPS.id, [result.step_id for result in done]))
        .values(state=StepState.DONE, lease_owner=None, lease_until=None, not_before=None, error=None)
    )
    types = {"step_id": STEPS.id.type, "token": STEPS.lease_token.type, "timings": ATTEMPTS.timings.type}
    rows = [{"step_id": result.step_id, "token": result.token, "timings": dict(result.timings)} for result in done]
    took = rows_of(conn, "took", types, rows)
    attempts = (
        sa.update(t.attempts)
        .where(ATTEMPTS.step_id == took.c.step_id, ATTEMPTS.token == took.c.token)
        .values(outcome="ok", ended=now(), batch_id=batch_id, timings=took.c.timings)
    )
    artifacts = {output.artifact.sha256: output.artifact for result in done for output in result.outputs}
    if not artifacts:
        return [finished, attempts]
    outputs = [
        {"step_id": result.step_id, "slot": output.slot, "sha256": output.artifact.sha256}
        for result in done
        for output in result.outputs
    ]
    kept = _keep(conn, [artifacts[sha256] for sha256 in sorted(artifacts)])
    return [kept, insert_rows(conn, t.step_outputs, ("step_id", "slot", "sha256"), outputs), finished, attempts]


def _keep(conn: sa.Connection, artifacts: Sequence[Artifact]) -> sa.Insert:
    """Artifacts are there (again): one that was collected has its bytes back."""
    rows = [
        {
            "sha256": each.sha256,
            "uri": each.uri,
            "media_type": each.media_type,
            "bytes": each.bytes,
            "width": each.width,
            "height": each.height,
        }
        for each in artifacts
    ]
    insert = dialect_insert(conn, t.artifacts)
    # What was read of bytes that are gone says nothing of these.
    gone = t.artifacts.c.collected_at.is_not(None)
    unread = {name: sa.case((gone, None), else_=t.artifacts.c[name]) for name in ("verified", "problem")}
    insert = insert.on_conflict_do_update(
        index_elements=["sha256"], set_={"collected_at": None, "uri": insert.excluded.uri, **unread}
    )
    return insert_rows(conn, t.artifacts, tuple(rows[0]), rows, into=insert, created=now())


def _fail(conn: sa.Connection, failed: Sequence[StepFailed], batch_id: int | None) -> None:
    """Infrastructure faults go back to ready for later; the step's own are final, and what reads it is skipped."""
    for result in failed:
        final = result.retry_in is None
        error = stored_text(result.error)
        conn.execute(
            sa.update(t.steps)
            .where(STEPS.id == result.step_id)
            .values(
                state=StepState.FAILED if final else StepState.READY,
                not_before=None if result.retry_in is None else now_plus(result.retry_in),
                ready_since=None if result.retry_in is None else now_plus(result.retry_in),
                lease_owner=None,
                lease_until=None,
                error=error,
                **({} if result.batch_limit is None else {"batch_limit": result.batch_limit}),
            )
        )
        conn.execute(
            sa.update(t.attempts)
            .where(ATTEMPTS.step_id == result.step_id, ATTEMPTS.token == result.token)
            .values(
                outcome="error" if final else "retry",
                ended=now(),
                batch_id=batch_id,
                error=error,
                error_class=result.error_class,
                timings=dict(result.timings),
            )
        )
    skip_below(conn, [result.step_id for result in failed if result.retry_in is None])
    welcome_back(conn, [result.step_id for result in failed if result.retry_in is not None])


def _settle_uploads(done: Sequence[StepDone], failed: Pairs) -> list[sa.Update]:
    """Of a done step the uploads of its outputs are committed; everything else that was announced is an orphan."""
    kept = sorted({output.artifact.uri for result in done for output in result.outputs})
    finished = [result.step_id for result in done]
    pairs = [(result.step_id, result.token) for result in done] + list(failed)
    if not pairs:
        return []
    committed = sa.and_(among(UPLOADS.uri, kept), among(UPLOADS.step_id, finished))
    return [
        sa.update(t.uploads)
        .where(pair_in(UPLOADS.step_id, UPLOADS.token, pairs))
        .values(state=sa.case((committed, "committed"), else_="orphaned"))
    ]


def _fence(conn: sa.Connection, stale: Pairs) -> dict[tuple[int, int], int | None]:
    """Drop results whose token is stale; returns those that an earlier call has committed under this very token, and
    the batch to which it did.

    That happens when the connection broke after the database had committed and before it could say so.
    """
    mine = pair_in(ATTEMPTS.step_id, ATTEMPTS.token, stale)
    rows = conn.execute(sa.select(ATTEMPTS.step_id, ATTEMPTS.token, ATTEMPTS.outcome, ATTEMPTS.batch_id).where(mine))
    earlier = {(row.step_id, row.token): row.batch_id for row in rows if row.outcome in ("ok", "error", "retry")}
    fenced = [pair for pair in stale if pair not in earlier]
    if fenced:
        conn.execute(
            sa.update(t.attempts)
            .where(pair_in(ATTEMPTS.step_id, ATTEMPTS.token, fenced))
            .values(outcome="fenced", ended=sa.func.coalesce(ATTEMPTS.ended, now()))
        )
        conn.execute(
            sa.update(t.uploads).where(pair_in(UPLOADS.step_id, UPLOADS.token, fenced)).values(state="orphaned")
        )
    return earlier
