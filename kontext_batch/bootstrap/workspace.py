"""A workspace: its folder, its database, and what becomes of both when it is moved."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory

from kontext_batch.errors import ObjectNotFound, SettingsError
from kontext_batch.lineage import migrate
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.ports import ModelRow, ObjectStore
from kontext_batch.registry import Registry
from kontext_batch.storage.keys import ObjectKeys

WORKSPACE = "kontext-out"
DATABASE = "kontext.db"


def make_folder(workspace: Path) -> None:
    """Raises `SettingsError`."""
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{workspace}: the workspace cannot be made ({error.strerror})") from error


def folder_aside() -> TemporaryDirectory[str]:
    try:
        return TemporaryDirectory(prefix="kontext-batch-")
    except OSError as error:
        raise SettingsError(f"no temporary folder can be made ({error.strerror})") from error


def repository_at(url: str, registry: Registry) -> SqlRepository:
    """The database at `url`, brought to this version's tables; it knows the models of the registry."""
    migrate.upgrade(url)
    repository = SqlRepository(url)
    rows = [ModelRow(name, entry.layout, entry.sha256, entry.licence) for name, entry in registry.models.items()]
    repository.remember_models(rows)
    return repository


def follow_move(repository: SqlRepository, store: ObjectStore, keys: ObjectKeys) -> None:
    """Where database and objects are the workspace's own and were moved or copied together, name the objects anew.

    Objects that lie elsewhere because `objects` was set when they were made are not here, and stay as they are named.
    """
    known = repository.artifact_elsewhere(keys.prefix)
    if known is None or not known.startswith("file:"):
        return
    old, *name = known.rsplit("/", 3)  # ab/cd/abcd....png
    with contextlib.suppress(ObjectNotFound):
        store.head(keys.prefix + "/".join(name))
        repository.follow_artifacts(f"{old}/", keys.prefix)
