"""The one process of a worker that computes: it opens the workspace once, and takes a turn at each ring.

It is a child of Celery's, freshly started (a CUDA context does not survive a fork), and reads the settings itself.
SIGUSR2 from its parent says: finish the batch in flight, and when it comes again: give it back.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import structlog
from celery import current_app, signals

from kontext_batch.bootstrap import open_application
from kontext_batch.errors import InfrastructureError, StorageFull, StorageReadOnly
from kontext_batch.observability import hide_password, set_up_logging
from kontext_batch.services.maintain import reconcile
from kontext_batch.services.work import Worker
from kontext_batch.settings import Settings, load_settings

log = structlog.get_logger(__name__)

DUTIES = "kontext_duties"
"""Name of the app's setting that brings a worker's duties to its child."""
RETRY_SECONDS = 1.0
FULL_SECONDS = 60.0
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
            for _ in range(self._ends):
                worker.end(self._settings.grace_seconds)
            worker.pulse, worker.on_drain = application.pulse(), _end_parent
            opened.enter_context(application.served(worker.pulse, port=self._duties.metrics_port))
            opened.enter_context(worker.registered())
            reconcile(worker.repository)  # what this worker's last child held is free at once
            self._opened, self._worker = opened.pop_all(), worker
        return worker

    def turn(self) -> None:
        """Work until nothing is ready. A fault of database or store is logged: what was held comes back."""
        try:
            self.open().turn()
        except (StorageFull, StorageReadOnly) as error:
            # The next ring would compute the same again, and have nowhere to put it.
            log.error("the store takes nothing; waiting", error=str(error), seconds=FULL_SECONDS)
            self._give_back()
            if self._worker is not None:
                self._worker.draining.wait(FULL_SECONDS)
        except InfrastructureError as error:
            log.error("turn broken off; the next ring tries again", error=str(error))
            self._give_back()

    def _give_back(self) -> None:
        """What the turn held, whatever time it takes: the heart of this process beats on, so no lease would run out."""
        given = False
        while not given and self._worker is not None:
            try:
                self._worker.give_back()
                given = True
            except InfrastructureError as error:
                log.warning("leases could not be given back yet", error=str(error))
                time.sleep(RETRY_SECONDS)

    def end(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Told to end; told again, more urgently."""
        self._ends += 1
        if self._worker is not None:
            self._worker.end(self._settings.grace_seconds)

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


@signals.worker_process_init.connect
def _start(**_: Any) -> None:
    global _process
    settings = load_settings()
    hide_password(settings.database_url)
    hide_password(settings.broker_url)
    set_up_logging(json=settings.log_format == "json", level=logging.getLevelNamesMapping()[settings.log_level.upper()])
    _process = WorkerProcess(settings, Duties(**current_app.conf[DUTIES]))
    signal.signal(END_SIGNAL, _process.end)
    try:
        _process.open()
    except InfrastructureError as error:
        log.error("not ready yet; the first ring tries again", error=str(error))


@signals.worker_process_shutdown.connect
def _end(**_: Any) -> None:
    if _process is not None:
        _process.close()
