"""What was made from a photo, from weights, by a recipe or below a step, a page at a time.

A page begins where the one before it ended and reads nothing of what lies before: its cost is that of its own rows,
however many there are. The steps that read the subject (the roots) are taken in order of their ids, and with each root
all that lies below it. What lies below several roots is told with the first of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.links import Link, edges_above, walk_down, walk_up
from kontext_batch.lineage.rows import ARTIFACT_ROW, picture_of, with_picture
from kontext_batch.lineage.sql import among, by_indices
from kontext_batch.lineage.tracing import deliveries, in_newest_run
from kontext_batch.planning.states import StepState
from kontext_batch.ports.tracing import MadePage, MadeStep, Place, Subject, SubjectKind

STEPS, RUN_STEPS, RUNS = t.steps.c, t.run_steps.c, t.runs.c
SOURCES, MATERIALS = t.step_sources.c, t.step_materials.c
ROOTS_AT_ONCE = 256


def made_from(conn: sa.Connection, subject: Subject, *, after: Place | None, limit: int) -> MadePage:
    by_indices(conn)
    if subject.kind is SubjectKind.RECIPE:
        return _made_by_recipe(conn, subject, after, limit)
    found, links, end = _places(conn, subject, after, limit)
    rows = conn.execute(_rows().where(among(STEPS.id, found), in_newest_run())).all()
    told = {step.id: step for step in _told(conn, rows, links)}
    return MadePage(tuple(told[step_id] for step_id in found), end)


def made_directly(conn: sa.Connection, subject: Subject) -> int:
    if subject.kind is SubjectKind.STEP:
        return len(subject.step_ids)
    if subject.kind is SubjectKind.WEIGHTS:
        found = sa.select(sa.func.count()).where(among(MATERIALS.sha256, subject.sha256s))
    elif subject.kind is SubjectKind.PHOTO:
        found = sa.select(sa.func.count(SOURCES.step_id.distinct())).where(among(SOURCES.sha256, subject.sha256s))
    else:
        found = sa.select(sa.func.sum(RUNS.size)).where(among(RUNS.recipe_sha256, subject.sha256s))
    return int(conn.scalar(found) or 0)


# ------------------------------------------------------------------------------------------------- below some steps


def _places(
    conn: sa.Connection, subject: Subject, after: Place | None, limit: int
) -> tuple[list[int], list[Link], Place | None]:
    """Steps of the page in its order, the links below their roots, and where the next page begins."""
    found: list[int] = []
    links: list[Link] = []
    root, last = after or (0, 0)
    first = after is None
    while True:
        roots = _roots(conn, subject, root, ROOTS_AT_ONCE)
        below = walk_down(conn, roots)
        links += below
        owned = _owned(roots, below)
        if roots and not first:
            for step_id in _told_before(conn, subject, owned, roots[0]):
                del owned[step_id]
        for owner, step_id in sorted((owner, step_id) for step_id, owner in owned.items()):
            if (owner, step_id) <= (root, last):
                continue
            if len(found) == limit:
                return found, links, (root, last)
            found.append(step_id)
            root, last = owner, step_id
        if len(roots) < ROOTS_AT_ONCE:
            return found, links, None
        root, last, first = roots[-1] + 1, 0, False


def _roots(conn: sa.Connection, subject: Subject, least: int, count: int) -> list[int]:
    """Steps that read the subject, or are it, from the id `least` on."""
    if subject.kind is SubjectKind.STEP:
        return sorted({step_id for step_id in subject.step_ids if step_id >= least})[:count]
    by, step = (
        (MATERIALS.sha256, MATERIALS.step_id)
        if subject.kind is SubjectKind.WEIGHTS
        else (SOURCES.sha256, SOURCES.step_id)
    )
    found: set[int] = set()
    for sha256 in subject.sha256s:  # one by one: several would have to be sorted whole
        query = sa.select(step).where(by == sha256, step >= least).distinct().order_by(step).limit(count)
        found.update(conn.scalars(query))
    return sorted(found)[:count]


def _owned(roots: Sequence[int], links: Sequence[Link]) -> dict[int, int]:
    """Step -> the first of `roots` that it lies below."""
    children: dict[int, list[int]] = defaultdict(list)
    for parent, child in links:
        children[parent].append(child)
    owned: dict[int, int] = {}
    for root in roots:
        todo = [root]
        while todo:
            step_id = todo.pop()
            if step_id not in owned:
                owned[step_id] = root
                todo.extend(children[step_id])
    return owned


def _told_before(conn: sa.Connection, subject: Subject, owned: Mapping[int, int], least: int) -> set[int]:
    """Those of `owned` that also lie below a root whose id is under `least`."""
    links = walk_up(conn, sorted(owned))
    earlier = {each for each in [*owned, *(parent for parent, _ in links)] if each < least}
    if not earlier:
        return set()
    read = _reading(conn, subject, earlier)
    return _owned(sorted(read), links).keys() & owned.keys()


def _reading(conn: sa.Connection, subject: Subject, step_ids: set[int]) -> set[int]:
    """Which of these steps read the subject, or are it."""
    if subject.kind is SubjectKind.STEP:
        return step_ids & set(subject.step_ids)
    if subject.kind is SubjectKind.WEIGHTS:
        query = sa.select(MATERIALS.step_id).where(
            among(MATERIALS.sha256, subject.sha256s), among(MATERIALS.step_id, sorted(step_ids))
        )
    else:
        query = sa.select(SOURCES.step_id).where(
            among(SOURCES.step_id, sorted(step_ids)), among(SOURCES.sha256, subject.sha256s)
        )
    return set(conn.scalars(query))


# --------------------------------------------------------------------------------------------------------- recipes


def _made_by_recipe(conn: sa.Connection, subject: Subject, after: Place | None, limit: int) -> MadePage:
    """By the key of `run_steps`, from run to run."""
    run, last = after or (0, -1)
    query = sa.select(RUNS.id).where(among(RUNS.recipe_sha256, subject.sha256s), RUNS.id >= run).order_by(RUNS.id)
    found: list[MadeStep] = []
    for run_id in conn.scalars(query).all():
        behind = last if run_id == run else -1
        rows = conn.execute(
            _rows()
            .where(RUN_STEPS.run_id == run_id, RUN_STEPS.ordinal > behind, RUN_STEPS.first)
            .order_by(RUN_STEPS.ordinal)
            .limit(limit + 1 - len(found))
        ).all()
        more = len(found) + len(rows) > limit
        found += _told(conn, rows[:-1] if more else rows, run_id=run_id)
        if more:
            place = (run_id, rows[-1].ordinal - 1)
            return MadePage(tuple(found), place)
    return MadePage(tuple(found), None)


# ------------------------------------------------------------------------------------------------------------- rows


def _rows() -> sa.Select[Any]:
    """Instances with what is told of them: without parameters, which are the most of a step's bytes."""
    return with_picture(
        sa.select(
            STEPS.id,
            RUN_STEPS.node,
            RUN_STEPS.axes,
            RUN_STEPS.candidate,
            RUN_STEPS.run_id,
            RUN_STEPS.ordinal,
            STEPS.operation,
            STEPS.state,
            *ARTIFACT_ROW,
        )
        .select_from(t.run_steps)
        .join(t.steps, STEPS.id == RUN_STEPS.step_id)
    )


def _told(
    conn: sa.Connection, rows: Sequence[sa.Row[Any]], links: Sequence[Link] = (), *, run_id: int | None = None
) -> list[MadeStep]:
    """`links`: what is known beside the edges; `run_id`: what this run delivered; None: what any run did."""
    ids = [row.id for row in rows]
    delivered = deliveries(conn, ids, run_ids=None if run_id is None else [run_id])
    parents: dict[int, list[int]] = defaultdict(list)
    for parent, child in sorted({*edges_above(conn, ids), *links}):
        parents[child].append(parent)
    return [
        MadeStep(
            id=row.id,
            node=row.node,
            axes=row.axes,
            candidate=row.candidate,
            operation=row.operation,
            state=StepState(row.state),
            run_id=row.run_id,
            artifact=picture_of(row),
            parents=tuple(parents[row.id]),
            deliveries=tuple(delivered[row.id]),
        )
        for row in rows
    ]
