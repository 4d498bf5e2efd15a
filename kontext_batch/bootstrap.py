"""The one place that chooses adapters: S3 or a folder, SQLite or PostgreSQL, Celery or the loop in this process."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from kontext_batch import editor
from kontext_batch.errors import ObjectNotFound, SettingsError
from kontext_batch.lineage import migrate
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.operations.pictures import probe
from kontext_batch.operations.registry import PillowOperations
from kontext_batch.planning.listing import AdapterInfo, ModelInfo
from kontext_batch.ports import ContentFilter, ModelRow, ObjectStore, WakeUps, WorkerInfo
from kontext_batch.registry import SHIPPED, ModelEntry, Registry, shipped_folder, signature
from kontext_batch.services.execute import Executor
from kontext_batch.services.limits import Limits
from kontext_batch.services.look import Looker
from kontext_batch.services.prepare import Planner
from kontext_batch.services.turns import Turns
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings
from kontext_batch.storage.keys import ObjectKeys
from kontext_batch.storage.router import open_store
from kontext_batch.storage.uris import file_uri

WORKSPACE = "kontext-out"
DATABASE = "kontext.db"


class NoWakeUps:
    """`ports.WakeUps` of the embedded default: the loop in this process looks by itself."""

    def wake(self, lanes: Mapping[str, int]) -> None:
        """Nobody to ring."""


@dataclass(frozen=True, slots=True)
class CommandFilter:
    """`ports.ContentFilter` by a command that reads the image on standard input and exits 0 to allow it."""

    command: str
    timeout: float = 120.0
    """Seconds."""

    def allows(self, data: bytes) -> bool:
        """Raises `SettingsError` when the command cannot be run: nothing is delivered unseen."""
        try:
            done = subprocess.run(["sh", "-c", self.command], input=data, capture_output=True, timeout=self.timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SettingsError(f"content_filter: {error}") from error
        if done.returncode in (126, 127):
            raise SettingsError(f"content_filter: {done.stderr.decode(errors='replace').strip()}")
        return done.returncode == 0


@dataclass(slots=True)
class Application:
    """Everything that a command may need, put together for one workspace.

    Until `settle` makes a workspace that was not there, its database is an empty one that lies `aside`.
    """

    settings: Settings
    workspace: Path
    repository: SqlRepository
    store: ObjectStore
    artifact_keys: ObjectKeys
    registry: Registry
    wake_ups: WakeUps
    content_filter: ContentFilter | None
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    database_url: str
    """Of the workspace, whether it is there yet or not."""
    aside: TemporaryDirectory[str] | None = None

    def settle(self, looked_at: Iterable[str] = ()) -> None:
        """Make the workspace unless it is there: from here on there is something to keep.

        `looked_at`: URIs of the inputs that were read already and need not be read again. Raises `SettingsError`.
        """
        make_folder(self.workspace)
        if self.aside is None:
            return
        records = self.repository.inputs(looked_at)
        self.close()
        self.repository = _repository(self.database_url, self.registry)
        self.repository.remember_inputs(list(records.values()))

    def planner(self) -> Planner:
        """Plans recipes against this workspace."""
        entries = self.registry.models
        return Planner(
            looker=Looker(
                self.store,
                self.repository,
                partial(probe, max_pixels=self.settings.max_pixels),
                self.settings.max_input_bytes,
                self.readable,
            ),
            repository=self.repository,
            models={
                name: ModelInfo(name, entry.sha256, entry.native_area, entry.text_length, entry.licence)
                for name, entry in entries.items()
            },
            adapters={name: AdapterInfo(name, entry.sha256) for name, entry in self.registry.adapters.items()},
            filtered_models=frozenset(name for name, entry in entries.items() if entry.requires_filter),
            unlike={
                (kind, name): str(entry.path)
                for kind, known in (("model", entries), ("adapter", self.registry.adapters))
                for name, entry in known.items()
                if not entry.as_registered()
            },
            has_filter=self.content_filter is not None,
            writable=self.writable,
            kept_prefixes=(
                f"{file_uri(self.workspace / DATABASE)}",  # and -wal, -shm
                self.artifact_keys.prefix.rstrip("/"),
            ),
            count_tokens=lambda model, prompt: editor.count_tokens(entries[model].path, prompt),
            numeric_mode=editor.numeric_mode(self.settings.device, self.settings.dtype),
            default_seconds=self.settings.gpu_seconds_per_image,
            max_instances=self.settings.max_steps,
        )

    def worker(self) -> Worker:
        """A worker in this process."""
        process = psutil.Process()
        engine_editor = editor.EngineEditor(
            models={name: entry.path for name, entry in self.registry.models.items()},
            adapters={name: entry.path for name, entry in self.registry.adapters.items()},
            device=self.settings.device,
            max_rows=self.settings.batch_rows,
            max_pixels=self.settings.max_pixels,
        )
        info = WorkerInfo(
            id=f"{socket.gethostname()}-{process.pid}-{uuid.uuid4().hex[:8]}",
            host=socket.gethostname(),
            pid=process.pid,
            process_started=process.create_time(),
            device=self.settings.device,
            engine=engine_editor.describe(),
        )
        executor = Executor(
            worker_id=info.id,
            repository=self.repository,
            store=self.store,
            editor=engine_editor,
            operations=PillowOperations(max_pixels=self.settings.max_pixels),
            artifact_uri=self.artifact_keys,
            max_input_bytes=self.settings.max_input_bytes,
        )
        return Worker(
            info=info,
            repository=self.repository,
            store=self.store,
            executor=executor,
            lease_seconds=self.settings.lease_seconds,
            batch_rows=self.settings.batch_rows,
            content_filter=self.content_filter,
            keep_bytes=self.settings.cache_limit,
            turns=Turns(run_cap=self.settings.run_cap, owner_cap=self.settings.owner_cap),
            limits=self.limits(),
        )

    def limits(self) -> Limits:
        """Above which a run is paused."""
        return Limits(failures=self.settings.failure_limit, share=self.settings.failure_share)

    def close(self) -> None:
        """Give the database's connections back."""
        self.repository.close()
        if self.aside is not None:
            self.aside.cleanup()
            self.aside = None


