"""A run comes from an archive: merged by the keys of its steps.

What is here is never changed by an archive. Of a step that is here the archive's attempts, batches and outputs are not
taken; a step that reads one that is not done here comes as cancelled, as if it had been asked for and given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa

from kontext_batch.errors import BadArchive
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.archived import (
    ARTIFACT_COLUMNS,
    ARTIFACTS,
    ATTEMPT_COLUMNS,
    BATCH_COLUMNS,
    DELIVERIES,
    DELIVERY_COLUMNS,
    INSTANCE_COLUMNS,
    OUTPUTS,
    PAGE,
    RUN_COLUMNS,
    RUNS,
    STEP_COLUMNS,
    STEPS,
    UPLOADS,
    WORKER_COLUMNS,
    identity_of,
    json_of,
)
from kontext_batch.lineage.audit import note
from kontext_batch.lineage.deliveries import IMPORTED
from kontext_batch.lineage.engine import lock_graph
from kontext_batch.lineage.sql import AxesText, UtcTime, among, dialect_insert, now
from kontext_batch.lineage.submit import next_step_ids
from kontext_batch.lineage.takedown import forgotten
from kontext_batch.planning.params import materials
from kontext_batch.planning.states import LIVE, StepState
from kontext_batch.ports import Act, Imported, Row, Sections

NOT_DELIVERED = "it was not delivered before the run was exported; a run of its recipe here delivers it here"
UPLOAD_TOKEN = 0
"""Of what was put for an archive and not for a lease: those count from 1."""


@dataclass(slots=True)
class _Merge:
    """What is known of an archive's steps while they come."""

    ids: dict[int, int] = field(default_factory=dict)
    """Number there -> number here."""
    done: set[int] = field(default_factory=set)
    """Numbers here of those that are done."""
    lost: set[int] = field(default_factory=set)
    """Numbers there of those that are left out."""
    batches: dict[int, int] = field(default_factory=dict)
    new: int = 0
    known: int = 0
    differing: int = 0
    undone: int = 0


def import_run(conn: sa.Connection, sections: Sections, uri_of: Callable[[str, str], str]) -> Imported:
    lock_graph(conn, alone=True)
    [header] = sections("run")
    there = _known_run(conn, header)
    _insert_absent(conn, t.models, ("sha256", "name", "layout", "licence"), sections("models"))
    workers = ({**row, "id": row["worker"]} for row in sections("workers"))
    _insert_absent(conn, t.workers, WORKER_COLUMNS, workers, retired=now())
    artifacts = {row["sha256"]: row for row in sections("artifacts")}
    merged = _Merge()
    batches = {row["id"]: row for row in sections("batches")}
    steps = sections("steps")
    while rows := list(islice(steps, PAGE)):
        _merge_steps(conn, rows, merged, artifacts, batches, uri_of)
    run_id = there if there is not None else _insert_run(conn, header, sections, merged, artifacts, uri_of)
    return Imported(
        run_id=run_id,
        old_run=header["origin"]["run"],
        known=there is not None,
        new_steps=merged.new,
        known_steps=merged.known,
        differing=merged.differing,
        undone=merged.undone,
        forgotten=len(merged.lost),
    )


def import_and_note(conn: sa.Connection, sections: Sections, uri_of: Callable[[str, str], str], by: Act) -> Imported:
    """`import_run`, written down where it has changed something. Raises `BadArchive`."""
    try:
        done = import_run(conn, sections, uri_of)
    except (sa.exc.IntegrityError, sa.exc.DataError) as error:
        raise BadArchive(f"its rows contradict one another ({error.orig}); nothing was imported") from error
    if not done.known or done.new_steps:
        note(conn, by, f"run:{done.run_id}")
    return done


def _known_run(conn: sa.Connection, header: Row) -> int | None:
    """It was imported before, or is one of this database's own that comes home."""
    origin = header["origin"]
    for row in conn.execute(sa.select(RUNS.id, RUNS.selection).where(RUNS.trigger == IMPORTED)):
        if row.selection.get("imported", {}).get("identity") == origin["identity"]:
            return int(row.id)
    own = conn.execute(sa.select(t.runs).where(RUNS.id == origin["run"], RUNS.trigger != IMPORTED)).first()
    if own is not None and identity_of(own.id, json_of(own, RUN_COLUMNS)) == origin["identity"]:
        return int(own.id)
    return None


