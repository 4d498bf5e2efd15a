"""What is kept, and what goes: garbage by policy, and the objects of what was taken down.

The database forgets first, and an object is deleted inside that transaction, under the lock of everybody who would name
it. What lies where this store may not delete (the setting `objects` was another one) stays, and stays known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from kontext_batch.errors import NotAllowed, StorageReadOnly
from kontext_batch.ports import Artifact, ObjectStore, Repository
from kontext_batch.services.takedown import go_on

log = structlog.get_logger(__name__)

TICK_SECONDS = 600.0
"""Least time between two looks of a beat that left nothing to do."""
MORE_SECONDS = 15.0
"""The same where a look ended before its work."""
PAUSE = 50
"""A look is followed by this many times its own length."""
MOST_AT_ONCE = 500
"""Artifacts, tombstones and orphans that a beat removes in one look, each: it has schedules to look after."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What `gc` removes by itself."""

    keep_bytes: int | None = None
    """Bytes of artifacts above which what can be computed again goes, intermediates first; None: any number."""
    intermediate_days: float | None = None
    """After which intermediates go that nobody has wanted meanwhile; None: they stay."""


@dataclass(frozen=True, slots=True)
class Amount:
    """Of artifacts."""

    artifacts: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.artifacts + other.artifacts, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a garbage collection removed, or would remove."""

    artifacts: int
    bytes: int
    orphans: int
    by_age: Amount = Amount()
    """Of `artifacts`: intermediates that nobody wanted for long."""
    by_size: Amount = Amount()
    """Of `artifacts`: what was above the size limit."""
    taken_down: int = 0
    """Objects of forgotten photos that were left from their takedown."""


def collect_garbage(
    repository: Repository,
    store: ObjectStore,
    policy: Policy,
    *,
    dry_run: bool = False,
    most: int | None = None,
    admit: Callable[[Iterable[str]], None] | None = None,
) -> Collected:
    """Remove what the policy says, orphaned uploads, and what is left of takedowns; `most`: at most so many of each.

    `admit`: as of `takedown.go_on`.
    """
    days, keep_bytes = policy.intermediate_days, policy.keep_bytes
    old = [] if days is None else repository.expired(days=days, limit=most)
    large = [] if keep_bytes is None else repository.collectable(keep_bytes=keep_bytes, expired_days=days)[:most]
    orphans = repository.orphaned_uploads()[:most]
    if dry_run:
        by_age, by_size = _amount(old), _amount(large)
        gone, buried = len(orphans), len(repository.tombstones(pending=True, limit=most))
    else:
        by_age = _forget(repository, store, old, days)
        by_size = _forget(repository, store, large, None)
        gone = sum(_forget_orphan(repository, store, uri) for uri in orphans)
        buried = go_on(repository, store, admit=admit, most=most).done
    total = by_age + by_size
    return Collected(total.artifacts, total.bytes, gone, by_age, by_size, buried)


def _amount(artifacts: Iterable[Artifact]) -> Amount:
    sizes = [each.bytes for each in artifacts]
    return Amount(len(sizes), sum(sizes))


def _forget(
    repository: Repository, store: ObjectStore, artifacts: Iterable[Artifact], expired_days: float | None
) -> Amount:
    done = Amount()
    for each in artifacts:
        with suppress(NotAllowed, StorageReadOnly):
            if repository.forget_artifact(each.sha256, store.delete, expired_days=expired_days):
                done += Amount(1, each.bytes)
    return done


def _forget_orphan(repository: Repository, store: ObjectStore, uri: str) -> bool:
    with suppress(NotAllowed, StorageReadOnly):
        repository.forget_uploads([uri], store.delete)
        return True
    return False


@dataclass(slots=True)
class Collector:
    """A beat's collections; call `tick` as often as you like."""

    repository: Repository
    store: ObjectStore
    intermediate_days: float | None
    """None: only orphans, and what is left of takedowns."""
    admit: Callable[[Iterable[str]], None] | None = None
    clock: Callable[[], float] = time.monotonic
    _next: float = field(default=-math.inf)

    def tick(self) -> Collected | None:
        """Remove some of what may go; None while it is too early. Raises `InfrastructureError`."""
        started = self.clock()
        if started < self._next:
            return None
        self._next = started + MORE_SECONDS  # whatever is raised
        policy = Policy(intermediate_days=self.intermediate_days)
        done = collect_garbage(self.repository, self.store, policy, most=MOST_AT_ONCE, admit=self.admit)
        more = max(done.artifacts, done.orphans, done.taken_down) >= MOST_AT_ONCE
        took = self.clock() - started
        self._next = self.clock() + max(MORE_SECONDS if more else TICK_SECONDS, PAUSE * took if not more else took)
        if done.artifacts or done.orphans or done.taken_down:
            counts = {"artifacts": done.artifacts, "orphans": done.orphans, "taken_down": done.taken_down}
            log.info("garbage removed", **counts, bytes=done.bytes)
        return done
