"""What must hold of a database at any moment, checked on the live one (ORCHESTRATION.md section 6).

Each rule is one query for what breaks it, so that it sees one moment of a database at work. What lies in the object
store is not looked at here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.graph import open_run
from kontext_batch.lineage.sql import exists, in_state, now, seconds_between
from kontext_batch.planning.inbox import ENDED, DropState
from kontext_batch.planning.states import LIVE, UNSUCCESSFUL, RunState, StepState

STEPS, EDGES, ATTEMPTS, OUTPUTS = t.steps.c, t.edges.c, t.attempts.c, t.step_outputs.c
MOST = 100
"""Violations of one rule that are told."""
S = StepState


@dataclass(frozen=True, slots=True)
class Violation:
    """A row that breaks a rule."""

    rule: str
    table: str
    id: int | str


def verify(conn: sa.Connection, *, overdue_seconds: float | None = None) -> list[Violation]:
    """Everything found. `overdue_seconds`: how long after its end a lease may wait to be returned; None: for ever."""
    return [
        Violation(rule, table, found)
        for rule, table, query in _rules(overdue_seconds)
        for found in conn.scalars(query.limit(MOST))
    ]


def _rules(overdue_seconds: float | None) -> Iterator[tuple[str, str, sa.Select[Any]]]:
    yield from _waiting()
    yield from _results()
    yield from _leases(overdue_seconds)
    yield from _runs()
    yield from _inbox()
    yield from _objects()


def _waiting() -> Iterator[tuple[str, str, sa.Select[Any]]]:
    parent = t.steps.alias("parent")
    edge = (EDGES.child == STEPS.id, parent.c.id == EDGES.parent)
    undone = (
        sa.select(sa.func.count(EDGES.parent.distinct()))
        .where(*edge, sa.not_(in_state(parent.c.state, S.DONE)))
        .correlate(t.steps)
        .scalar_subquery()
    )
    steps = sa.select(STEPS.id)
    yield (
        "deps_left of a blocked step is the number of its parents that are not done",
        "steps",
        steps.where(in_state(STEPS.state, S.BLOCKED), sa.or_(STEPS.deps_left != undone, STEPS.deps_left == 0)),
    )
    yield (
        "a ready step waits for nothing",
        "steps",
        steps.where(in_state(STEPS.state, S.READY), sa.or_(STEPS.deps_left != 0, undone != 0)),
    )
    yield (
        "the parents of a blocked step are done or live",
        "steps",
        steps.where(
            in_state(STEPS.state, S.BLOCKED), exists(*edge, in_state(parent.c.state, *UNSUCCESSFUL), outer=t.steps)
        ),
    )
    kept = exists(
        OUTPUTS.step_id == parent.c.id,
        OUTPUTS.slot == "image",
        t.artifacts.c.sha256 == OUTPUTS.sha256,
        t.artifacts.c.collected_at.is_(None),
        outer=parent,
    )
    yield (
        "the pictures that a live step reads from done parents are there",
        "steps",
        steps.where(
            in_state(STEPS.state, *LIVE),
            exists(*edge, in_state(parent.c.state, S.DONE), sa.not_(kept), outer=t.steps),
        ),
    )
    yield (
        "a step that is leased or done has no undone parent, unless that was asked for anew",
        "steps",
        steps.where(
            in_state(STEPS.state, S.LEASED, S.DONE),
            exists(*edge, sa.not_(in_state(parent.c.state, S.DONE)), parent.c.asked == 1, outer=t.steps),
        ),
    )
    yield ("a parent is older than its children", "edges", sa.select(EDGES.child).where(EDGES.parent >= EDGES.child))


def _results() -> Iterator[tuple[str, str, sa.Select[Any]]]:
    has_image = exists(OUTPUTS.step_id == STEPS.id, OUTPUTS.slot == "image", outer=t.steps)
    has_output = exists(OUTPUTS.step_id == STEPS.id, outer=t.steps)
    succeeded = (
        sa.select(sa.func.count())
        .select_from(t.attempts)
        .where(ATTEMPTS.step_id == STEPS.id, ATTEMPTS.asked == STEPS.asked, ATTEMPTS.outcome == "ok")
        .correlate(t.steps)
        .scalar_subquery()
    )
    done = in_state(STEPS.state, S.DONE)
    steps = sa.select(STEPS.id)
    yield "a done step has a picture", "steps", steps.where(done, sa.not_(has_image))
    yield "a step that is not done has no output", "steps", steps.where(sa.not_(done), has_output)
    yield (
        "a done step succeeded in one attempt, every other in none",
        "steps",
        steps.where(succeeded != sa.case((done, 1), else_=0)),
    )
    failed = exists(
        ATTEMPTS.step_id == STEPS.id, ATTEMPTS.asked == STEPS.asked, ATTEMPTS.outcome == "error", outer=t.steps
    )
    yield "a failed step has an attempt that says why", "steps", steps.where(in_state(STEPS.state, S.FAILED), ~failed)


def _leases(overdue_seconds: float | None) -> Iterator[tuple[str, str, sa.Select[Any]]]:
    leased = in_state(STEPS.state, S.LEASED)
    steps = sa.select(STEPS.id)
    is_open = exists(
        ATTEMPTS.step_id == STEPS.id, ATTEMPTS.token == STEPS.lease_token, ATTEMPTS.outcome.is_(None), outer=t.steps
    )
    yield "a leased step has an open attempt under its token", "steps", steps.where(leased, sa.not_(is_open))
    yield "a leased step has an end of its lease", "steps", steps.where(leased, STEPS.lease_until.is_(None))
    held = exists(STEPS.id == ATTEMPTS.step_id, STEPS.lease_token == ATTEMPTS.token, leased, outer=t.attempts)
    attempts = sa.select(ATTEMPTS.id)
    yield (
        "an open attempt is that of a lease",
        "attempts",
        attempts.where(ATTEMPTS.outcome.is_(None), sa.not_(held)),
    )
    ended = ATTEMPTS.outcome.is_not(None)
    yield "an attempt with an outcome has ended", "attempts", attempts.where(ended, ATTEMPTS.ended.is_(None))
    if overdue_seconds is not None:
        late = seconds_between(STEPS.lease_until, now()) > overdue_seconds
        yield "a lease that ran out is returned soon", "steps", steps.where(leased, late)


def _runs() -> Iterator[tuple[str, str, sa.Select[Any]]]:
    wanted = exists(
        t.run_steps.c.step_id == STEPS.id,
        t.runs.c.id == t.run_steps.c.run_id,
        open_run(),
        outer=t.steps,
    )
    waiting = sa.select(STEPS.id).where(in_state(STEPS.state, S.BLOCKED, S.READY))
    yield "a step that waits is wanted by an open run", "steps", waiting.where(sa.not_(wanted))
    paused = exists(t.runs.c.id == STEPS.run_id, t.runs.c.state == RunState.PAUSED, outer=t.steps)
    running = exists(
        t.run_steps.c.step_id == STEPS.id,
        t.runs.c.id == t.run_steps.c.run_id,
        t.runs.c.state == RunState.RUNNING,
        outer=t.steps,
    )
    account = exists(
        t.run_steps.c.step_id == STEPS.id,
        t.run_steps.c.run_id == STEPS.run_id,
        t.runs.c.id == STEPS.run_id,
        open_run(),
        outer=t.steps,
    )
    yield "a step that waits is on the account of an open run that wants it", "steps", waiting.where(sa.not_(account))
    yield "no step waits for a paused run while a running one wants it", "steps", waiting.where(paused, running)
    mine, other = t.runs.alias("mine"), t.runs.alias("other")
    better = exists(
        mine.c.id == STEPS.run_id,
        t.run_steps.c.step_id == STEPS.id,
        other.c.id == t.run_steps.c.run_id,
        other.c.state == mine.c.state,
        other.c.priority > mine.c.priority,
        outer=t.steps,
    )
    yield "a step that waits is on the account of the highest priority", "steps", waiting.where(better)
    distinct = (
        sa.select(sa.func.count())
        .select_from(t.run_steps)
        .where(t.run_steps.c.run_id == t.runs.c.id, t.run_steps.c.first)
        .correlate(t.runs)
        .scalar_subquery()
    )
    yield "a run knows how many steps it has", "runs", sa.select(t.runs.c.id).where(t.runs.c.size != distinct)
    deliveries = t.deliveries.c
    done = exists(STEPS.id == deliveries.step_id, in_state(STEPS.state, S.DONE), outer=t.deliveries)
    each = sa.select(deliveries.id)
    yield "a pending delivery's step is done", "deliveries", each.where(deliveries.state == "pending", ~done)
    yield "a waiting delivery's step is not done", "deliveries", each.where(deliveries.state == "waiting", done)
    yield (
        "a delivery that arrived says what and where",
        "deliveries",
        each.where(
            deliveries.state == "delivered", sa.or_(deliveries.sha256.is_(None), deliveries.delivered_path.is_(None))
        ),
    )
    gone = exists(
        OUTPUTS.step_id == deliveries.step_id,
        OUTPUTS.slot == "image",
        t.artifacts.c.sha256 == OUTPUTS.sha256,
        t.artifacts.c.collected_at.is_not(None),
        outer=t.deliveries,
    )
    wanting = exists(t.runs.c.id == deliveries.run_id, open_run(), outer=t.deliveries)
    yield (
        "what an open run has still to deliver is there",
        "deliveries",
        each.where(deliveries.state == "pending", wanting, gone),
    )


def _inbox() -> Iterator[tuple[str, str, sa.Select[Any]]]:
    drops = t.inbox.c
    with_run = drops.state.in_((DropState.ACCEPTED, *ENDED))
    yield (
        "a drop has a run just when it was accepted",
        "inbox",
        sa.select(drops.id).where(with_run != drops.run_id.is_not(None)),
    )
    watched = drops.state.in_((DropState.SEEN, DropState.CLAIMED, DropState.ACCEPTED))
    yield (
        "a drop that is not settled is looked at again",
        "inbox",
        sa.select(drops.id).where(watched, drops.claimed_until.is_(None)),
    )


def _objects() -> Iterator[tuple[str, str, sa.Select[Any]]]:
    uploads = t.uploads.c
    leased = exists(
        STEPS.id == uploads.step_id,
        STEPS.lease_token == uploads.token,
        in_state(STEPS.state, S.LEASED),
        outer=t.uploads,
    )
    named = exists(t.artifacts.c.uri == uploads.uri, outer=t.uploads)
    each = sa.select(uploads.id)
    yield "an intended upload is that of a lease", "uploads", each.where(uploads.state == "intent", sa.not_(leased))
    yield (
        "a committed upload is somebody's artifact",
        "uploads",
        each.where(uploads.state == "committed", sa.not_(named)),
    )
