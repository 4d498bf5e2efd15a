"""Artifacts in rows: the columns that tell one, and the value that they are."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.ports import Artifact

ARTIFACTS, OUTPUTS = t.artifacts.c, t.step_outputs.c
ARTIFACT_ROW = (
    ARTIFACTS.sha256,
    ARTIFACTS.uri,
    ARTIFACTS.media_type,
    ARTIFACTS.bytes,
    ARTIFACTS.width,
    ARTIFACTS.height,
)


def artifact_of(row: sa.Row[Any]) -> Artifact:
    """Of a row with the columns `ARTIFACT_ROW`."""
    return Artifact(row.sha256, row.uri, row.media_type, row.bytes, row.width, row.height)


def picture_of(row: sa.Row[Any]) -> Artifact | None:
    """The same of a row of `with_picture`."""
    return None if row.sha256 is None else artifact_of(row)


def with_picture(query: sa.Select[Any]) -> sa.Select[Any]:
    """`query`, which is about `steps`, with the picture of each or none; one that was collected is still told."""
    return query.outerjoin(t.step_outputs, sa.and_(OUTPUTS.step_id == t.steps.c.id, OUTPUTS.slot == "image")).outerjoin(
        t.artifacts, ARTIFACTS.sha256 == OUTPUTS.sha256
    )
