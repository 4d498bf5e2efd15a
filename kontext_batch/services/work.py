"""The worker's loop: claim, execute, deliver, until there is nothing to do or somebody says stop.

The embedded default runs it in the process of `run`; a cluster's workers run the same loop on each wake-up.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from kontext_batch.errors import InfrastructureError, NotAllowed, StorageFull, StorageReadOnly
from kontext_batch.observability import metrics
from kontext_batch.observability.health import Pulse
from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.planning.states import RunState
from kontext_batch.ports import (
    CommitReport,
    ContentFilter,
    InHand,
    LeasedStep,
    ObjectStore,
    OnStep,
    Orders,
    Ready,
    Repository,
    RunSummary,
    Share,
    WakeUps,
    WorkerInfo,
)
from kontext_batch.services.deliver import AT_ONCE, Papers, deliver_pending
from kontext_batch.services.execute import Executor
from kontext_batch.services.hand import Hand
from kontext_batch.services.leases import ORDERS_SECONDS, Heartbeat, Leases
from kontext_batch.services.limits import Limits, enforce
from kontext_batch.services.maintain import reconcile
from kontext_batch.services.pipeline import Pipeline
from kontext_batch.services.retention import Policy, collect_garbage
from kontext_batch.services.sample import Sampler
from kontext_batch.services.turns import Turns

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at how a run stands: it takes some 40 ms at 100,000 steps (benchmarks/control_plane.py)."""
IDLE_SECONDS = 0.5
"""Pause when nothing is ready but another worker still holds what this run waits for."""
TURN_SECONDS = 600.0
"""How long a worker goes on after one ring; then it finishes what it has in hand, rings for the rest, and Celery sees
that it is alive. Slots idle meanwhile, so it is long; but RabbitMQ lets a ring wait half an hour for its worker."""
RETRY_SECONDS = 1.0
FULL_SECONDS = 60.0
"""Pause of a worker whose results the store does not take."""


