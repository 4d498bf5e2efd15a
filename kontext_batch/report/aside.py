"""Write reports in a thread of their own, one at a time, while whoever asks goes on."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import structlog

from kontext_batch.errors import InfrastructureError
from kontext_batch.ports import ObjectStore
from kontext_batch.report.write import ReportWriter, Stopped, Written

log = structlog.get_logger(__name__)


class ReportsAside:
    """Implements `services.inbox.Reports`. What is begun when it is closed is gone on with by whoever is asked next."""

    def __init__(self, writer: ReportWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reports")
        self._stopping = threading.Event()
        self._begun: dict[int, Future[Written]] = {}

    def __enter__(self) -> ReportsAside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends after the pictures in hand."""
        self._stopping.set()
        self._pool.shutdown()

    def written(self, run_id: int, folder: str, into: ObjectStore) -> bool | None:
        future = self._begun.get(run_id)
        if future is None:
            if all(each.done() for each in self._begun.values()):
                self._begun[run_id] = self._pool.submit(
                    self._writer.write, run_id, folder, into, stopped=self._stopping.is_set
                )
            return None
        if not future.done():
            return None
        del self._begun[run_id]
        try:
            future.result()
        except (InfrastructureError, Stopped) as error:
            log.warning("a report could not be written; tried again", run=run_id, folder=folder, error=str(error))
            return None
        except Exception:  # a fault of it, or of this program: the run counts
            log.exception("a report cannot be written", run=run_id, folder=folder)
            return False
        return True
