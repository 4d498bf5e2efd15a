"""Where nothing may be delivered to, whatever a recipe or plan says: a picture must not replace its sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import unquote_to_bytes

from kontext_batch.planning import uris
from kontext_batch.planning.plan import Plan

LONGEST_NAME = 255
"""Bytes of one segment of a path, on every common file system."""
SHOWN = 5


def delivery_faults(
    plan: Plan, *, writable: Sequence[str], protected: Iterable[str], kept_prefixes: Sequence[str]
) -> tuple[str, ...]:
    """What stands against the paths of a plan's deliveries; empty when they are sound.

    `protected`: URIs that the plan was made from (recipe, imports, tables, pictures). `kept_prefixes`: beginnings of
    URIs that belong to the workspace itself.
    """
    read = {each.source.uri for step in plan.steps for each in step.inputs if each.source is not None}
    kept = frozenset(map(uris.one_file, read.union(protected)))
    faults: list[str] = []
    for delivery in plan.deliveries:
        path = delivery.path
        segments = path.partition("://")[2].split("/")
        if "." in segments or ".." in segments:
            faults.append(f"{path}: '.' and '..' may not stand in a path")
        elif not uris.allowed(path, writable):
            faults.append(f"{path} lies outside of what may be written ({', '.join(writable)})")
        elif uris.one_file(path) in kept:
            faults.append(f"{path} is something that the recipe is made from: it would be overwritten")
        elif any(path.startswith(prefix) for prefix in kept_prefixes):
            faults.append(f"{path} belongs to the workspace: choose another name")
        elif len(max(map(_bytes, segments), key=len)) > LONGEST_NAME:
            faults.append(f"{path[:120]}...: a name has at most {LONGEST_NAME} bytes")
    if len(faults) > SHOWN:
        return (*faults[:SHOWN], f"and {len(faults) - SHOWN} more outputs whose place cannot be used")
    return tuple(faults)


def _bytes(segment: str) -> bytes:
    return unquote_to_bytes(segment)