@dataclass(slots=True)
class Worker:
    """One process that claims and computes."""

    info: WorkerInfo
    repository: Repository
    store: ObjectStore
    executor: Executor
    lease_seconds: float
    batch_rows: int
    wake_ups: WakeUps
    content_filter: ContentFilter | None = None
    papers: Papers = field(default_factory=Papers)
    """What delivered files come with."""
    policy: Policy | None = None
    """What of the artifacts goes when a run is finished; None keeps everything."""
    turns: Turns = field(default_factory=Turns)
    """Whose steps are taken next."""
    admit: Callable[[Iterable[str]], None] | None = None
    """Told of the recipes whose steps are about to be worked on, so that the store lets their places be used."""
    draining: threading.Event = field(default_factory=threading.Event)
    """Set to end: what the device samples is finished, nothing more is begun."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set to stop: what the device samples is given back at the next denoise step, nothing more is begun."""
    has_device: bool = True
    """False of a worker that serves picture operations alone: it has no device that could be idle."""
    pulse: Pulse = field(default_factory=lambda: Pulse(math.inf))
    """Beats with each claim and each denoise step; with deliveries while nothing is sampled."""
    limits: Limits = field(default_factory=Limits)
    """Above which a run is paused."""
    backlog_limit: int | None = None
    """Pictures of a run that wait to be finished or delivered, above which no more are computed for it."""
    orders: Orders = field(default_factory=Orders)
    """What the heartbeat has found that this worker is told."""
    orders_seconds: float = ORDERS_SECONDS
    full_seconds: float = FULL_SECONDS
    _telling: threading.Lock = field(default_factory=threading.Lock)
    on_drain: Callable[[], None] | None = None
    """Called when it is told to drain, from the heartbeat's thread."""
    leases: Leases = field(default_factory=Leases)
    """What it has in hand: what the heartbeat extends."""
    reconciles: bool = False
    """Whether it returns what workers held that are gone: there may be no beat that does."""
    owed: int = 0
    """Deliveries that this worker's commits have made possible since it last looked for some."""

    @property
    def ending(self) -> bool:
        """Whether nothing more is to be claimed."""
        return self.draining.is_set() or self.stopping.is_set() or self.orders.drain

    def end(self, grace_seconds: float) -> None:
        """Told to end: finish what is sampled within so long; told again: give it back. For signal handlers too."""
        # Not here: the thread that was interrupted may hold the lock of an event.
        threading.Thread(target=self._end, args=(grace_seconds,), name="end", daemon=True).start()

    def _end(self, grace_seconds: float) -> None:
        with self._telling:
            first = not self.draining.is_set()
            self.draining.set()
        if first:
            self.stopping.wait(grace_seconds)
        self.stopping.set()

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Known to the others, with a heart that beats; at the end the leases are given back."""
        self.repository.register_worker(self.info)
        self.orders = Orders()
        try:
            with self._heartbeat():
                yield
        finally:
            self.repository.retire_worker(self.info.id)
            self.leases.drop(self.leases.held())

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
        with self.registered():
            reconcile(self.repository)  # what a killed process of this host held is free at once
            look_again = 0.0
            while not self.ending:
                worked = self.work_once(run_id=run_id, on_step=on_step)
                delivered = self.deliver(run_id=run_id)
                if worked and time.monotonic() < look_again:
                    continue
                look_again = time.monotonic() + LOOK_SECONDS
                self._look()
                summary = self.repository.run(run_id)
                if on_progress is not None:
                    on_progress(summary)
                if summary.finished is not None:
                    if self.policy is not None:
                        collect_garbage(self.repository, self.store, self.policy, admit=self.admit)
                    return summary
                if not worked and not delivered:
                    if summary.state is RunState.PAUSED:
                        return summary
                    reconcile(self.repository)
                    self.stopping.wait(IDLE_SECONDS)
        return self.repository.run(run_id)

    def serve(self) -> None:
        """Work on every running run until told to end, looking for work all the time: there is nobody to ring."""
        self.reconciles = True
        with self.registered():
            while not self.ending:
                if not self.turn_through_outages():
                    self.draining.wait(IDLE_SECONDS)

    def turn_through_outages(self) -> bool:
        """`turn`; an outage breaks it off and no more, and what it held is given back.

        Anything else that is raised is no outage: the process had better end, so that its leases are counted as lost.
        """
        try:
            return self.turn()
        except (StorageFull, StorageReadOnly, NotAllowed) as error:
            # The same would be computed again, and have nowhere to go.
            log.error("the store takes nothing; waiting", error=str(error), seconds=self.full_seconds)
            self._give_back()
            self.draining.wait(self.full_seconds)
        except InfrastructureError as error:
            log.error("turn broken off; tried again", error=str(error))
            self._give_back()
            self.draining.wait(RETRY_SECONDS)
        return False

    def _give_back(self) -> None:
        """What the turn held, whatever time it takes: the heart of this process beats on, so no lease would run out."""
        while not self.stopping.is_set():
            try:
                self.repository.release_all(self.info.id)
                self.leases.drop(self.leases.held())
                return
            except InfrastructureError as error:
                log.warning("leases could not be given back yet", error=str(error))
                self.stopping.wait(RETRY_SECONDS)

    def turn(self, *, seconds: float = TURN_SECONDS) -> bool:
        """Compute and deliver until nothing more is found, or for so long; says whether anything was.

        What a turn leaves undone for want of time is rung for again.
        """
        end = time.monotonic() + seconds
        found, again, look_again = False, True, 0.0
        with self.pulse.working():
            while again and not self.ending:
                again = self.work_once(ring=not found, until=end)
                # A look for deliveries costs as much as a step or two, so that it waits until there are many.
                if not again or self.owed >= AT_ONCE or time.monotonic() >= look_again:
                    again = self.deliver() > 0 or again
                found = found or again
                if not again or time.monotonic() >= look_again:
                    look_again = time.monotonic() + LOOK_SECONDS
                    again = self._look() or again
                if again and time.monotonic() >= end:
                    self.wake_ups.wake({self.turns.lane or OPERATIONS_LANE: 1})
                    break
        return found

    def _look(self) -> bool:
        """What is due each second or so, and not with each batch; says whether a run is held back no more."""
        if self.reconciles:
            reconcile(self.repository)
        self.repository.finish_runs()
        enforce(self.repository, self.limits)
        if self.backlog_limit is None or not self.has_device:
            return False
        before, found = self.turns.backlogged, frozenset(self.repository.backlogged_runs(self.backlog_limit))
        for run_id in sorted(found - before):
            log.warning("run held back: too much of it waits to be finished or delivered", run=run_id)
        self.turns.backlogged = found
        return bool(before - found)

    def deliver(self, *, run_id: int | None = None, beat: Callable[[], None] | None = None) -> int:
        """Bring some of what is finished, where that is this worker's business; returns how many are settled.

        `beat`: called after each, instead of the pulse.
        """
        if not self.turns.serves(OPERATIONS_LANE):
            return 0  # a GPU does not wait for a store
        self.owed = 0
        return deliver_pending(
            self.repository,
            self.store,
            worker_id=self.info.id,
            run_id=run_id,
            content_filter=self.content_filter,
            papers=self.papers,
            admit=self.admit,
            patient=run_id is None,
            on_delivery=beat or self.pulse.beat,
        )

    def work_once(
        self, *, run_id: int | None = None, on_step: OnStep | None = None, ring: bool = False, until: float = math.inf
    ) -> bool:
        """Claim steps, and work on their lane as long as it has its turn; False when nothing was ready, or it was told
        to stop.

        `ring`: wake another worker when there is more than this one can take. `until`: by the monotonic clock, when to
        claim no more.
        """
        if self.orders.drain:
            return False
        if self.has_device:
            metrics.ACTIVITY.begin()
        self.pulse.beat()
        steps = self._claim(self.batch_rows, run_id)
        if not steps:
            return False
        if ring and len(steps) == self.batch_rows:
            self.wake_ups.wake({steps[0].lane: 1})
        if steps[0].lane == OPERATIONS_LANE:
            self._operate(steps)
            return True
        return self._edit(steps, run_id=run_id, on_step=on_step, until=until)

    def _claim(self, limit: int, run_id: int | None, in_hand: InHand | None = None) -> Sequence[LeasedStep]:
        started = time.perf_counter()
        steps = self.repository.claim(
            self.info.id,
            limit=limit,
            lease_seconds=self.lease_seconds,
            ranking=self._rank,
            run_id=run_id,
            capped=self.turns.capped,
            in_hand=in_hand,
        )
        if steps:
            self.leases.add(steps)
            self.turns.took(steps)
            metrics.PHASE_SECONDS.labels("claim").observe(time.perf_counter() - started)
        return steps

    def _operate(self, steps: Sequence[LeasedStep]) -> None:
        metrics.BATCH_STEPS.labels(OPERATIONS_LANE).observe(len(steps))
        metrics.BATCH_OCCUPANCY.labels(OPERATIONS_LANE).observe(len(steps) / self.batch_rows)
        with self.executor.about(steps):
            try:
                report = self.executor.operate(steps)
            except (StorageFull, StorageReadOnly, NotAllowed):
                self.executor.give_back(steps)  # not their fault: they wait until there is room, or another place
                self.leases.drop(steps)
                raise
            self.leases.drop(steps)
            self._committed(report, self.batch_rows)

    def _edit(self, steps: Sequence[LeasedStep], *, run_id: int | None, on_step: OnStep | None, until: float) -> bool:
        """The lane of these steps, until it has nothing more, its turn is over, or the worker is to end."""
        hand = Hand(self.leases, self.batch_rows, self.stopping)

        def claim(room: int, in_hand: InHand) -> Sequence[LeasedStep]:
            return [] if self.ending or time.monotonic() >= until else self._claim(room, run_id, in_hand)

        def stepped(done: int, total: int) -> None:
            self.pulse.beat()
            if on_step is not None:
                on_step(done, total)

        def delivered() -> None:
            if not sampler.rows:  # else the device is to come on
                self.pulse.beat()

        def look() -> None:
            self._look()
            self.deliver(run_id=run_id, beat=delivered)

        sampler = Sampler(
            self.executor, hand, stepped, unwanted=lambda: self.orders.unwanted, ending=lambda: self.ending
        )
        return Pipeline(
            executor=self.executor,
            hand=hand,
            sampler=sampler,
            claim=claim,
            committed=self._committed,
            meanwhile=look,
            look_seconds=LOOK_SECONDS,
        ).run(steps)

    def _rank(self, ready: Sequence[Ready]) -> Sequence[Share]:
        if self.admit is not None:
            self.admit({each.source for each in ready})
        return self.turns(ready)

    def _committed(self, report: CommitReport, room: int) -> None:
        """Ring for what became ready and this worker does not take next: of its lane so many more."""
        self.pulse.beat()
        if report.fenced:
            log.warning(
                "results dropped: another worker held these steps, or they are taken down", fenced=list(report.fenced)
            )
        log.info("batch committed", batch=report.batch_id, committed=len(report.committed))
        taken = {lane: room if lane == self.turns.lane else self.batch_rows for lane in report.woken}
        lanes = {
            lane: count - taken[lane] if self.turns.serves(lane) else count for lane, count in report.woken.items()
        }
        self.owed += report.deliverable
        if report.deliverable and not self.turns.serves(OPERATIONS_LANE):
            lanes[OPERATIONS_LANE] = max(lanes.get(OPERATIONS_LANE, 0), report.deliverable)
        lanes = {lane: count for lane, count in lanes.items() if count > 0}
        if lanes:
            self.wake_ups.wake(lanes)

    def _heartbeat(self) -> Heartbeat:
        def obey(orders: Orders) -> None:
            told_now = orders.drain and not self.orders.drain
            self.orders = orders
            if told_now and self.on_drain is not None:
                self.on_drain()

        return Heartbeat(
            self.repository,
            self.info.id,
            self.lease_seconds,
            obey,
            held=self.leases.pairs,
            orders_seconds=self.orders_seconds,
        )
