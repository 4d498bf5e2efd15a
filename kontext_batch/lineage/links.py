"""From step to step: by an edge of the plan, or by bytes that one step made and a later run read as a photo.

A level of a chain is a query, not a recursive one: of several ways SQLite would take no index. Bytes are looked at once
for all that the edges lead to, for they mostly lead nowhere.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.sql import among

EDGES, SOURCES, OUTPUTS, DELIVERIES = t.edges.c, t.step_sources.c, t.step_outputs.c, t.deliveries.c
Link = tuple[int, int]
"""(parent, child)."""


def edges_above(conn: sa.Connection, step_ids: Iterable[int]) -> list[Link]:
    """From the parents of these steps in their plans."""
    rows = conn.execute(sa.select(EDGES.parent, EDGES.child).where(among(EDGES.child, step_ids)).distinct())
    return [(row.parent, row.child) for row in rows]


def edges_below(conn: sa.Connection, step_ids: Iterable[int]) -> list[Link]:
    """To those that read these steps in their plans."""
    rows = conn.execute(sa.select(EDGES.parent, EDGES.child).where(among(EDGES.parent, step_ids)).distinct())
    return [(row.parent, row.child) for row in rows]


def walk_down(conn: sa.Connection, step_ids: Sequence[int]) -> list[Link]:
    """Every link below these steps."""
    return _walk(conn, step_ids, edges_below, _read_elsewhere, end=1)


def walk_up(conn: sa.Connection, step_ids: Sequence[int]) -> list[Link]:
    """Every link above these steps."""
    return _walk(conn, step_ids, edges_above, _made_elsewhere, end=0)


def _walk(
    conn: sa.Connection,
    step_ids: Sequence[int],
    edges: Callable[[sa.Connection, Sequence[int]], Iterable[Link]],
    by_bytes: Callable[[sa.Connection, Sequence[int]], Iterable[Link]],
    *,
    end: int,
) -> list[Link]:
    """`end`: of a link, the step that is further on."""
    found: dict[Link, None] = {}
    seen: set[int] = set()
    new = set(step_ids)
    while new:
        fresh = set(new)
        while new:
            seen |= new
            links = list(edges(conn, sorted(new)))
            found.update(dict.fromkeys(links))
            new = {link[end] for link in links} - seen
            fresh |= new
        links = list(by_bytes(conn, sorted(fresh)))
        found.update(dict.fromkeys(links))
        new = {link[end] for link in links} - seen
    return list(found)


def makers(conn: sa.Connection, sha256s: Iterable[str]) -> list[tuple[str, int]]:
    """(content, step that made it) for pictures and delivered files."""
    wanted = sorted(sha256s)
    pictures = sa.select(OUTPUTS.sha256, OUTPUTS.step_id).where(among(OUTPUTS.sha256, wanted), OUTPUTS.slot == "image")
    files = sa.select(DELIVERIES.file_sha256, DELIVERIES.step_id).where(
        DELIVERIES.file_sha256.is_not(None), among(DELIVERIES.file_sha256, wanted)
    )
    return [(row[0], row[1]) for row in conn.execute(sa.union(pictures, files))] if wanted else []


def _read_elsewhere(conn: sa.Connection, step_ids: Sequence[int]) -> Iterator[Link]:
    """To the steps that read what these made, as a photo."""
    pictures = sa.select(OUTPUTS.sha256, OUTPUTS.step_id).where(
        among(OUTPUTS.step_id, step_ids), OUTPUTS.slot == "image"
    )
    files = sa.select(DELIVERIES.file_sha256, DELIVERIES.step_id).where(
        DELIVERIES.file_sha256.is_not(None), among(DELIVERIES.step_id, step_ids)
    )
    made: dict[str, set[int]] = defaultdict(set)
    for row in conn.execute(sa.union_all(pictures, files)):
        made[row[0]].add(row[1])
    for row in conn.execute(sa.select(SOURCES.sha256, SOURCES.step_id).where(among(SOURCES.sha256, sorted(made)))):
        yield from ((parent, row.step_id) for parent in sorted(made[row.sha256]))


def _made_elsewhere(conn: sa.Connection, step_ids: Sequence[int]) -> Iterator[Link]:
    """From the steps that made what these read as photos."""
    read: dict[str, set[int]] = defaultdict(set)
    for row in conn.execute(sa.select(SOURCES.sha256, SOURCES.step_id).where(among(SOURCES.step_id, step_ids))):
        read[row.sha256].add(row.step_id)
    for sha256, parent in makers(conn, read):
        yield from ((parent, child) for child in sorted(read[sha256]))
