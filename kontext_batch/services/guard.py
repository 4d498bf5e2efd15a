"""Where nothing may be delivered to, whatever a recipe or plan says: a picture must not replace its sources.

Places are compared as they really lie, for a symbolic link gives one file two names; and without regard to case, for
macOS gives it many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, unquote_to_bytes

from kontext_batch.errors import InfrastructureError, NotAllowed
from kontext_batch.planning import uris
from kontext_batch.planning.limits import sources
from kontext_batch.planning.plan import Plan
from kontext_batch.ports import Folder, ObjectStore

LONGEST_NAME = 255
"""Bytes of one segment of a path, on every common file system."""
SHOWN = 5


def delivery_faults(
    plan: Plan,
    store: ObjectStore,
    *,
    writable: Sequence[str],
    protected: Iterable[str],
    kept_prefixes: Sequence[str],
) -> tuple[str, ...]:
    """What stands against the paths of a plan's deliveries; empty when they are sound.

    `protected`: URIs that the plan was made from (recipe, imports, tables, pictures). `kept_prefixes`: beginnings of
    URIs that belong to the workspace itself.
    """
    places = _Places(store)
    kept = frozenset(uris.one_file(one) for uri in {*sources(plan), *protected} for one in places.all_of(uri))
    own = tuple({uris.one_file(one) for prefix in kept_prefixes for one in places.all_of(prefix)})
    faults: list[str] = []
    taken: dict[str, str] = {}
    for delivery in plan.deliveries:
        path = delivery.path
        segments = path.partition("://")[2].split("/")
        if "." in segments or ".." in segments:
            faults.append(f"{path}: '.' and '..' may not stand in a path")
            continue
        if not uris.allowed(path, writable):
            faults.append(f"{path} lies outside of what may be written ({', '.join(writable)})")
            continue
        folder, _, name = path.rpartition("/")
        found = places.target(folder + "/")
        really = path if isinstance(found, str) else found.uri + name
        place = uris.one_file(really)
        names = {place} if really == path else {place, uris.one_file(path)}
        if not names.isdisjoint(kept):
            faults.append(f"{path} is something that the recipe is made from: it would be overwritten")
        elif any(each.startswith(own) for each in names):
            faults.append(f"{path} belongs to the workspace: choose another name")
        elif len(max(map(_bytes, segments), key=len)) > LONGEST_NAME:
            faults.append(f"{path[:120]}...: a name has at most {LONGEST_NAME} bytes")
        elif isinstance(found, str):
            if found not in faults:  # of a folder once, not of each picture in it
                faults.append(found)
        elif unquote(name) in found.folders:
            faults.append(f"{path}: a folder is there already")
        elif place in taken and taken[place] != path:
            faults.append(f"{path} and {taken[place]} are one file on the disk")
        else:
            taken[place] = path
    if len(faults) > SHOWN:
        return (*faults[:SHOWN], f"and {len(faults) - SHOWN} more outputs whose place cannot be used")
    return tuple(faults)


@dataclass(frozen=True, slots=True)
class _Places:
    """Looks at each folder once: a plan has a hundred thousand pictures, in few folders."""

    store: ObjectStore
    _targets: dict[str, Folder | str] = field(default_factory=dict)
    _sources: dict[str, Folder | str] = field(default_factory=dict)

    def target(self, folder: str) -> Folder | str:
        """Where a folder to be written really lies, or what is wrong with it."""
        return self._look(self._targets, folder, write=True)

    def all_of(self, uri: str) -> set[str]:
        """The object's name, where it really lies, and where a link that it may be leads to."""
        folder, _, name = uri.rpartition("/")
        found = self._look(self._sources, folder + "/", write=False)
        if isinstance(found, str):  # it was read, or is not there: what is wrong is told elsewhere
            return {uri}
        real = {uri, found.uri + name}
        return real | {found.links[name]} if name in found.links else real

    def _look(self, known: dict[str, Folder | str], folder: str, *, write: bool) -> Folder | str:
        if folder not in known:
            try:
                known[folder] = self.store.folder(folder, write=write)
            except (NotAllowed, InfrastructureError) as error:
                known[folder] = str(error)
        return known[folder]


def _bytes(segment: str) -> bytes:
    return unquote_to_bytes(segment)