def _merge_steps(
    conn: sa.Connection,
    rows: Sequence[Row],
    merged: _Merge,
    artifacts: Mapping[str, Row],
    batches: Mapping[int, Row],
    uri_of: Callable[[str, str], str],
) -> None:
    gone = forgotten(conn, {source["sha256"] for row in rows for source in row["sources"]})
    for row in rows:  # parents come first
        read = {source["sha256"] for source in row["sources"]}
        if not read.isdisjoint(gone) or any(each["id"] in merged.lost for each in row["parents"]):
            merged.lost.add(row["id"])
    kept = [row for row in rows if row["id"] not in merged.lost]
    here = {
        row.key: row
        for row in conn.execute(
            sa.select(STEPS.id, STEPS.key, STEPS.state).where(among(STEPS.key, [row["key"] for row in kept]))
        )
    }
    new = [row for row in kept if row["key"] not in here]
    _count_known(conn, [(row, here[row["key"]]) for row in kept if row["key"] in here], merged)
    for row, number in zip(new, next_step_ids(conn, len(new)), strict=True):
        merged.ids[row["id"]] = number
    states = {row["id"]: _state(row, merged) for row in new}
    made = [row for row in new if states[row["id"]] is StepState.DONE]
    made_ids = {row["id"] for row in made}
    _insert_artifacts(conn, {sha for row in made for sha in row["outputs"].values()}, artifacts, uri_of)
    _insert(
        conn,
        t.steps,
        [
            {
                "id": merged.ids[row["id"]],
                "key": row["key"],
                **{name: row[name] for name in STEP_COLUMNS},
                "state": states[row["id"]],
                # What was made there was not made here: it is as if it had been asked for once more.
                "asked": row["asked"] + (row["state"] == StepState.DONE and row["id"] not in made_ids),
                "deps_left": 0,
            }
            for row in new
        ],
    )
    _insert_parts(conn, new, made, merged)
    _insert_tries(conn, new, merged, batches)


def _state(row: Row, merged: _Merge) -> StepState:
    state = StepState(row["state"])
    number = merged.ids[row["id"]]
    merged.new += 1
    if state is StepState.DONE and all(merged.ids[each["id"]] in merged.done for each in row["parents"]):
        merged.done.add(number)
        return state
    if state is StepState.DONE or state in LIVE:
        merged.undone += 1
        return StepState.CANCELLED
    return state


def _count_known(conn: sa.Connection, pairs: Sequence[tuple[Row, Any]], merged: _Merge) -> None:
    outputs: dict[int, dict[str, str]] = {}
    for output in conn.execute(sa.select(t.step_outputs).where(among(OUTPUTS.step_id, [step.id for _, step in pairs]))):
        outputs.setdefault(output.step_id, {})[output.slot] = output.sha256
    for row, step in pairs:
        merged.ids[row["id"]] = step.id
        merged.known += 1
        if step.state == StepState.DONE:
            merged.done.add(step.id)
            merged.differing += bool(row["outputs"]) and outputs.get(step.id) != row["outputs"]


def _insert_artifacts(
    conn: sa.Connection, shas: Iterable[str], artifacts: Mapping[str, Row], uri_of: Callable[[str, str], str]
) -> None:
    """Without their bytes, as yet."""
    rows = [
        {**artifacts[sha256], "uri": uri_of(sha256, artifacts[sha256]["media_type"])} for sha256 in sorted(set(shas))
    ]
    _insert_absent(conn, t.artifacts, (*ARTIFACT_COLUMNS, "uri"), rows, created=now(), collected_at=now())


