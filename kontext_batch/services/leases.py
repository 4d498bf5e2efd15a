"""What a worker holds, and the heart that keeps it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable

import structlog

from kontext_batch.observability import metrics
from kontext_batch.ports import LeasedStep, Orders, Repository

log = structlog.get_logger(__name__)

ORDERS_SECONDS = 3.0
"""Between two looks at what this worker is told: how long a cancelled step, at most, goes on."""


class Leases:
    """The steps that a worker holds, from the claim until they are committed or given back. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[int, int], LeasedStep] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, steps: Iterable[LeasedStep]) -> None:
        with self._lock:
            self._held |= {(step.id, step.token): step for step in steps}

    def drop(self, steps: Iterable[LeasedStep]) -> None:
        """They are committed, or given back."""
        with self._lock:
            for step in steps:
                self._held.pop((step.id, step.token), None)

    def held(self) -> list[LeasedStep]:
        with self._lock:
            return list(self._held.values())

    def pairs(self) -> frozenset[tuple[int, int]]:
        """(step id, token): what the heartbeat extends."""
        with self._lock:
            return frozenset(self._held)

    @property
    def batch_limit(self) -> int | None:
        """Most steps that may be held together with these; None: any number."""
        return min((step.batch_limit for step in self.held() if step.batch_limit is not None), default=None)


class Heartbeat:
    """Extends the worker's leases, and asks what it is told, from a thread that does not wait for the device."""

    def __init__(
        self,
        repository: Repository,
        worker_id: str,
        lease_seconds: float,
        on_orders: Callable[[Orders], None] | None = None,
        *,
        held: Callable[[], Collection[tuple[int, int]]],
        orders_seconds: float = ORDERS_SECONDS,
    ) -> None:
        """`held`: the (step id, token) leases that the worker knows of at a moment."""
        self._repository, self._worker_id, self._lease, self._held = repository, worker_id, lease_seconds, held
        self._on_orders = on_orders
        self._every = lease_seconds / 3 if on_orders is None else min(lease_seconds / 3, orders_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        extend_at = time.monotonic() + self._lease / 3
        while not self._stop.wait(self._every):
            try:
                if time.monotonic() >= extend_at - self._every / 2:
                    self._repository.extend_leases(self._worker_id, self._lease, self._held())
                    extend_at = time.monotonic() + self._lease / 3
                if self._on_orders is not None:
                    self._on_orders(self._repository.orders(self._worker_id))
            except Exception:  # the next beat may succeed; without one the leases run out, which is safe
                metrics.HEARTBEATS_FAILED.inc()
                log.exception("heartbeat failed", worker=self._worker_id)
