"""Everything that a command or a worker may need, put together."""

from __future__ import annotations

import contextlib
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from PIL import Image

from kontext_batch import editor
from kontext_batch.bootstrap.adapters import events_of, signer_of, store_of
from kontext_batch.bootstrap.workspace import DATABASE, make_folder, repository_at
from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage import migrate
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.observability.health import Pulse, Readiness
from kontext_batch.observability.server import Served, serve_metrics
from kontext_batch.operations.compare import PixelJudge
from kontext_batch.operations.pictures import encode_png, probe
from kontext_batch.operations.previews import previews
from kontext_batch.operations.registry import PillowOperations
from kontext_batch.planning.events import Webhook
from kontext_batch.planning.inbox import Place
from kontext_batch.planning.listing import AdapterInfo, ModelInfo
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.ports import ContentFilter, ObjectStore, WakeUps, WorkerInfo
from kontext_batch.registry import Registry
from kontext_batch.report.write import ReportWriter
from kontext_batch.services.bundles import BundleLimits
from kontext_batch.services.deliver import Papers
from kontext_batch.services.execute import Executor
from kontext_batch.services.inbox import Reports, Watcher
from kontext_batch.services.limits import Limits
from kontext_batch.services.look import Looker
from kontext_batch.services.notify import Notifier
from kontext_batch.services.prepare import Planner
from kontext_batch.services.recorded import Weights
from kontext_batch.services.reproduce import Replayer
from kontext_batch.services.retention import Collector, Policy
from kontext_batch.services.turns import Turns
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings
from kontext_batch.storage.keys import ObjectKeys
from kontext_batch.storage.router import StoreRouter
from kontext_batch.storage.uris import file_path, file_uri
from kontext_batch.webhooks import HttpPost, Target


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
    """URIs of the folders of recipes that the store may use besides those it was opened with."""

    def settle(self, looked_at: Iterable[str] = ()) -> None:
        """Make the workspace unless it is there: from here on there is something to keep.

        `looked_at`: URIs of the inputs that were read already and need not be read again. Raises `SettingsError`.
        """
        make_folder(self.workspace)
        if self.aside is None:
            return
        records = self.repository.inputs(looked_at)
        self._close_database()
        self.repository = repository_at(self.database_url, self.registry)
        self.repository.remember_inputs(list(records.values()))

    def planner(self) -> Planner:
        """Plans recipes against this workspace."""
        return self._planner(self.store, self.readable, self.writable)

    def inbox_planner(self, place: Place, more: Sequence[str]) -> Planner:
        """Plans recipes that came by an inbox: they read what is allowed there, and `more`, and write what is."""
        readable = (*place.readable, *more)
        return self._planner(store_of(self.settings, readable, place.writable), readable, place.writable)

    def watcher(self, reports: Reports | None = None) -> Watcher:
        """Watches the inboxes of the settings."""
        settings = self.settings
        return Watcher(
            repository=self.repository,
            wake_ups=self.wake_ups,
            places=self.places,
            stores={
                place.prefix: store_of(settings, [place.prefix], [place.prefix])
                if place.prefix.startswith("file:")
                else self.store
                for place in self.places
            },
            objects=self.store,
            bundles=self.artifact_keys.bundles,
            limits=BundleLimits(max_bytes=settings.max_bundle_bytes, max_unpacked=settings.max_unpacked_bytes),
            settle_seconds=settings.inbox_settle_seconds,
            events=events_of(settings),
            reports=reports,
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
            numeric_mode=editor.numeric_mode(
                self.settings.device,
                self.settings.dtype,
                step_tolerance=self.settings.step_tolerance,
                context_every=self.settings.context_every,
                compiled=self.settings.compile,
            ),
            default_seconds=self.settings.gpu_seconds_per_image,
            max_instances=self.settings.max_steps,
        )

    def admit(self, sources: Iterable[str]) -> None:
        """Let the store use the folders that these recipes lie in, as it does for the recipe of a command."""
        folders = {uri.rpartition("/")[0] for uri in sources if uri.startswith("file:")}
        new = folders - self.admitted
        if new:
            self.store.allow_folders(sorted(file_uri(Path(file_path(uri)).resolve()) for uri in new))
            self.admitted |= new

    def worker(self, *, edits: bool = True, operations: bool = True, device: str | None = None) -> Worker:
        """A worker in this process, for steps of models, for those of Pillow, or for both.

        `device`: instead of the one of the settings. Raises `SettingsError` for a signer that cannot sign.
        """
        process = psutil.Process()
        device = device or self.settings.device
        engine_editor = self._editor(device, self.settings.batch_rows, self.settings.batch_invariant)
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
            mark=self.settings.mark,
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
            papers=self.papers() if operations else Papers(),
            policy=self.policy(),
            limits=self.limits(),
            backlog_limit=self.settings.backlog_limit,
        )

    def papers(self) -> Papers:
        """What delivered files come with. Raises `SettingsError` for a signer that cannot sign."""
        licences = {each.sha256: each.licence for each in self.registry.models.values()}
        licences |= {each.sha256: each.licence for each in self.registry.adapters.values()}
        return Papers(
            sidecars=self.settings.sidecars,
            signer=signer_of(self.settings),
            prompts=self.settings.prompts_in_files,
            licences={sha256: licence for sha256, licence in licences.items() if licence},
        )

    def _editor(self, device: str, rows: int, batch_invariant: bool) -> editor.EngineEditor:
        return editor.EngineEditor(
            models={name: entry.path for name, entry in self.registry.models.items()},
            adapters={name: entry.path for name, entry in self.registry.adapters.items()},
            device=device,
            max_rows=rows,
            max_pixels=self.settings.max_pixels,
            batch_invariant=batch_invariant,
            cuda_graphs=self.settings.cuda_graphs,
        )

    def replayer(self, tell: Callable[[str], None]) -> Replayer:
        """Computes steps again, on the device of the settings. `tell`: as of `Replayer`."""
        settings = self.settings
        loaded: list[editor.EngineEditor] = []

        def editor_for(rows: int, batch_invariant: bool) -> editor.EngineEditor:
            if not loaded or loaded[0].max_rows < rows:
                loaded[:] = [self._editor(settings.device, max(rows, settings.batch_rows), batch_invariant)]
            loaded[0].batch_invariant = batch_invariant
            return loaded[0]

        return Replayer(
            repository=self.repository,
            store=self.store,
            operations=PillowOperations(max_pixels=settings.max_pixels),
            judge=PixelJudge(max_pixels=settings.max_pixels),
            editor=editor_for,
            weights={
                (kind, name): Weights(entry.sha256, str(entry.path), entry.as_registered())
                for kind, known in (("model", self.registry.models), ("adapter", self.registry.adapters))
                for name, entry in known.items()
            },
            admit=self.admit,
            stand_in=encode_png(Image.new("RGB", (64, 64), "grey")),
            max_input_bytes=settings.max_input_bytes,
            tell=tell,
        )

    def report_writer(self) -> ReportWriter:
        """Writes reports of this workspace's runs."""
        return ReportWriter(
            self.repository,
            self.store,
            partial(previews, max_pixels=self.settings.max_pixels),
            self.settings.max_input_bytes,
        )

    def store_at(self, folder: str) -> ObjectStore:
        """A store for that one folder, which the person at the command has named. Raises `NotAllowed`."""
        return store_of(self.settings, (), [folder])

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

    def policy(self) -> Policy:
        """What of the artifacts may go."""
        return Policy(self.settings.cache_limit, self.settings.keep_intermediates_days)

    def collector(self) -> Collector:
        """A beat's collections."""
        return Collector(self.repository, self.store, self.settings.keep_intermediates_days, self.admit)

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


def _serves(edits: bool, operations: bool, lane: str) -> bool:
    return operations if lane == OPERATIONS_LANE else edits