def _insert_parts(conn: sa.Connection, new: Sequence[Row], made: Sequence[Row], merged: _Merge) -> None:
    ids = merged.ids
    _insert(conn, t.step_params, [{"step_id": ids[row["id"]], "params": row["params"]} for row in new])
    _insert(
        conn,
        t.step_materials,
        [
            {"sha256": sha256, "step_id": ids[row["id"]], "kind": kind}
            for row in new
            for sha256, kind in materials(row["params"]).items()
        ],
    )
    _insert(
        conn,
        t.step_sources,
        [{**source, "step_id": ids[row["id"]]} for row in new for source in row["sources"]],
    )
    _insert(
        conn,
        t.edges,
        [
            {"child": ids[row["id"]], "parent": ids[each["id"]], "role": each["role"], "position": each["position"]}
            for row in new
            for each in row["parents"]
        ],
    )
    _insert(
        conn,
        t.step_outputs,
        [
            {"step_id": ids[row["id"]], "slot": slot, "sha256": sha256}
            for row in made
            for slot, sha256 in row["outputs"].items()
        ],
    )


def _insert_tries(conn: sa.Connection, new: Sequence[Row], merged: _Merge, batches: Mapping[int, Row]) -> None:
    tries = [(row, each) for row in new for each in row["tries"]]
    for number in sorted(
        {each["batch_id"] for _, each in tries if each["batch_id"] is not None} - merged.batches.keys()
    ):
        values = _values(t.batches, {name: batches[number][name] for name in BATCH_COLUMNS})
        merged.batches[number] = int(
            conn.execute(sa.insert(t.batches).values(values).returning(t.batches.c.id)).scalar_one()
        )
    _insert(
        conn,
        t.attempts,
        [
            {
                **{name: each[name] for name in ATTEMPT_COLUMNS},
                "batch_id": None if each["batch_id"] is None else merged.batches[each["batch_id"]],
                "step_id": merged.ids[row["id"]],
            }
            for row, each in tries
        ],
    )


def _insert_run(
    conn: sa.Connection,
    header: Row,
    sections: Sections,
    merged: _Merge,
    artifacts: Mapping[str, Row],
    uri_of: Callable[[str, str], str],
) -> int:
    selection = {**header["selection"], "imported": {**header["origin"], "trigger": header["trigger"]}}
    values = {name: header[name] for name in RUN_COLUMNS}
    values |= {"trigger": IMPORTED, "selection": selection, "size": 0}
    run_id = int(conn.execute(sa.insert(t.runs).values(_values(t.runs, values)).returning(RUNS.id)).scalar_one())
    usage = [{"run_id": run_id, "worker_id": worker, "gpu_seconds": seconds} for worker, seconds in header["usage"]]
    _insert(conn, t.run_usage, usage)
    size = 0
    instances = (row for row in sections("instances") if row["step"] not in merged.lost)
    while rows := list(islice(instances, PAGE)):
        size += sum(bool(row["first"]) for row in rows)
        _insert(
            conn,
            t.run_steps,
            [
                {**{name: row[name] for name in INSTANCE_COLUMNS}, "run_id": run_id, "step_id": merged.ids[row["step"]]}
                for row in rows
            ],
        )
    conn.execute(sa.update(t.runs).where(RUNS.id == run_id).values(size=size))
    deliveries = (row for row in sections("deliveries") if row["step"] not in merged.lost)
    while rows := list(islice(deliveries, PAGE)):
        named = {row["sha256"] for row in rows if row["sha256"] in artifacts}
        _insert_artifacts(conn, named, artifacts, uri_of)
        _insert(conn, t.deliveries, [_delivery(row, run_id, merged) for row in rows])
    _insert_members(conn, sections, merged)
    return run_id


def _delivery(row: Row, run_id: int, merged: _Merge) -> dict[str, Any]:
    step_id = merged.ids[row["step"]]
    values = {**{name: row[name] for name in DELIVERY_COLUMNS}, "run_id": run_id, "step_id": step_id}
    if values["state"] in ("waiting", "pending"):  # nothing is written to a place that an archive names
        values |= {"state": "failed", "error": values["error"] or NOT_DELIVERED}
    return values


def _insert_members(conn: sa.Connection, sections: Sections, merged: _Merge) -> None:
    """Of steps that are here: mates of other runs stayed where they were."""
    for row in sections("batches"):
        if row["id"] in merged.batches:
            keys = [each["key"] for each in row["members"]]
            here = {each.key: each.id for each in conn.execute(
                sa.select(STEPS.key, STEPS.id).where(among(STEPS.key, keys))
            )}  # fmt: skip
            _insert(
                conn,
                t.batch_members,
                [
                    {
                        "batch_id": merged.batches[row["id"]],
                        "step_id": here[each["key"]],
                        **{name: each[name] for name in ("joined", "left", "place")},
                    }
                    for each in row["members"]
                    if each["key"] in here
                ],
            )