def open_application(
    settings: Settings,
    *,
    workspace: Path,
    recipe_folder: Path | None = None,
    more_folders: Sequence[Path] = (),
    make: bool = True,
) -> Application:
    """Open, or make, a workspace. Raises `SettingsError` when it cannot be used.

    `make`: False leaves a workspace that is not there unmade until `Application.settle`: a plan, or a recipe that is
    refused, leaves nothing behind.
    `recipe_folder`: the folder that the recipe lies in; it may be read and delivered to, with all below it.
    `more_folders`: likewise, for a worker that serves the runs of several recipes.
    """
    workspace = workspace.resolve()
    url = settings.database_url or f"sqlite:///{workspace / DATABASE}"
    aside = None
    if make:
        make_folder(workspace)
    elif workspace.exists() and not workspace.is_dir():
        raise SettingsError(f"{workspace}: a workspace is a folder")
    elif settings.database_url is None and not (workspace / DATABASE).is_file():
        aside = _folder_aside()
    folders = [*([] if recipe_folder is None else [recipe_folder]), *more_folders]
    own = [file_uri(workspace), *(file_uri(folder.resolve()) for folder in folders)]
    objects = prefix_uri(settings.objects) if settings.objects else file_uri(workspace)
    readable = (*own, *map(prefix_uri, settings.read_prefixes))
    writable = (*own, *map(prefix_uri, settings.write_prefixes))
    registry = with_shipped(Registry.read(settings.models_file), settings.models_file)
    repository = _repository(url if aside is None else f"sqlite:///{Path(aside.name) / DATABASE}", registry)
    keys = ObjectKeys(objects)
    store = open_store(
        [*readable, objects],
        [*writable, objects],
        s3_endpoint=settings.s3_endpoint,
        s3_region=settings.s3_region,
    )
    if settings.database_url is None and not settings.objects:
        _follow_move(repository, store, keys)
    return Application(
        settings=settings,
        workspace=workspace,
        repository=repository,
        store=store,
        artifact_keys=keys,
        registry=registry,
        wake_ups=NoWakeUps(),
        content_filter=CommandFilter(settings.content_filter) if settings.content_filter else None,
        readable=readable,
        writable=writable,
        database_url=url,
        aside=aside,
    )


def _follow_move(repository: SqlRepository, store: ObjectStore, keys: ObjectKeys) -> None:
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


def make_folder(workspace: Path) -> None:
    """Raises `SettingsError`."""
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{workspace}: the workspace cannot be made ({error.strerror})") from error


def _folder_aside() -> TemporaryDirectory[str]:
    try:
        return TemporaryDirectory(prefix="kontext-batch-")
    except OSError as error:
        raise SettingsError(f"no temporary folder can be made ({error.strerror})") from error


def _repository(url: str, registry: Registry) -> SqlRepository:
    """The database at `url`, brought to this version's tables; it knows the models of the registry."""
    migrate.upgrade(url)
    repository = SqlRepository(url)
    rows = [ModelRow(name, entry.layout, entry.sha256, entry.licence) for name, entry in registry.models.items()]
    repository.remember_models(rows)
    return repository


def prefix_uri(prefix: str) -> str:
    """A prefix of the settings as a URI: a folder may be written as a path."""
    return prefix if "://" in prefix else file_uri(Path(prefix).expanduser().resolve())


def with_shipped(registry: Registry, file: Path) -> Registry:
    """The registry with the shipped model; its hash is kept in `file` until the model's files change."""
    folder = shipped_folder()
    if not (folder / "model_index.json").is_file():
        return registry
    known = registry.models.get(SHIPPED)
    if known is not None and known.path == folder and known.signature == signature(folder):
        return registry
    complete = registry.with_model(SHIPPED, model_entry(folder, licence="Apache-2.0"))
    with contextlib.suppress(SettingsError):  # a home folder that cannot be written to: hashed again next time
        complete.write(file)
    return complete


def model_entry(folder: Path, *, licence: str = "", requires_filter: bool = False) -> ModelEntry:
    """Check and hash the model at `folder`. Raises `SettingsError`."""
    facts = editor.read_model(folder)
    return ModelEntry(
        path=folder,
        sha256=facts.sha256,
        signature=signature(folder),
        layout=facts.layout,
        native_area=facts.native_area,
        text_length=facts.text_length,
        licence=licence,
        requires_filter=requires_filter,
    )
