"""A photo is forgotten: the database says what goes, and here its objects are deleted.

Each object's end is written down for itself, so that a process that is killed, or a store that does not answer, loses
nothing: the same command goes on, and so does each later collection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from kontext_batch.errors import InfrastructureError, NotAllowed, ObjectNotFound, StorageReadOnly
from kontext_batch.hashing import sha256_hex
from kontext_batch.planning.sidecars import sidecar_path
from kontext_batch.ports import ObjectStore, Repository, Tombstone
from kontext_batch.services.deliver import MAX_VERSIONS, place_of, versioned

log = structlog.get_logger(__name__)

NOT_THERE = "was not there any more; where it was moved, or copied, is not known here"
OTHER_BYTES = "another picture lies there by now: not deleted; the one that lay there may have been moved"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Photo:
    """What is to be forgotten."""

    sha256: str
    uri: str | None
    """Where it was given as lying."""
    others: tuple[str, ...] = ()
    """sha256 of what lay at that URI at other times."""


def which_photo(repository: Repository, store: ObjectStore, text: str, *, sha256: str | None, uri: str | None) -> Photo:
    """The photo that `text` means: a sha256, or a place; `sha256`: of what lies there, where it is a file of here.

    `uri`: of the place. Raises `ObjectNotFound` for what this workspace knows nothing of.
    """
    if sha256 is None and _SHA256.fullmatch(text):
        if not (repository.places(text) or repository.forgotten([text])):
            raise ObjectNotFound(f"{text}: no photo of that sha256 was seen here")
        return Photo(text, None)
    place = text if uri is None else uri
    known = repository.photos(place)
    if sha256 is None:
        try:
            sha256 = sha256_hex(store.read(place))
        except (ObjectNotFound, NotAllowed):
            if len(known) == 1:
                return Photo(known[0], place)
            if known:
                raise ObjectNotFound(
                    f"{text} is not there, and several photos lay there; name one by its sha256: {', '.join(known)}"
                ) from None
            raise ObjectNotFound(f"{text}: there is no such photo, and none was ever read from there") from None
    return Photo(sha256, place, tuple(each for each in known if each != sha256))


@dataclass(slots=True)
class Progress:
    """What became of tombstones that were looked at."""

    done: int = 0
    """Deleted, or decided otherwise; the rest is for later."""
    silent: str = ""
    """What a store that did not answer has said; empty when all have."""


def go_on(
    repository: Repository,
    store: ObjectStore,
    *,
    admit: Callable[[Iterable[str]], None] | None = None,
    most: int | None = None,
) -> Progress:
    """Delete what was taken down and is still there. A store that does not answer is left for the next time.

    `admit`: told of the recipes around which things are about to be deleted. `most`: objects that are looked at.
    """
    told = Progress()
    closed: set[str] = set()
    pending = repository.tombstones(pending=True, limit=most)
    if admit is not None:
        for photo in {each.source for each in pending if each.kind != "artifact"}:
            admit(repository.descent(photo).recipes)
    for stone in pending:
        if place_of(stone.uri) in closed:
            continue
        try:
            told.done += _end(repository, store, stone)
        except (NotAllowed, StorageReadOnly) as error:
            repository.settle_tombstone(stone.sha256, stone.uri, deleted=False, note=f"not deleted: {error}")
            told.done += 1
        except InfrastructureError as error:
            log.warning("takedown put off", uri=stone.uri, error=str(error))
            closed.add(place_of(stone.uri))
            told.silent = told.silent or str(error)
    if told.done:
        repository.withdraw()
    return told


def _end(repository: Repository, store: ObjectStore, stone: Tombstone) -> bool:
    """False when it has to wait."""
    if stone.kind == "artifact":
        return repository.bury_artifact(stone.sha256, stone.uri, store.delete)
    if stone.kind == "claim":
        if repository.is_claimed(stone.uri):
            return False
        for path in _versions(store, stone.uri):
            _delete_if_same(store, stone.sha256, path)
        repository.settle_tombstone(stone.sha256, stone.uri, deleted=True)
        return True
    found = _delete_if_same(store, stone.sha256, stone.uri)
    if found is None:
        if stone.kind == "file":
            store.delete(sidecar_path(stone.uri))
        repository.settle_tombstone(stone.sha256, stone.uri, deleted=True, note=NOT_THERE)
    elif found:
        repository.settle_tombstone(stone.sha256, stone.uri, deleted=True)
    else:
        repository.settle_tombstone(stone.sha256, stone.uri, deleted=False, note=OTHER_BYTES)
    return True


def _delete_if_same(store: ObjectStore, sha256: str, uri: str) -> bool | None:
    """Delete the file and its sidecar where it holds these bytes; False when it holds others, None when it is gone."""
    try:
        etag = store.head(uri).etag
        same = sha256_hex(store.read(uri)) == sha256 and store.head(uri).etag == etag
    except ObjectNotFound:
        return None
    if same:
        store.delete(sidecar_path(uri))
        store.delete(uri)
    return same


def _versions(store: ObjectStore, path: str) -> Iterable[str]:
    """The path, and its versions up to the first that is not there."""
    yield path
    for version in range(2, MAX_VERSIONS):
        try:
            store.head(versioned(path, version))
        except ObjectNotFound:
            return
        yield versioned(path, version)