def _insert(conn: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        conn.execute(sa.insert(table), [_values(table, row) for row in rows])


def _insert_absent(
    conn: sa.Connection, table: sa.Table, columns: Sequence[str], rows: Iterable[Row], **values: Any
) -> None:
    """What is there stays."""
    listed = [_values(table, {name: row[name] for name in columns}) for row in rows]
    if listed:
        insert = dialect_insert(conn, table)
        statement = insert.values(**values) if values else insert
        conn.execute(statement.on_conflict_do_nothing(), listed)


def _values(table: sa.Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """As the driver wants them. Raises `BadArchive` for what the column is not made for: SQLite would take anything."""
    values = {}
    for name, value in row.items():
        try:
            values[name] = _value(table.c[name], value)
        except (TypeError, ValueError) as error:
            raise BadArchive(f"{value!r:.80} is no `{name}` of {table.name}; nothing was imported") from error
    return values


def _value(column: sa.Column[Any], value: Any) -> Any:
    """Raises `TypeError` or `ValueError`."""
    if value is None and column.nullable:
        return None
    match column.type:
        case UtcTime():
            return datetime.fromisoformat(value)
        case AxesText():
            return tuple((_of(str, axis), _of(str, key)) for axis, key in value)
        case sa.JSON():
            return _of(dict, value)
        case sa.Boolean():
            return _of(bool, value)
        case sa.Integer():
            bits = 63 if isinstance(column.type, sa.BigInteger) else 31
            if not -(1 << bits) <= _of(int, value) < 1 << bits:
                raise ValueError
            return value
        case sa.Float():
            return float(value if isinstance(value, int) else _of(float, value))
    return _of(str, value)


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return value


# ----------------------------------------------------------------------------------------------------------- bytes


def missing_artifacts(conn: sa.Connection, sha256s: Iterator[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    while chunk := list(islice(sha256s, PAGE)):
        gone = forgotten(conn, chunk)
        rows = conn.execute(
            sa.select(ARTIFACTS.sha256, ARTIFACTS.uri).where(
                among(ARTIFACTS.sha256, chunk), ARTIFACTS.collected_at.is_not(None)
            )
        )
        found |= {row.sha256: row.uri for row in rows if row.sha256 not in gone}
    return found


def announce_artifact(conn: sa.Connection, sha256: str) -> None:
    lock_graph(conn, alone=True)
    uri = conn.scalar(sa.select(ARTIFACTS.uri).where(ARTIFACTS.sha256 == sha256))
    mine = UPLOADS.uri == uri, UPLOADS.token == UPLOAD_TOKEN
    if conn.execute(sa.update(t.uploads).where(*mine).values(state="orphaned")).rowcount:
        return
    made = sa.select(OUTPUTS.step_id).where(OUTPUTS.sha256 == sha256)
    brought = sa.select(DELIVERIES.step_id).where(DELIVERIES.sha256 == sha256)
    step_id = conn.scalar(made.limit(1)) or conn.scalar(brought.limit(1))
    if step_id is not None:
        row = {"uri": uri, "step_id": step_id, "token": UPLOAD_TOKEN, "state": "orphaned"}
        conn.execute(sa.insert(t.uploads).values(**row, created=now()))


def restore_artifact(conn: sa.Connection, sha256: str, put: Callable[[str], None]) -> bool:
    lock_graph(conn, alone=True)
    if forgotten(conn, [sha256]):
        return False
    kept = sa.update(t.artifacts).where(ARTIFACTS.sha256 == sha256, ARTIFACTS.collected_at.is_not(None))
    uri = conn.scalar(kept.values(collected_at=None).returning(ARTIFACTS.uri))
    if uri is None:
        return False
    put(uri)
    mine = UPLOADS.uri == uri, UPLOADS.token == UPLOAD_TOKEN
    conn.execute(sa.update(t.uploads).where(*mine).values(state="committed"))
    return True
