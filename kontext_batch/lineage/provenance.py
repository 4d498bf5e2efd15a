"""What pictures came from, for marks, sidecars and manifests: asked for many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.links import Link, makers, walk_up
from kontext_batch.lineage.sql import among, among_later, exists
from kontext_batch.planning.marking import Ancestry
from kontext_batch.planning.params import SAMPLING
from kontext_batch.ports import DeliveredPicture, MadeStep, ParentPicture, SourceInput

STEPS, EDGES, SOURCES, OUTPUTS = t.steps.c, t.edges.c, t.step_sources.c, t.step_outputs.c


def ancestries(conn: sa.Connection, step_ids: Collection[int]) -> dict[int, Ancestry]:
    """What went into the picture of each step, however far above it."""
    rows = conn.execute(_ancestries_query(), {"step_ids": list(step_ids)})
    return through_photos(conn, {row.step_id: Ancestry(bool(row.model), bool(row.photo)) for row in rows})


def through_photos(conn: sa.Connection, found: Mapping[int, Ancestry]) -> dict[int, Ancestry]:
    """`found`, where a picture of an earlier run that was read as a photo counts as what it came from.

    Looked at are those that no model of their own run took part in; the others' term tells of both already.
    """
    converted = [step_id for step_id, each in found.items() if each.photo and not each.model]
    links = walk_up(conn, converted) if converted else []
    if not links:
        return dict(found)
    step_ids = sorted({*converted, *(parent for parent, _ in links)})
    sampled = conn.scalars(sa.select(STEPS.id).where(among(STEPS.id, step_ids), STEPS.operation.in_(sorted(SAMPLING))))
    read = conn.execute(sa.select(SOURCES.step_id, SOURCES.sha256).where(among(SOURCES.step_id, step_ids))).all()
    made = {sha256 for sha256, _ in makers(conn, {row.sha256 for row in read})}
    model = _below(sampled, links)
    photo = _below((row.step_id for row in read if row.sha256 not in made), links)
    return {**found, **{each: Ancestry(each in model, each in photo) for each in converted}}


def _below(step_ids: Iterable[int], links: Iterable[Link]) -> set[int]:
    """These steps and what lies below them by `links`."""
    children: dict[int, list[int]] = defaultdict(list)
    for parent, child in links:
        children[parent].append(child)
    found: set[int] = set()
    todo = list(step_ids)
    while todo:
        step_id = todo.pop()
        if step_id not in found:
            found.add(step_id)
            todo += children[step_id]
    return found


@cache
def _ancestries_query() -> sa.Select[Any]:
    return ancestries_query()


def ancestries_query() -> sa.Select[Any]:
    """(step_id, model, photo), 0 or 1 each, of the steps of the parameter `step_ids`; for `through_photos`."""
    above = _above()
    # One by one: PostgreSQL overrates what lies above a step, and reads `steps` whole for a join.
    operation = sa.select(STEPS.operation).where(STEPS.id == above.c.id).correlate(above).scalar_subquery()
    sampled = operation.in_([sa.literal_column(f"'{each}'") for each in sorted(SAMPLING)])
    sourced = exists(SOURCES.step_id == above.c.id, outer=above)
    return sa.select(
        above.c.step_id,
        sa.func.max(sa.case((sampled, 1), else_=0)).label("model"),
        sa.func.max(sa.case((sourced, 1), else_=0)).label("photo"),
    ).group_by(above.c.step_id)


def _above(*, past: sa.ColumnElement[bool] | None = None) -> sa.CTE:
    """(step_id, id): each step of the parameter `step_ids` with itself and all above it.

    `past`: said of a step in `steps`; nothing is asked for that lies above one of which it is not true.
    """
    first = sa.select(STEPS.id.label("step_id"), STEPS.id.label("id")).where(among_later(STEPS.id, "step_ids"))
    walk = first.cte("above", recursive=True)
    further = sa.select(walk.c.step_id, EDGES.parent).join(t.edges, EDGES.child == walk.c.id)
    if past is not None:
        further = further.join(t.steps, STEPS.id == walk.c.id).where(past)
    return walk.union(further)


def delivered_pictures(conn: sa.Connection, delivery_ids: Sequence[int]) -> dict[int, DeliveredPicture]:
    rows = conn.execute(_deliveries_query(), {"delivery_ids": list(delivery_ids)}).all()
    step_ids = sorted({row.step_id for row in rows})
    ancestry = ancestries(conn, step_ids)
    chains: dict[int, list[int]] = defaultdict(list)
    for step_id, each in conn.execute(_chains_query(), {"step_ids": step_ids}):
        chains[step_id].append(each)
    made = _made(conn, {each for chain in chains.values() for each in chain})
    weights = {step.params["model_sha256"] for step in made.values() if step.params.get("model_sha256")}
    models = t.models.c
    known = conn.execute(sa.select(models.sha256, models.licence).where(among(models.sha256, sorted(weights))))
    licences = {row.sha256: row.licence for row in known if row.licence}
    return {
        row.id: DeliveredPicture(
            run_id=row.run_id,
            recipe=row.recipe,
            recipe_sha256=row.recipe_sha256,
            file=row.file,
            line=row.line,
            node=row.node,
            axes=row.axes,
            candidate=row.candidate,
            take=row.take,
            ancestry=ancestry[row.step_id],
            steps=tuple(made[each] for each in sorted(chains[row.step_id], reverse=True)),
            licences=licences,
        )
        for row in rows
    }


@cache
def _deliveries_query() -> sa.Select[Any]:
    deliveries, instances, runs = t.deliveries.c, t.run_steps.c, t.runs.c
    return (
        sa.select(
            deliveries.id,
            deliveries.run_id,
            deliveries.step_id,
            runs.recipe,
            runs.recipe_sha256,
            instances.file,
            instances.line,
            instances.node,
            instances.axes,
            instances.candidate,
            instances.take,
        )
        .join(t.runs, runs.id == deliveries.run_id)
        .join(t.run_steps, (instances.run_id == deliveries.run_id) & (instances.ordinal == deliveries.ordinal))
        .where(among_later(deliveries.id, "delivery_ids"))
    )


@cache
def _chains_query() -> sa.Select[Any]:
    """A sheet of a thousand cells names them; what they came from is theirs to tell."""
    above = _above(past=STEPS.operation != sa.literal_column("'contact_sheet'"))
    return sa.select(above.c.step_id, above.c.id)


def _made(conn: sa.Connection, step_ids: Iterable[int]) -> dict[int, MadeStep]:
    ids = {"step_ids": sorted(step_ids)}
    parents: dict[int, list[ParentPicture]] = defaultdict(list)
    for row in conn.execute(_parents_query(), ids):
        parents[row.child].append(ParentPicture(row.role, row.position, row.key, row.sha256))
    sources: dict[int, list[SourceInput]] = defaultdict(list)
    for row in conn.execute(_sources_query(), ids):
        sources[row.step_id].append(SourceInput(row.role, row.position, row.uri, row.sha256))
    attempts = {row.step_id: row for row in conn.execute(_attempts_query(), ids)}
    found: dict[int, MadeStep] = {}
    for row in conn.execute(_steps_query(), ids):
        tried = attempts.get(row.id)
        found[row.id] = MadeStep(
            key=row.key,
            operation=row.operation,
            params=row.params,
            sha256=row.sha256,
            parents=tuple(parents[row.id]),
            sources=tuple(sources[row.id]),
            started=None if tried is None else tried.started,
            ended=None if tried is None else tried.ended,
            device=None if tried is None else tried.device,
            numeric_mode=None if tried is None else tried.numeric_mode,
            libraries={} if tried is None else tried.libraries or {},
        )
    return found


@cache
def _steps_query() -> sa.Select[Any]:
    return (
        sa.select(STEPS.id, STEPS.key, STEPS.operation, t.step_params.c.params, OUTPUTS.sha256)
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
        .outerjoin(t.step_outputs, _picture_of(STEPS.id))
        .where(among_later(STEPS.id, "step_ids"))
    )


def _picture_of(step_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    return sa.and_(OUTPUTS.step_id == step_id, OUTPUTS.slot == sa.literal_column("'image'"))


@cache
def _parents_query() -> sa.Select[Any]:
    return (
        sa.select(EDGES.child, EDGES.role, EDGES.position, STEPS.key, OUTPUTS.sha256)
        .join(t.steps, STEPS.id == EDGES.parent)
        .outerjoin(t.step_outputs, _picture_of(EDGES.parent))
        .where(among_later(EDGES.child, "step_ids"))
        .order_by(EDGES.child, EDGES.role, EDGES.position)
    )


@cache
def _sources_query() -> sa.Select[Any]:
    return (
        sa.select(t.step_sources)
        .where(among_later(SOURCES.step_id, "step_ids"))
        .order_by(SOURCES.step_id, SOURCES.role, SOURCES.position)
    )


@cache
def _attempts_query() -> sa.Select[Any]:
    """The one that made what is there comes last, where a step was asked for anew."""
    attempts, batches = t.attempts.c, t.batches.c
    return (
        sa.select(
            attempts.step_id,
            attempts.started,
            attempts.ended,
            batches.device,
            batches.numeric_mode,
            batches.libraries,
        )
        .outerjoin(t.batches, batches.id == attempts.batch_id)
        .where(among_later(attempts.step_id, "step_ids"), attempts.outcome == sa.literal_column("'ok'"))
        .order_by(attempts.token)
    )
