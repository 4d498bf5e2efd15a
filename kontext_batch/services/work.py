"""The worker's loop: claim, execute, deliver, until there is nothing to do or somebody says stop.

The embedded default runs it in the process of `run`; a cluster's workers run the same loop on each wake-up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from kontext_batch.errors import NotAllowed, StorageFull, StorageReadOnly
from kontext_batch.planning.states import RunState
from kontext_batch.ports import (
    ContentFilter,
    LeasedStep,
    ObjectStore,
    OnStep,
    Orders,
    Repository,
    RunSummary,
    WorkerInfo,
)
from kontext_batch.services.deliver import deliver_pending
from kontext_batch.services.execute import Executor
from kontext_batch.services.limits import Limits, enforce
from kontext_batch.services.maintain import collect_garbage, reconcile
from kontext_batch.services.turns import Turns

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at how a run stands: it takes 25 ms at 100,000 steps."""
IDLE_SECONDS = 0.5
"""Pause when nothing is ready but another worker still holds what this run waits for."""
ORDERS_SECONDS = 3.0
"""Between two looks at what this worker is told: how long a cancelled batch, at most, goes on."""

SERVED_RUNS = 1000
"""The newest so many runs are looked at for work."""


class Stopped(Exception):
    """The worker was told to stop in the middle of a batch, or nobody wants the batch any more."""


class Heartbeat:
    """Extends the worker's leases, and asks what it is told, from a thread that does not wait for the device."""

    def __init__(
        self,
        repository: Repository,
        worker_id: str,
        lease_seconds: float,
        on_orders: Callable[[Orders], None] | None = None,
        *,
        orders_seconds: float = ORDERS_SECONDS,
    ) -> None:
        self._repository, self._worker_id, self._lease = repository, worker_id, lease_seconds
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
                    self._repository.extend_leases(self._worker_id, self._lease)
                    extend_at = time.monotonic() + self._lease / 3
                if self._on_orders is not None:
                    self._on_orders(self._repository.orders(self._worker_id))
            except Exception:  # the next beat may succeed; without one the leases run out, which is safe
                log.exception("heartbeat failed")


@dataclass(slots=True)
class Worker:
    """One process that claims and computes."""

    info: WorkerInfo
    repository: Repository
    store: ObjectStore
    executor: Executor
    lease_seconds: float
    batch_rows: int
    content_filter: ContentFilter | None = None
    keep_bytes: int | None = None
    """Most bytes of artifacts to leave behind when a run is finished; None keeps everything."""
    turns: Turns = field(default_factory=Turns)
    """Whose steps are taken next."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set to stop: the batch in flight is given back at its next denoise step, nothing more is claimed."""
    limits: Limits = field(default_factory=Limits)
    """Above which a run is paused."""
    orders: Orders = field(default_factory=Orders)
    """What the heartbeat has found that this worker is told."""
    orders_seconds: float = ORDERS_SECONDS

    def run_until_done(
        self,
        run_id: int,
        *,
        on_step: OnStep | None = None,
        on_progress: Callable[[RunSummary], None] | None = None,
    ) -> RunSummary:
        """Work on one run until it has a final state, is paused, or this worker is to end; then give the leases back.

        Another process may share the run or some of its steps; what it holds is waited for, and taken over when that
        process is gone.
        """
        self.repository.register_worker(self.info)
        self.orders = Orders()
        try:
            reconcile(self.repository)  # what a killed process of this host held is free at once
            with self._heartbeat():
                look_again = 0.0
                while not self.ending:
                    worked = self.work_once(run_id=run_id, on_step=on_step)
                    delivered = deliver_pending(
                        self.repository, self.store, run_id=run_id, content_filter=self.content_filter
                    )
                    if worked and time.monotonic() < look_again:
                        continue
                    look_again = time.monotonic() + LOOK_SECONDS
                    self.repository.finish_runs()
                    enforce(self.repository, self.limits)
                    summary = self.repository.run(run_id)
                    if on_progress is not None:
                        on_progress(summary)
                    if summary.finished is not None:
                        if self.keep_bytes is not None:
                            collect_garbage(self.repository, self.store, keep_bytes=self.keep_bytes)
                        return summary
                    if not worked and not delivered:
                        if summary.state is RunState.PAUSED:
                            return summary
                        reconcile(self.repository)
                        self.stopping.wait(IDLE_SECONDS)
        finally:
            self.repository.retire_worker(self.info.id)
        return self.repository.run(run_id)

    def serve(self, covers: Callable[[RunSummary], bool]) -> None:
        """Work on every running run, highest priority first, until `stopping` is set or it is told to drain.

        Returns early when a run turns up that `covers` says no to: whoever called opens its folders and calls again.
        """
        self.repository.register_worker(self.info)
        self.orders = Orders()
        try:
            with self._heartbeat():
                look_again = 0.0
                while not self.ending:
                    reconcile(self.repository)
                    running = [run for run in self.repository.runs(limit=SERVED_RUNS) if run.finished is None]
                    if not all(map(covers, running)):
                        break
                    running.sort(key=lambda run: (-run.priority, run.id))
                    worked = any(self.work_once(run_id=run.id) for run in running)
                    delivered = sum(
                        deliver_pending(self.repository, self.store, run_id=run.id, content_filter=self.content_filter)
                        for run in running
                    )
                    self.repository.finish_runs()
                    if time.monotonic() >= look_again:
                        enforce(self.repository, self.limits)
                        look_again = time.monotonic() + LOOK_SECONDS
                    if not worked and not delivered:
                        self.stopping.wait(IDLE_SECONDS)
            self.orders = self.repository.orders(self.info.id)  # one told since the last look
        finally:
            self.repository.retire_worker(self.info.id)

    @property
    def ending(self) -> bool:
        """Nothing more is claimed: it was stopped, or told to drain."""
        return self.stopping.is_set() or self.orders.drain

    def work_once(self, *, run_id: int | None = None, on_step: OnStep | None = None) -> bool:
        """Claim and execute one batch; False when nothing is ready, or nothing may be taken any more."""
        if self.orders.drain:
            return False
        steps = self.repository.claim(
            self.info.id,
            limit=self.batch_rows,
            lease_seconds=self.lease_seconds,
            ranking=self.turns,
            run_id=run_id,
            capped=self.turns.capped,
        )
        if not steps:
            return False
        self.turns.took(steps)
        held = {(step.id, step.token) for step in steps}

        def on_row_step(done: int, total: int) -> None:
            if on_step is not None:
                on_step(done, total)
            if self.stopping.is_set() or self.orders.unwanted >= held:
                raise Stopped

        try:
            report = self.executor.run(steps, on_step=on_row_step)
        except Stopped:
            self._release(steps)
            return not self.stopping.is_set()
        except (StorageFull, StorageReadOnly, NotAllowed):
            self._release(steps)  # not their fault: they wait until there is room, or another place
            raise
        if report.fenced:
            log.warning("results dropped: another worker held these steps", steps=list(report.fenced))
        return True

    def _heartbeat(self) -> Heartbeat:
        def obey(orders: Orders) -> None:
            self.orders = orders

        return Heartbeat(self.repository, self.info.id, self.lease_seconds, obey, orders_seconds=self.orders_seconds)

    def _release(self, steps: Sequence[LeasedStep]) -> None:
        self.repository.release([(step.id, step.token) for step in steps])
