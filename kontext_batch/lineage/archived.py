"""A run leaves for an archive, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound, SettingsError
from kontext_batch.hashing import content_hash
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import among
from kontext_batch.planning.states import OPEN_RUNS

PAGE = 1000
RUNS, STEPS, RUN_STEPS, DELIVERIES = t.runs.c, t.steps.c, t.run_steps.c, t.deliveries.c
OUTPUTS, ATTEMPTS, ARTIFACTS, UPLOADS = t.step_outputs.c, t.attempts.c, t.artifacts.c, t.uploads.c
RUN_COLUMNS = (
    "recipe",
    "recipe_sha256",
    "recipe_text",
    "source",
    "owner",
    "trigger",
    "priority",
    "selection",
    "budget",
    "state",
    "created",
    "finished",
    "reason",
    "cached",
    "excused",
)
STEP_COLUMNS = ("operation", "lane", "state", "asked", "attempts", "losses", "lease_token", "error")
ATTEMPT_COLUMNS = (
    "token",
    "asked",
    "number",
    "worker_id",
    "batch_id",
    "started",
    "ended",
    "outcome",
    "error_class",
    "error",
    "timings",
)
INSTANCE_COLUMNS = ("ordinal", "node", "axes", "candidate", "take", "file", "line", "first", "cached")
DELIVERY_COLUMNS = (
    "ordinal",
    "path",
    "if_exists",
    "state",
    "sha256",
    "delivered_path",
    "version",
    "error",
    "delivered",
    "file_sha256",
    "withdrawn",
)
ARTIFACT_COLUMNS = ("sha256", "media_type", "bytes", "width", "height")
WORKER_COLUMNS = ("id", "host", "pid", "process_started", "device", "engine", "registered", "heartbeat", "drain")
BATCH_COLUMNS = ("worker_id", "lane", "device", "model_sha256", "numeric_mode", "libraries", "committed")


def page(conn: sa.Connection, run_id: int, section: str, after: int) -> list[dict[str, Any]]:
    """Rows of `section` behind number `after` of their order, at most `PAGE`; each has its `id` or `ordinal`."""
    return _PAGES[section](conn, run_id, after)


def _run(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    if after >= 0:
        return []
    row = conn.execute(sa.select(t.runs).where(RUNS.id == run_id)).first()
    if row is None:
        raise ObjectNotFound(f"there is no run {run_id}")
    if row.state in OPEN_RUNS:
        raise SettingsError(f"run {run_id} is {row.state}: a run is exported when it has ended")
    usage = sa.select(t.run_usage.c.worker_id, t.run_usage.c.gpu_seconds).where(t.run_usage.c.run_id == run_id)
    values = json_of(row, RUN_COLUMNS)
    origin = values["selection"].pop("imported", None) or {"run": run_id, "identity": identity_of(run_id, values)}
    used = [list(each) for each in conn.execute(usage.order_by(t.run_usage.c.worker_id))]
    return [{"id": 0, **values, "origin": origin, "usage": used}]


def identity_of(run_id: int, values: Mapping[str, Any]) -> str:
    """By which a run is known again wherever it goes."""
    named = {name: values[name] for name in ("recipe_sha256", "source", "owner", "created")}
    return content_hash({"run": run_id, **named})


def _steps(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    mine = sa.select(RUN_STEPS.step_id).where(RUN_STEPS.run_id == run_id, RUN_STEPS.first, RUN_STEPS.step_id > after)
    query = (
        sa.select(t.steps, t.step_params.c.params)
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
        .where(STEPS.id.in_(mine.order_by(RUN_STEPS.step_id).limit(PAGE)))
        .order_by(STEPS.id)
    )
    rows = {
        row.id: {
            "id": row.id,
            "key": row.key,
            **json_of(row, STEP_COLUMNS),
            "params": row.params,
            "sources": [],
            "parents": [],
            "outputs": {},
            "tries": [],
        }
        for row in conn.execute(query)
    }
    ids = sorted(rows)
    sources = sa.select(t.step_sources).where(among(t.step_sources.c.step_id, ids))
    for row in conn.execute(sources.order_by(t.step_sources.c.role, t.step_sources.c.position)):
        rows[row.step_id]["sources"].append(json_of(row, ("role", "position", "uri", "sha256")))
    edges = sa.select(t.edges).where(among(t.edges.c.child, ids)).order_by(t.edges.c.role, t.edges.c.position)
    for row in conn.execute(edges):
        rows[row.child]["parents"].append({"role": row.role, "position": row.position, "id": row.parent})
    for row in conn.execute(sa.select(t.step_outputs).where(among(OUTPUTS.step_id, ids)).order_by(OUTPUTS.slot)):
        rows[row.step_id]["outputs"][row.slot] = row.sha256
    tries = sa.select(t.attempts).where(among(ATTEMPTS.step_id, ids), ATTEMPTS.outcome.is_not(None))
    for row in conn.execute(tries.order_by(ATTEMPTS.step_id, ATTEMPTS.token)):
        rows[row.step_id]["tries"].append(json_of(row, ATTEMPT_COLUMNS))
    return list(rows.values())


def _instances(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    query = sa.select(t.run_steps).where(RUN_STEPS.run_id == run_id, RUN_STEPS.ordinal > after)
    rows = conn.execute(query.order_by(RUN_STEPS.ordinal).limit(PAGE))
    return [{"id": row.ordinal, "step": row.step_id, **json_of(row, INSTANCE_COLUMNS)} for row in rows]


def _deliveries(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    query = sa.select(t.deliveries).where(DELIVERIES.run_id == run_id, DELIVERIES.id > after)
    rows = conn.execute(query.order_by(DELIVERIES.id).limit(PAGE))
    return [{"id": row.id, "step": row.step_id, **json_of(row, DELIVERY_COLUMNS)} for row in rows]


def _artifacts(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    """All at once: there are few columns. `output`: of a step that delivers, or delivered."""
    if after >= 0:
        return []
    mine = sa.select(RUN_STEPS.step_id).where(RUN_STEPS.run_id == run_id)
    of_run = sa.select(DELIVERIES.step_id).where(DELIVERIES.run_id == run_id)
    made = sa.select(OUTPUTS.sha256).where(OUTPUTS.step_id.in_(mine))
    delivered = sa.select(DELIVERIES.sha256).where(DELIVERIES.run_id == run_id, DELIVERIES.sha256.is_not(None))
    outputs = sa.union(sa.select(OUTPUTS.sha256).where(OUTPUTS.step_id.in_(of_run)), delivered)
    is_output = set(conn.scalars(outputs))
    query = sa.select(t.artifacts).where(ARTIFACTS.sha256.in_(sa.union(made, delivered))).order_by(ARTIFACTS.sha256)
    return [
        {
            "id": number,
            **json_of(row, ARTIFACT_COLUMNS),
            "uri": row.uri,
            "kept": row.collected_at is None,
            "output": row.sha256 in is_output,
        }
        for number, row in enumerate(conn.execute(query))
    ]


def _batches(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    """Those that made its steps, with all members, who may be of other runs."""
    mine = sa.select(RUN_STEPS.step_id).where(RUN_STEPS.run_id == run_id)
    tried = sa.select(ATTEMPTS.batch_id).where(ATTEMPTS.step_id.in_(mine), ATTEMPTS.batch_id > after)
    query = sa.select(t.batches).where(t.batches.c.id.in_(tried)).order_by(t.batches.c.id).limit(PAGE)
    found = {row.id: {"id": row.id, **json_of(row, BATCH_COLUMNS), "members": []} for row in conn.execute(query)}
    members = t.batch_members.c
    in_it = sa.select(t.batch_members, STEPS.key).join(t.steps, STEPS.id == members.step_id)
    for row in conn.execute(in_it.where(among(members.batch_id, sorted(found))).order_by(members.place, STEPS.key)):
        found[row.batch_id]["members"].append(json_of(row, ("key", "joined", "left", "place")))
    return list(found.values())


def _workers(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    if after >= 0:
        return []
    mine = sa.select(RUN_STEPS.step_id).where(RUN_STEPS.run_id == run_id)
    tried = sa.select(ATTEMPTS.worker_id).where(ATTEMPTS.step_id.in_(mine))
    used = sa.select(t.run_usage.c.worker_id).where(t.run_usage.c.run_id == run_id)
    query = sa.select(t.workers).where(t.workers.c.id.in_(sa.union(tried, used))).order_by(t.workers.c.id)
    columns = tuple(name for name in WORKER_COLUMNS if name != "id")
    return [{"id": n, "worker": row.id, **json_of(row, columns)} for n, row in enumerate(conn.execute(query))]


def _models(conn: sa.Connection, run_id: int, after: int) -> list[dict[str, Any]]:
    if after >= 0:
        return []
    mine = sa.select(RUN_STEPS.step_id).where(RUN_STEPS.run_id == run_id)
    used = sa.select(t.step_materials.c.sha256).where(t.step_materials.c.step_id.in_(mine))
    query = sa.select(t.models).where(t.models.c.sha256.in_(used)).order_by(t.models.c.sha256, t.models.c.name)
    columns = ("sha256", "name", "layout", "licence")
    return [{"id": number, **json_of(row, columns)} for number, row in enumerate(conn.execute(query))]


_PAGES: Mapping[str, Callable[[sa.Connection, int, int], list[dict[str, Any]]]] = {
    "run": _run,
    "models": _models,
    "workers": _workers,
    "artifacts": _artifacts,
    "batches": _batches,
    "steps": _steps,
    "instances": _instances,
    "deliveries": _deliveries,
}


def json_of(row: sa.Row[Any], columns: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in columns}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}
