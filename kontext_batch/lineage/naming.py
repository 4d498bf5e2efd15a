"""What a hash, a place or a name means, found by indices alone where there is one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import among, by_indices
from kontext_batch.ports.tracing import Subject, SubjectKind, Weights

ARTIFACTS, OUTPUTS, UPLOADS = t.artifacts.c, t.step_outputs.c, t.uploads.c
SOURCES, MATERIALS, DELIVERIES, RUNS = t.step_sources.c, t.step_materials.c, t.deliveries.c, t.runs.c
MOST = 5
"""Hashes with one beginning that are told; more are not needed to say that it is not enough."""
SHA256_DIGITS = 64
AFTER_HEX = "g"
"""Sorts behind every hex digit."""
VERSIONED = re.compile(r"(.*)\.v[0-9]+(\.[^./]*)?")


def known_by_hash(conn: sa.Connection, prefix: str) -> list[Subject]:
    by_indices(conn)
    found: list[Subject] = []
    for look in (_pictures, _files, _photos, _weights, _recipes):
        known = {sha256 for subject in found for sha256 in subject.sha256s}
        found += [subject for subject in look(conn, prefix) if not known.issuperset(subject.sha256s)]
        if found and len(prefix) == SHA256_DIGITS:
            break  # nothing else has the same bytes
    return found


def weights_name(each: Weights) -> str:
    names = f" {', '.join(each.names)}" if each.names else ""
    return f"{each.kind}{names}, sha256 {each.sha256}"


def _begins(column: sa.ColumnElement[str], prefix: str) -> sa.ColumnElement[bool]:
    """The hex digits in `column` begin with `prefix`, by an index on it."""
    if len(prefix) == SHA256_DIGITS:
        return column == prefix
    return sa.and_(column >= prefix, column < prefix + AFTER_HEX)


def _next(column: sa.ColumnElement[str], prefix: str, last: Any) -> sa.Select[Any]:
    """The value after `last` that begins with `prefix`; one lower bound, for SQLite takes the wrong one of two."""
    return sa.select(sa.func.min(column)).where(column > last, column < prefix + AFTER_HEX)


def _distinct(conn: sa.Connection, column: sa.Column[str], first: str, *where: sa.ColumnElement[bool]) -> Iterator[str]:
    """Values from `first` on, from one to the next: the rows of each may be very many."""
    bound = column >= first
    while (value := conn.scalar(sa.select(sa.func.min(column)).where(bound, *where))) is not None:
        yield value
        bound = column > value


def _pictures(conn: sa.Connection, prefix: str) -> list[Subject]:
    rows = conn.execute(sa.select(ARTIFACTS.sha256, ARTIFACTS.uri).where(_begins(ARTIFACTS.sha256, prefix)).limit(MOST))
    artifacts = {row.sha256: row.uri for row in rows}
    makers: dict[str, list[int]] = defaultdict(list)
    made = sa.select(OUTPUTS.sha256, OUTPUTS.step_id).where(among(OUTPUTS.sha256, artifacts))
    for row in conn.execute(made.order_by(OUTPUTS.step_id)):
        makers[row.sha256].append(row.step_id)
    # Of a picture that was made anew since, the first one is known by its upload alone.
    others = {uri: sha256 for sha256, uri in artifacts.items() if sha256 not in makers}
    uploaded = sa.select(UPLOADS.uri, UPLOADS.step_id).where(among(UPLOADS.uri, others), UPLOADS.state != "intent")
    for row in conn.execute(uploaded.distinct()):
        makers[others[row.uri]].append(row.step_id)
    return [
        Subject(SubjectKind.STEP, f"picture with sha256 {sha256}", (sha256,), tuple(step_ids))
        for sha256, step_ids in makers.items()
    ]


def _files(conn: sa.Connection, prefix: str) -> list[Subject]:
    query = sa.select(DELIVERIES.file_sha256, DELIVERIES.step_id).where(
        DELIVERIES.file_sha256.is_not(None), _begins(DELIVERIES.file_sha256, prefix)
    )
    makers: dict[str, dict[int, None]] = defaultdict(dict)
    for row in conn.execute(query.order_by(DELIVERIES.file_sha256, DELIVERIES.id).limit(1000)):
        makers[row.file_sha256][row.step_id] = None
    return [
        Subject(SubjectKind.STEP, f"delivered file with sha256 {sha256}", (sha256,), tuple(step_ids))
        for sha256, step_ids in makers.items()
    ][:MOST]


def _photos(conn: sa.Connection, prefix: str) -> list[Subject]:
    found = list(islice(_distinct(conn, SOURCES.sha256, prefix, SOURCES.sha256 < prefix + AFTER_HEX), MOST))
    if not found:  # listed, and read by no step
        inputs = t.inputs.c
        query = sa.select(inputs.sha256).where(inputs.sha256 != "", _begins(inputs.sha256, prefix)).distinct()
        found = list(conn.scalars(query.limit(MOST)))
    return [Subject(SubjectKind.PHOTO, f"photo with sha256 {sha256}", (sha256,)) for sha256 in found]


def _weights(conn: sa.Connection, prefix: str) -> list[Subject]:
    return [Subject(SubjectKind.WEIGHTS, weights_name(each), (each.sha256,)) for each in weights(conn, prefix)]


def _recipes(conn: sa.Connection, prefix: str) -> list[Subject]:
    query = sa.select(RUNS.recipe_sha256, sa.func.max(RUNS.recipe)).where(_begins(RUNS.recipe_sha256, prefix))
    rows = conn.execute(query.group_by(RUNS.recipe_sha256).limit(MOST))
    return [Subject(SubjectKind.RECIPE, f"recipe {name}, revision {sha256}", (sha256,)) for sha256, name in rows]


def known_by_place(conn: sa.Connection, uri: str) -> list[Subject]:
    by_indices(conn)
    step_ids = conn.scalars(
        sa.select(OUTPUTS.step_id).join(t.artifacts, ARTIFACTS.sha256 == OUTPUTS.sha256).where(ARTIFACTS.uri == uri)
    ).all()
    if step_ids:
        return [Subject(SubjectKind.STEP, f"picture {uri}", step_ids=tuple(sorted(set(step_ids))))]
    delivered = _delivered(conn, uri)
    if delivered is not None:
        return [Subject(SubjectKind.STEP, f"delivered file {uri}", step_ids=(delivered,))]
    sha256s = tuple(photos(conn, uri))
    return [Subject(SubjectKind.PHOTO, f"photo {uri}", sha256s)] if sha256s else []


def photos(conn: sa.Connection, uri: str) -> list[str]:
    """sha256 of what was seen or read there at any time."""
    seen = conn.scalars(sa.select(t.inputs.c.sha256).where(t.inputs.c.uri == uri, t.inputs.c.sha256 != ""))
    return sorted({*seen, *_distinct(conn, SOURCES.sha256, "", SOURCES.uri == uri)})


def _delivered(conn: sa.Connection, uri: str) -> int | None:
    """The step whose picture was delivered to that place last, else is to be.

    By way of the runs, of which there are few, and the index over run and path.
    """
    versioned = VERSIONED.fullmatch(uri)
    paths = [uri, versioned[1] + (versioned[2] or "")] if versioned else [uri]
    rows = conn.execute(
        sa.select(DELIVERIES.step_id, DELIVERIES.path, DELIVERIES.delivered_path)
        .select_from(t.runs)
        .join(t.deliveries, sa.and_(DELIVERIES.run_id == RUNS.id, DELIVERIES.path.in_(paths)))
        .order_by(RUNS.id.desc())
    ).all()
    lies_there = [row.step_id for row in rows if row.delivered_path == uri]
    wanted = [row.step_id for row in rows if row.path == uri]
    return next(iter(lies_there or wanted), None)


def weights(conn: sa.Connection, prefix: str = "") -> list[Weights]:
    """Those whose sha256 begins with `prefix`, from one to the next: the rows of each are very many."""
    by_indices(conn)
    used = sa.select(sa.func.min(MATERIALS.sha256).label("sha256")).where(_begins(MATERIALS.sha256, prefix))
    walk = used.cte("used", recursive=True)
    following = _next(MATERIALS.sha256, prefix, walk.c.sha256).correlate(walk).scalar_subquery()
    walk = walk.union_all(sa.select(following).where(walk.c.sha256.is_not(None)))
    newest = sa.select(sa.func.max(MATERIALS.step_id)).where(MATERIALS.sha256 == walk.c.sha256)
    rows = conn.execute(
        sa.select(walk.c.sha256, newest.correlate(walk).scalar_subquery().label("step_id")).where(
            walk.c.sha256.is_not(None)
        )
    ).all()
    query = sa.select(t.step_params).where(among(t.step_params.c.step_id, {row.step_id for row in rows}))
    params = {row.step_id: row.params for row in conn.execute(query)}
    names: dict[str, set[str]] = defaultdict(set)
    for row in conn.execute(sa.select(t.models.c.sha256, t.models.c.name)):
        names[row.sha256].add(row.name)
    return [_used(row.sha256, params[row.step_id], names[row.sha256]) for row in rows]


def _used(sha256: str, params: Mapping[str, Any], names: set[str]) -> Weights:
    """`params`: of a step that was computed with them; `names`: in the registry."""
    adapters = [each["name"] for each in params.get("adapters") or () if each["sha256"] == sha256]
    is_model = params.get("model_sha256") == sha256
    called = names | ({params["model"]} if is_model and "model" in params else set()) | set(adapters)
    return Weights(sha256, "model" if is_model else "adapter", tuple(sorted(called)))
