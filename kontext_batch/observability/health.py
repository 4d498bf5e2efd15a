"""Whether a process comes on (`/healthz`), and whether what it needs answers (`/readyz`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from kontext_batch.observability.masking import mask

KEPT_SECONDS = 5.0
"""How long an answer of the checks stands: whoever asks often does not load the database."""
WAIT_SECONDS = 5.0
"""How long one waits for checks that another request has begun."""

Checks = Mapping[str, Callable[[], object]]
"""What is needed -> looks whether it answers, and raises what is wrong with it."""


class Pulse:
    """Progress of the loops of a process. Threads may share it; a process that has nothing to do is healthy."""

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit`: seconds that a loop may take from one `beat` to the next."""
        self._limit, self._clock, self._lock = limit, clock, threading.Lock()
        self._working = 0
        self._last = clock()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within, somebody comes on or is stalled."""
        with self._lock:
            self._working += 1
            self._last = self._clock()
        try:
            yield
        finally:
            with self._lock:
                self._working -= 1

    def beat(self) -> None:
        """The loop has come on."""
        with self._lock:
            self._last = self._clock()

    def stalled(self) -> float | None:
        """Seconds since the last progress, when those are too many; None: healthy."""
        with self._lock:
            silent = self._clock() - self._last
            return silent if self._working and silent > self._limit else None


class Readiness:
    """Asks the checks, not more often than their answers are kept."""

    def __init__(self, checks: Checks, clock: Callable[[], float] = time.monotonic) -> None:
        self._checks, self._clock, self._lock = checks, clock, threading.Lock()
        self._faults: Mapping[str, str] = {}
        self._asked: float | None = None

    def faults(self) -> Mapping[str, str]:
        """What does not answer -> why; empty when all does."""
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            return {"checks": f"they have been at work for more than {WAIT_SECONDS:g} s"}
        try:
            if self._asked is None or self._clock() - self._asked >= KEPT_SECONDS:
                asked = ((name, _fault(check)) for name, check in self._checks.items())
                self._faults = {name: fault for name, fault in asked if fault is not None}
                self._asked = self._clock()
            return self._faults
        finally:
            self._lock.release()


def _fault(check: Callable[[], object]) -> str | None:
    try:
        check()
    except Exception as error:  # whatever it is, it is not ready
        return mask(str(error)) or type(error).__name__
    return None
