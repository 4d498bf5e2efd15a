"""Bring finished images to the paths that the recipe wants.

A delivery may be done twice (a worker dies between the write and the record): every policy is such that the second
time changes nothing. Identical bytes never make a new version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import structlog

from kontext_batch.errors import InfrastructureError, KontextBatchError, NotAllowed, ObjectNotFound, StorageReadOnly
from kontext_batch.hashing import sha256_hex
from kontext_batch.observability import metrics
from kontext_batch.ports import ContentFilter, ObjectStore, PendingDelivery, Repository, SettledDelivery
from kontext_batch.services.artifacts import read_artifact

log = structlog.get_logger(__name__)

MAX_VERSIONS = 10_000
AT_ONCE = 16
"""Deliveries that a worker claims together."""
CLAIM_SECONDS = 300.0
"""How long they are its own: another brings what a host that died had claimed. Twice changes nothing."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a delivery ended."""

    path: str
    version: int
    """1 for the path itself, n for `name.vN.ext`."""
    skipped: str | None = None
    """Why it was left out; None when it was not."""


def versioned(path: str, version: int) -> str:
    """`a/b.jpg` as version 3 is `a/b.v3.jpg`; version 1 is the path itself."""
    if version == 1:
        return path
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.rpartition(".")
    return f"{folder}{slash}{stem}.v{version}{dot}{extension}" if dot else f"{path}.v{version}"


def deliver_pending(
    repository: Repository,
    store: ObjectStore,
    *,
    worker_id: str,
    run_id: int | None = None,
    content_filter: ContentFilter | None = None,
    admit: Callable[[Iterable[str]], None] | None = None,
    patient: bool = False,
    on_delivery: Callable[[], None] = lambda: None,
) -> int:
    """Deliver what is finished and claimed by nobody else, up to `AT_ONCE` images; returns how many are settled.

    A delivery that cannot be made, or that the content filter does not allow, is recorded as failed. Raises
    `InfrastructureError` (a full disk, a store that does not answer) with the rest still pending.
    `patient`: nothing is raised; what a place does not take now is tried again later, and the others' goes on.
    `admit`: told of the recipes of what is claimed, whose places are about to be used.
    `on_delivery` is called before each.
    """
    claimed = repository.claim_deliveries(worker_id, limit=AT_ONCE, seconds=CLAIM_SECONDS, run_id=run_id)
    if not claimed:
        return 0
    if admit is not None:
        admit({each.source for each in claimed})
    settled: list[SettledDelivery] = []
    silent: set[str] = set()
    """Places that did not answer: what else goes there would meet the same."""
    later: list[int] = []
    told = 0
    try:
        for delivery in claimed:
            if place_of(delivery.path) in silent:
                later.append(delivery.id)
                continue
            on_delivery()
            try:
                placed = _placed(repository, store, delivery, content_filter)
            except KontextBatchError as error:
                if isinstance(error, InfrastructureError) and not isinstance(error, StorageReadOnly):
                    if not patient:
                        raise  # what is pending stays so, and the same command goes on
                    log.warning("delivery put off", path=delivery.path, run=delivery.run_id, error=str(error))
                    silent.add(place_of(delivery.path))
                    later.append(delivery.id)
                    continue
                log.warning("delivery failed", path=delivery.path, run=delivery.run_id, error=str(error))
                settled.append(SettledDelivery(delivery.id, error=str(error)))
                metrics.DELIVERIES.labels("failed").inc()
            else:
                settled.append(SettledDelivery(delivery.id, placed.path, placed.version, placed.skipped))
                metrics.DELIVERIES.labels("skipped" if placed.skipped else "delivered").inc()
                if delivery.if_exists == "replace":  # others look at what is recorded before they replace it
                    repository.settle_deliveries(worker_id, settled[told:])
                    told = len(settled)
    finally:
        if told < len(claimed):
            ended = {*later, *(each.id for each in settled)}
            back = [each.id for each in claimed if each.id not in ended]
            repository.settle_deliveries(worker_id, settled[told:], back=back, later=later)
    return len(settled)


def place_of(path: str) -> str:
    """What answers or does not answer as one: the bucket, or the disk."""
    scheme, _, rest = path.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _placed(
    repository: Repository, store: ObjectStore, delivery: PendingDelivery, content_filter: ContentFilter | None
) -> Placed:
    """`place`, unless a newer run was faster: a run that stood still and goes on brings what is out of date."""
    data = read_artifact(repository, store, delivery.artifact)
    if content_filter is not None and not content_filter.allows(data):
        raise KontextBatchError(f"{delivery.path}: the content filter does not allow this image")
    if delivery.if_exists != "replace":  # the only policy that takes anything away
        return place(store, delivery, data)
    newer = repository.newer_delivery(delivery.run_id, delivery.path)
    if newer is None:
        placed = place(store, delivery, data)
        newer = repository.newer_delivery(delivery.run_id, delivery.path)
        if newer is None:
            return placed
        # It delivered between the look and the write: put its image back.
        place(store, replace(newer, if_exists="replace"), read_artifact(repository, store, newer.artifact))
    return Placed(delivery.path, 1, skipped=f"run {newer.run_id} is newer and has delivered there")


def place(store: ObjectStore, delivery: PendingDelivery, data: bytes) -> Placed:
    """Write one image, `data`, to its path under its policy.

    Raises the store's errors, and `KontextBatchError` for `fail`.
    """
    artifact = delivery.artifact

    def write_new(path: str) -> bool:
        return store.write_if_absent(path, data, media_type=artifact.media_type)

    if delivery.if_exists == "replace":
        if not _holds(store, delivery.path, artifact.sha256, artifact.bytes):
            store.write(delivery.path, data, media_type=artifact.media_type)
        return Placed(delivery.path, 1)
    if write_new(delivery.path) or _holds(store, delivery.path, artifact.sha256, artifact.bytes):
        return Placed(delivery.path, 1)
    if delivery.if_exists == "skip":
        return Placed(delivery.path, 1, skipped="something is there already")
    if delivery.if_exists == "fail":
        raise KontextBatchError(f"{delivery.path}: another image is there already, and the recipe says if_exists: fail")
    for version in range(2, MAX_VERSIONS):
        path = versioned(delivery.path, version)
        if write_new(path) or _holds(store, path, artifact.sha256, artifact.bytes):
            return Placed(path, version)
    raise KontextBatchError(f"{delivery.path}: {MAX_VERSIONS} versions are there already")


def _holds(store: ObjectStore, path: str, sha256: str, size: int) -> bool:
    """Whether exactly these bytes lie at `path`."""
    try:
        info = store.head(path)
        return info.bytes == size and sha256_hex(store.read(path)) == sha256
    except (ObjectNotFound, NotAllowed):  # not allowed: a link that leads out of what may be read; not these bytes
        return False
