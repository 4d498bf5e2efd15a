"""The one place that chooses adapters: S3 or a folder, SQLite or PostgreSQL, Celery or the loop in this process."""

from __future__ import annotations

from pathlib import Path

from kontext_batch.bootstrap.adapters import CommandFilter, inbox_places, prefix_uri, store_of, wake_ups_of
from kontext_batch.bootstrap.application import Application
from kontext_batch.bootstrap.models import model_entry, with_shipped
from kontext_batch.bootstrap.workspace import DATABASE, WORKSPACE, folder_aside, follow_move, make_folder, repository_at
from kontext_batch.errors import SettingsError
from kontext_batch.lineage import migrate
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.registry import Registry
from kontext_batch.settings import Settings
from kontext_batch.storage.keys import ObjectKeys
from kontext_batch.storage.uris import file_uri

__all__ = [
    "DATABASE",
    "WORKSPACE",
    "Application",
    "inbox_places",
    "make_folder",
    "model_entry",
    "open_application",
    "prefix_uri",
    "with_shipped",
]


def open_application(
    settings: Settings,
    *,
    workspace: Path,
    recipe_folder: Path | None = None,
    make: bool = True,
    may_migrate: bool = True,
) -> Application:
    """Open, or make, a workspace. Raises `SettingsError` when it cannot be used.

    `make`: False leaves a workspace that is not there unmade until `Application.settle`: a plan, or a recipe that is
    refused, leaves nothing behind.
    `may_migrate`: False only looks whether the database is at this version's tables: its user may not change them.
    `recipe_folder`: the folder that the recipe lies in; it may be read and delivered to, with all below it.
    """
    workspace = workspace.resolve()
    url = settings.database_url or f"sqlite:///{workspace / DATABASE}"
    aside = None
    if make:
        make_folder(workspace)
    elif workspace.exists() and not workspace.is_dir():
        raise SettingsError(f"{workspace}: a workspace is a folder")
    elif settings.database_url is None and not (workspace / DATABASE).is_file():
        aside = folder_aside()
    own = [file_uri(workspace)] if recipe_folder is None else [file_uri(workspace), file_uri(recipe_folder.resolve())]
    objects = prefix_uri(settings.objects) if settings.objects else file_uri(workspace)
    readable = (*own, *map(prefix_uri, settings.read_prefixes))
    writable = (*own, *map(prefix_uri, settings.write_prefixes))
    registry = with_shipped(Registry.read(settings.models_file), settings.models_file)
    if may_migrate:
        repository = repository_at(url if aside is None else f"sqlite:///{Path(aside.name) / DATABASE}", registry)
    else:
        migrate.check(url)
        repository = SqlRepository(url)
    keys = ObjectKeys(objects)
    places = inbox_places(settings)
    dropped = [place.prefix for place in places]
    store = store_of(
        settings,
        [*readable, objects, *(prefix for place in places for prefix in place.readable)],
        [*writable, objects, *dropped, *(prefix for place in places for prefix in place.writable)],
    )
    if settings.database_url is None and not settings.objects:
        follow_move(repository, store, keys)
    return Application(
        settings=settings,
        workspace=workspace,
        repository=repository,
        store=store,
        artifact_keys=keys,
        registry=registry,
        wake_ups=wake_ups_of(settings),
        content_filter=None if settings.content_filter is None else CommandFilter(settings.content_filter),
        readable=readable,
        writable=writable,
        places=places,
        database_url=url,
        aside=aside,
    )
