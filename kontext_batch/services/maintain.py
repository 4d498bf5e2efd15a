"""What keeps a workspace sound: leases of processes that are gone, and a store that holds what the database names."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil
import structlog

from kontext_batch.errors import NotAllowed, ObjectNotFound
from kontext_batch.observability import metrics
from kontext_batch.ports import ObjectStore, ReconcileReport, Repository, WorkerInfo

log = structlog.get_logger(__name__)

MAX_LOSSES = 3
"""A step that lost this many workers is quarantined."""
START_TOLERANCE = 2.0
"""Seconds by which two readings of a process's start time may differ."""


def gone_workers(workers: Iterable[WorkerInfo], *, host: str | None = None) -> list[str]:
    """Ids of workers of this host whose process is not there any more; other hosts are left to their leases."""
    here = host or socket.gethostname()
    return [worker.id for worker in workers if worker.host == here and not _alive(worker)]


def _alive(worker: WorkerInfo) -> bool:
    try:
        started = psutil.Process(worker.pid).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True  # it is there, but not ours to look at
    return abs(started - worker.process_started) < START_TOLERANCE  # else the pid was given out again


def reconcile(repository: Repository) -> ReconcileReport:
    """Return what lost workers held: at once for processes of this host, else when their leases run out."""
    report = repository.reconcile(gone_workers=gone_workers(repository.workers()), max_losses=MAX_LOSSES)
    if lost := report.returned + report.quarantined:
        metrics.LEASES_LOST.inc(lost)
        metrics.QUARANTINED.inc(report.quarantined)
        tell = log.warning if report.quarantined else log.info
        tell("leases of lost workers came back", returned=report.returned, quarantined=report.quarantined)
    return report


def compare_store(repository: Repository, store: ObjectStore, prefix: str) -> tuple[list[str], list[str]]:
    """URIs that the database names and the store lacks, and those below `prefix` of which the database knows nothing.

    Listed before the database is asked: what is put meanwhile counts as known. What is unknown may be an upload that
    is under way, or one that a restored database has forgotten.
    """
    there = {info.uri for info in store.list(prefix)}
    named = set(repository.artifact_uris())
    missing = []
    for uri in sorted(named - there):
        try:  # put since the listing, or kept elsewhere, where `objects` was before
            store.head(uri)
        except (NotAllowed, ObjectNotFound):
            missing.append(uri)
    return missing, sorted(there - named)
