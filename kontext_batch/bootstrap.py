"""The one place that chooses adapters: S3 or a folder, SQLite or PostgreSQL, Celery or the loop in this process."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from kontext_batch import editor
from kontext_batch.errors import ObjectNotFound, SettingsError
from kontext_batch.lineage import migrate
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.observability.health import Pulse, Readiness
from kontext_batch.observability.server import Served, serve_metrics
from kontext_batch.operations.pictures import probe
from kontext_batch.operations.registry import PillowOperations
from kontext_batch.planning.events import Webhook
from kontext_batch.planning.inbox import Place
from kontext_batch.planning.listing import AdapterInfo, ModelInfo
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.ports import ContentFilter, ModelRow, ObjectEvents, ObjectStore, WakeUps, WorkerInfo
from kontext_batch.registry import SHIPPED, ModelEntry, Registry, shipped_folder, signature
from kontext_batch.services.bundles import BundleLimits
from kontext_batch.services.execute import Executor
from kontext_batch.services.inbox import Watcher
from kontext_batch.services.limits import Limits
from kontext_batch.services.look import Looker
from kontext_batch.services.notify import Notifier
from kontext_batch.services.prepare import Planner
from kontext_batch.services.turns import Turns
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings
from kontext_batch.storage.keys import ObjectKeys
from kontext_batch.storage.router import StoreRouter, open_store
from kontext_batch.storage.uris import file_path, file_uri
from kontext_batch.webhooks import HttpPost, Target

WORKSPACE = "kontext-out"
DATABASE = "kontext.db"


class NoWakeUps:
    """`ports.WakeUps` of the embedded default: the loop in this process looks by itself."""

    def wake(self, lanes: Mapping[str, int]) -> None:
        """Nobody to ring."""

    def close(self) -> None:
        """Nothing to give back."""


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
    store: StoreRouter
    artifact_keys: ObjectKeys
    registry: Registry
    wake_ups: WakeUps
    content_filter: ContentFilter | None
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    places: tuple[Place, ...]
    """The inboxes; `store` reads and writes them, and what their recipes may."""
    database_url: str
    """Of the workspace, whether it is there yet or not."""
    aside: TemporaryDirectory[str] | None = None
    admitted: set[str] = field(default_factory=set)
    """URIs of recipes whose folders the store may use besides those it was opened with."""

    def settle(self, looked_at: Iterable[str] = ()) -> None:
        """Make the workspace unless it is there: from here on there is something to keep.

        `looked_at`: URIs of the inputs that were read already and need not be read again. Raises `SettingsError`.
        """
        make_folder(self.workspace)
        if self.aside is None:
            return
        records = self.repository.inputs(looked_at)
        self._close_database()
        self.repository = _repository(self.database_url, self.registry)
        self.repository.remember_inputs(list(records.values()))

    def planner(self) -> Planner:
        """Plans recipes against this workspace."""
        return self._planner(self.store, self.readable, self.writable)

    def inbox_planner(self, place: Place, more: Sequence[str]) -> Planner:
        """Plans recipes that came by an inbox: they read what is allowed there, and `more`, and write what is."""
        readable = (*place.readable, *more)
        return self._planner(_store(self.settings, readable, place.writable), readable, place.writable)

    def watcher(self) -> Watcher:
        """Watches the inboxes of the settings."""
        settings = self.settings
        return Watcher(
            repository=self.repository,
            wake_ups=self.wake_ups,
            places=self.places,
            stores={
                place.prefix: open_store([place.prefix], [place.prefix])
                if place.prefix.startswith("file:")
                else self.store
                for place in self.places
            },
            objects=self.store,
            bundles=self.artifact_keys.bundles,
            limits=BundleLimits(max_bytes=settings.max_bundle_bytes, max_unpacked=settings.max_unpacked_bytes),
            settle_seconds=settings.inbox_settle_seconds,
            events=_events(settings),
        )

    def _planner(self, store: ObjectStore, readable: tuple[str, ...], writable: tuple[str, ...]) -> Planner:
        entries = self.registry.models
        return Planner(
            looker=Looker(
                store,
                self.repository,
                partial(probe, max_pixels=self.settings.max_pixels),
                self.settings.max_input_bytes,
                readable,
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
            writable=writable,
            kept_prefixes=(
                f"{file_uri(self.workspace / DATABASE)}",  # and -wal, -shm
                self.artifact_keys.prefix.rstrip("/"),
                self.artifact_keys.bundles.rstrip("/"),
            ),
            count_tokens=lambda model, prompt: editor.count_tokens(entries[model].path, prompt),
            numeric_mode=editor.numeric_mode(self.settings.device, self.settings.dtype),
            default_seconds=self.settings.gpu_seconds_per_image,
            max_instances=self.settings.max_steps,
        )

    def admit(self, sources: Iterable[str]) -> None:
        """Let the store use the folders that these recipes lie in, as it does for the recipe of a command."""
        new = {uri for uri in sources if uri.startswith("file:")} - self.admitted
        if new:
            folders = {Path(file_path(uri)).parent.resolve() for uri in new}
            self.store.allow_folders(sorted(map(file_uri, folders)))
            self.admitted |= new

    def worker(self, *, edits: bool = True, operations: bool = True, device: str | None = None) -> Worker:
        """A worker in this process, for steps of models, for those of Pillow, or for both.

        `device`: instead of the one of the settings.
        """
        process = psutil.Process()
        device = device or self.settings.device
        engine_editor = editor.EngineEditor(
            models={name: entry.path for name, entry in self.registry.models.items()},
            adapters={name: entry.path for name, entry in self.registry.adapters.items()},
            device=device,
            max_rows=self.settings.batch_rows,
            max_pixels=self.settings.max_pixels,
        )
        info = WorkerInfo(
            id=f"{socket.gethostname()}-{process.pid}-{uuid.uuid4().hex[:8]}",
            host=socket.gethostname(),
            pid=process.pid,
            process_started=process.create_time(),
            device=device,
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
            wake_ups=self.wake_ups,
            turns=Turns(
                lanes=partial(_serves, edits, operations),
                run_cap=self.settings.run_cap,
                owner_cap=self.settings.owner_cap,
            ),
            has_device=edits,
            admit=self.admit,
            content_filter=self.content_filter,
            keep_bytes=self.settings.cache_limit,
            limits=self.limits(),
        )

    def notifier(self) -> Notifier:
        """Sends events to the webhooks of the settings."""
        configured = self.settings.webhooks
        return Notifier(
            repository=self.repository,
            post=HttpPost({each.name: Target(each.url, each.secret_env, each.secret_file) for each in configured}),
            webhooks=[
                Webhook(each.name, frozenset(each.events), None if each.owners is None else frozenset(each.owners))
                for each in configured
            ],
        )

    def pulse(self) -> Pulse:
        """Of a process that works here."""
        return Pulse(self.settings.stalled_seconds)

    def readiness(self) -> Readiness:
        """Whether database, store and, where there is one, broker answer."""

        def store() -> None:
            self.store.folder(f"{self.artifact_keys.root}/", write=True)
            with contextlib.suppress(ObjectNotFound):
                self.store.head(self.artifact_keys("0" * 64, "image/png"))

        asked: dict[str, Callable[[], object]] = {
            "database": partial(migrate.check, self.database_url),
            "store": store,
        }
        if self.settings.broker_url is not None:
            from kontext_batch.messaging.app import check_broker

            asked["broker"] = partial(check_broker, self.settings.broker_url)
        return Readiness(asked)

    @contextlib.contextmanager
    def served(self, pulse: Pulse, *, port: int | None = None) -> Iterator[Served | None]:
        """Within, this process serves its metrics and health at `port`, else at the setting's, if there is one.

        Raises `SettingsError`.
        """
        chosen = self.settings.metrics_port if port is None else port
        if chosen is None:
            yield None
            return
        served = serve_metrics(host=self.settings.metrics_host, port=chosen, pulse=pulse, readiness=self.readiness())
        try:
            yield served
        finally:
            served.close()

    def limits(self) -> Limits:
        """Above which a run is paused."""
        return Limits(failures=self.settings.failure_limit, share=self.settings.failure_share)

    def close(self) -> None:
        """Give the connections to database and broker back."""
        self._close_database()
        self.wake_ups.close()

    def _close_database(self) -> None:
        self.repository.close()
        if self.aside is not None:
            self.aside.cleanup()
            self.aside = None


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
        aside = _folder_aside()
    folders = [] if recipe_folder is None else [recipe_folder]
    own = [file_uri(workspace), *(file_uri(folder.resolve()) for folder in folders)]
    objects = prefix_uri(settings.objects) if settings.objects else file_uri(workspace)
    readable = (*own, *map(prefix_uri, settings.read_prefixes))
    writable = (*own, *map(prefix_uri, settings.write_prefixes))
    registry = with_shipped(Registry.read(settings.models_file), settings.models_file)
    if may_migrate:
        repository = _repository(url if aside is None else f"sqlite:///{Path(aside.name) / DATABASE}", registry)
    else:
        migrate.check(url)
        repository = SqlRepository(url)
    keys = ObjectKeys(objects)
    places = inbox_places(settings)
    dropped = [place.prefix for place in places]
    store = _store(
        settings,
        [*readable, objects, *(prefix for place in places for prefix in place.readable)],
        [*writable, objects, *dropped, *(prefix for place in places for prefix in place.writable)],
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
        wake_ups=_wake_ups(settings),
        content_filter=CommandFilter(settings.content_filter) if settings.content_filter else None,
        readable=readable,
        writable=writable,
        places=places,
        database_url=url,
        aside=aside,
    )


def _store(settings: Settings, readable: Iterable[str], writable: Iterable[str]) -> StoreRouter:
    return open_store(readable, writable, s3_endpoint=settings.s3_endpoint, s3_region=settings.s3_region)


def _events(settings: Settings) -> ObjectEvents | None:
    if settings.inbox_queue is None:
        return None
    from kontext_batch.storage.events import SqsEvents  # here, as boto3 is in `open_store`

    return SqsEvents(settings.inbox_queue, region=settings.s3_region)


def inbox_places(settings: Settings) -> tuple[Place, ...]:
    """The inboxes of the settings. Raises `SettingsError` for one that could feed itself or another."""
    places = tuple(
        Place(
            prefix=_folder_uri(each.prefix),
            owner=each.owner,
            budget=each.budget.model_dump(exclude_none=True),
            readable=(_folder_uri(each.prefix), *map(prefix_uri, each.read)),
            writable=tuple(map(prefix_uri, each.write)),
        )
        for each in settings.inboxes
    )
    for number, place in enumerate(places):
        for other in places[:number]:
            if _overlap(place.prefix, other.prefix):
                raise SettingsError(f"inboxes: {place.prefix} and {other.prefix} lie in one another")
        for written in (uri for other in places for uri in other.writable):
            if _overlap(place.prefix, written):
                raise SettingsError(f"inboxes: recipes may not write where recipes are dropped ({written})")
    return places


def _folder_uri(prefix: str) -> str:
    """Spelt as a store lists what lies in it."""
    uri = prefix_uri(prefix)
    return (file_uri(file_path(uri)) if uri.startswith("file:") else uri).rstrip("/") + "/"


def _overlap(one: str, other: str) -> bool:
    one, other = one.rstrip("/") + "/", other.rstrip("/") + "/"
    return one.startswith(other) or other.startswith(one)


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


def _wake_ups(settings: Settings) -> WakeUps:
    if settings.broker_url is None:
        return NoWakeUps()
    # Here, because Celery takes a while to import, and most people have no broker.
    from kontext_batch.messaging.app import make_app
    from kontext_batch.messaging.wake_ups import CeleryWakeUps

    app = make_app(settings.broker_url, queue_prefix=settings.queue_prefix)
    return CeleryWakeUps(app, batch_rows=settings.batch_rows)


def _serves(edits: bool, operations: bool, lane: str) -> bool:
    return operations if lane == OPERATIONS_LANE else edits


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
