"""What a process counts, for Prometheus; docs/observability.md explains each.

One registry a process: a worker process serves its own numbers, and Prometheus adds them up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)

BATCH_STEPS = Histogram(
    "kontext_batch_batch_steps", "Steps of a batch.", ["lane"], buckets=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
)
BATCH_OCCUPANCY = Histogram(
    "kontext_batch_batch_occupancy_ratio",
    "Images that are in at a denoise step over batch_rows.",
    ["lane"],
    buckets=_SHARES,
)
PHASE_SECONDS = Histogram(
    "kontext_batch_phase_seconds",
    "Seconds by phase: a claim, a denoise step (compute), a commit; the others of a step.",
    ["phase"],
    buckets=_SECONDS,
)
STEPS = Counter(
    "kontext_batch_steps",
    "Steps that this process ended: done, failed, retried, fenced or released.",
    ["lane", "outcome"],
)
FAULTS = Counter(
    "kontext_batch_step_faults", "Steps that failed or are tried again, by fault.", ["error_class", "outcome"]
)
LEASES_LOST = Counter("kontext_batch_leases_lost", "Leases that ran out, or whose process was gone.")
QUARANTINED = Counter("kontext_batch_steps_quarantined", "Steps that lost too many workers.")
HEARTBEATS_FAILED = Counter("kontext_batch_heartbeats_failed", "Heartbeats that did not reach the database.")
DELIVERIES = Counter("kontext_batch_deliveries", "Images brought to their paths, skipped or failed.", ["outcome"])
WEBHOOKS = Counter("kontext_batch_webhook_sends", "Tries to send an event.", ["webhook", "outcome"])


class Activity(Collector):
    """How long the device has computed, of the time since this process began to work. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._began: float | None = None
        self._computed = 0.0
        self._computing_since: dict[object, float] = {}

    def begin(self) -> None:
        """From here on the device might compute; a second call changes nothing."""
        with self._lock:
            self._began = self._clock() if self._began is None else self._began

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The device computes within."""
        self.begin()
        key = object()
        with self._lock:
            self._computing_since[key] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._computed += self._clock() - self._computing_since.pop(key)

    def seconds(self) -> tuple[float, float]:
        """(computing, alive), the batch in flight included."""
        with self._lock:
            moment = self._clock()
            computed = self._computed + sum(moment - since for since in self._computing_since.values())
            return computed, 0.0 if self._began is None else moment - self._began

    def collect(self) -> Iterable[Metric]:
        computed, alive = self.seconds()
        yield CounterMetricFamily("kontext_batch_computing_seconds", "Seconds that the device computed.", computed)
        yield CounterMetricFamily("kontext_batch_alive_seconds", "Seconds since this process began to work.", alive)
        if alive:
            idle = GaugeMetricFamily(
                "kontext_batch_gpu_idle_ratio", "Share of its time in which the device did not compute."
            )
            idle.add_metric([], max(0.0, 1.0 - computed / alive))
            yield idle


ACTIVITY = Activity()
REGISTRY.register(ACTIVITY)


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Observe how long what is within takes, when it succeeds."""
    started = time.perf_counter()
    yield
    PHASE_SECONDS.labels(phase).observe(time.perf_counter() - started)
