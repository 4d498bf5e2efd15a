"""The one process of a worker that computes: it opens the workspace once, and takes a turn at each ring.

It is a child of Celery's, freshly started (a CUDA context does not survive a fork), and reads the settings itself.
SIGUSR2 from its parent says: finish the batch in flight, and when it comes again: give it back.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
from celery import current_app, signals

from kontext_batch.bootstrap import open_application
from kontext_batch.errors import InfrastructureError, SettingsError
from kontext_batch.observability import hide_password, level_number, set_up_logging
from kontext_batch.services.maintain import reconcile
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings, load_settings

log = structlog.get_logger(__name__)

DUTIES = "kontext_duties"
"""Name of the app's setting that brings a worker's duties to its child."""
END_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True, slots=True)
class Duties:
    """What a worker was started for."""

    workspace: str
    device: str | None
    edits: bool
    operations: bool
    metrics_port: int | None = None

    @property
    def name(self) -> str:
        """First part of the name by which Celery and Flower know the worker."""
        return self.device or ("any" if self.edits else "operations")

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


class WorkerProcess:
    """Opened lazily and again after a fault: a database that is not there yet is no reason to end."""

    def __init__(self, settings: Settings, duties: Duties) -> None:
        self._settings, self._duties = settings, duties
        self._opened = ExitStack()
        self._worker: Worker | None = None
        self._beginning: Worker | None = None
        """The worker from the moment that it can be told to end."""
        self._ends = 0

    def open(self) -> Worker:
        """The worker, known to the others. Raises `InfrastructureError`, `SettingsError`."""
        if self._worker is not None:
            return self._worker
        with ExitStack() as opened:
            application = open_application(self._settings, workspace=Path(self._duties.workspace), may_migrate=False)
            opened.callback(application.close)
            worker = application.worker(
                edits=self._duties.edits, operations=self._duties.operations, device=self._duties.device
            )
            self._beginning = worker
            for _ in range(self._ends):
                worker.end(self._settings.grace_seconds)
            worker.pulse, worker.on_drain = application.pulse(), _end_parent
            try:
                opened.enter_context(application.served(worker.pulse, port=self._duties.metrics_port))
            except SettingsError as error:  # another worker of this host has the port: no reason not to work
                log.error("metrics and health are not served", error=str(error))
            opened.enter_context(worker.registered())
            reconcile(worker.repository)  # what this worker's last child held is free at once; the beat does the rest
            self._opened, self._worker = opened.pop_all(), worker
        return worker

    def turn(self) -> None:
        """Work until nothing is ready, through outages of database and store.

        Anything else ends this process: a device that has failed once fails for ever in it. Celery starts another, and
        what was held counts as lost, so that a step that does this each time is quarantined.
        """
        try:
            worker = self.open()
        except (InfrastructureError, SettingsError) as error:
            log.error("not ready yet; the next ring tries again", error=str(error))
            return
        try:
            worker.turn_through_outages()
        except Exception:
            log.exception("this process ends, another is started")
            sys.stderr.flush()
            os._exit(1)

    def end(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Told to end; told again, more urgently."""
        self._ends += 1
        if self._beginning is not None:
            self._beginning.end(self._settings.grace_seconds)

    def close(self) -> None:
        """Say goodbye, and give back what is held."""
        self._worker = None
        try:
            self._opened.close()
        except InfrastructureError as error:
            log.warning("could not say goodbye; the leases run out", error=str(error))


def _end_parent() -> None:
    """Told by `workers drain`: as a SIGTERM from whoever started the worker."""
    os.kill(os.getppid(), signal.SIGTERM)


_process: WorkerProcess | None = None


def this_process() -> WorkerProcess:
    assert _process is not None, "Celery has started this process"
    return _process


@signals.setup_logging.connect
def _keep_logging(**_: Any) -> None:
    """That somebody listens keeps Celery from setting up logging of its own: each line would come twice."""


@signals.worker_process_init.connect
def _start(**_: Any) -> None:
    global _process
    settings = load_settings()
    hide_password(settings.database_url, settings.broker_url)
    set_up_logging(json=settings.log_format == "json", level=level_number(settings.log_level))
    _process = WorkerProcess(settings, Duties(**current_app.conf[DUTIES]))
    signal.signal(END_SIGNAL, _process.end)
    try:
        _process.open()
    except (InfrastructureError, SettingsError) as error:  # such as a database that is not upgraded yet
        log.error("not ready yet; the next ring tries again", error=str(error))


@signals.worker_process_shutdown.connect
def _end(**_: Any) -> None:
    if _process is not None:
        _process.close()
