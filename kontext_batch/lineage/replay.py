"""Steps with everything that they were computed from, and what became of its bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.provenance import ancestries
from kontext_batch.lineage.sql import among
from kontext_batch.planning.states import StepState
from kontext_batch.ports import Artifact, SourceInput, StoredOutput, StoredParent, StoredStep

STEPS, EDGES, SOURCES, RUN_STEPS = t.steps.c, t.edges.c, t.step_sources.c, t.run_steps.c


def stored_steps(conn: sa.Connection, ids: Sequence[int]) -> dict[int, StoredStep]:
    edges = conn.execute(
        sa.select(EDGES.child, EDGES.role, EDGES.position, EDGES.parent, STEPS.key, STEPS.state)
        .join(t.steps, STEPS.id == EDGES.parent)
        .where(among(EDGES.child, ids))
        .order_by(EDGES.child, EDGES.role, EDGES.position)
    ).all()
    outputs = _outputs(conn, sorted({*ids, *(edge.parent for edge in edges)}))
    parents: dict[int, list[StoredParent]] = defaultdict(list)
    for edge in edges:
        read = StoredParent(
            edge.role, edge.position, edge.parent, edge.key, StepState(edge.state), outputs.get(edge.parent, {})
        )
        parents[edge.child].append(read)
    sources: dict[int, list[SourceInput]] = defaultdict(list)
    query = sa.select(t.step_sources).where(among(SOURCES.step_id, ids))
    for row in conn.execute(query.order_by(SOURCES.step_id, SOURCES.role, SOURCES.position)):
        sources[row.step_id].append(SourceInput(row.role, row.position, row.uri, row.sha256))
    recipes: dict[int, list[str]] = defaultdict(list)
    wanted = sa.select(RUN_STEPS.step_id, t.runs.c.source).join(t.runs, t.runs.c.id == RUN_STEPS.run_id)
    for row in conn.execute(wanted.where(among(RUN_STEPS.step_id, ids)).distinct()):
        recipes[row.step_id].append(row.source)
    came_from = ancestries(conn, ids)
    rows = conn.execute(
        sa.select(t.steps, t.step_params.c.params)
        .join(t.step_params, t.step_params.c.step_id == STEPS.id)
        .where(among(STEPS.id, ids))
    )
    return {
        row.id: StoredStep(
            id=row.id,
            key=row.key,
            operation=row.operation,
            lane=row.lane,
            state=StepState(row.state),
            params=row.params,
            parents=tuple(parents[row.id]),
            sources=tuple(sources[row.id]),
            outputs=outputs.get(row.id, {}),
            recipes=tuple(sorted(recipes[row.id])),
            ancestry=came_from[row.id],
        )
        for row in rows
    }


def _outputs(conn: sa.Connection, ids: Sequence[int]) -> dict[int, dict[str, StoredOutput]]:
    outputs = t.step_outputs.c
    query = sa.select(outputs.step_id, outputs.slot, t.artifacts).join(
        t.artifacts, t.artifacts.c.sha256 == outputs.sha256
    )
    found: dict[int, dict[str, StoredOutput]] = defaultdict(dict)
    for row in conn.execute(query.where(among(outputs.step_id, ids))):
        artifact = Artifact(row.sha256, row.uri, row.media_type, row.bytes, row.width, row.height)
        found[row.step_id][row.slot] = StoredOutput(artifact, row.collected_at)
    return found
