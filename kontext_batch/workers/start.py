"""Start a Celery worker in this process; it ends when it is told to.

SIGTERM or Ctrl-C: no more rings are taken, the batch in flight is finished within the grace period. Once more: it is
given back at the next denoise step. The child does not see these signals, so they are passed on to it.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from typing import Any

from celery import signals

from kontext_batch.messaging.app import edits_queue, make_app, operations_queue
from kontext_batch.services.work import TURN_SECONDS
from kontext_batch.settings import Settings
from kontext_batch.workers.process import DUTIES, END_SIGNAL, Duties

TASKS = "kontext_batch.workers.tasks"


def serve_rings(settings: Settings, duties: Duties, *, tasks: str = TASKS) -> int:
    """Work at each ring until told to end; returns the exit code. `tasks`: the module that the child imports."""
    assert settings.broker_url is not None
    app = make_app(
        settings.broker_url,
        queue_prefix=settings.queue_prefix,
        tasks=tasks,
        task_seconds=TURN_SECONDS + settings.batch_seconds,
    )
    app.conf[DUTIES] = duties.as_data()
    queues = [edits_queue(settings.queue_prefix)] if duties.edits else []
    queues += [operations_queue(settings.queue_prefix)] if duties.operations else []
    worker = app.Worker(
        hostname=f"{duties.name}-{os.getpid()}@{socket.gethostname()}",
        queues=queues,
        pool="prefork",
        concurrency=1,
        loglevel="WARNING",
        without_mingle=True,
        without_gossip=True,
        quiet=True,
    )

    def pass_on(**_: Any) -> None:
        pool = getattr(worker, "pool", None)
        for pid in pool.info["processes"] if pool is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, END_SIGNAL)

    def ready(**_: Any) -> None:
        # Ctrl-C ends as SIGTERM does. Celery's own second Ctrl-C kills the child, and its leases would have to run out.
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGTERM))

    signals.worker_shutting_down.connect(pass_on, weak=False)
    signals.worker_ready.connect(ready, weak=False)
    worker.start()
    return int(worker.exitcode or 0)
