"""The stage of a pipeline that samples: admit, step, retire, in the thread that called.

Between two denoise steps those that are finished leave and others join. What is asked of the database or the store
belongs into the other stages.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import structlog

from kontext_batch.errors import InfrastructureError, OutOfMemory, StepError
from kontext_batch.observability import metrics
from kontext_batch.ports import BatchMember, EditSession, LeasedStep, OnStep, SampledPicture, StepFailed
from kontext_batch.services.execute import Executor, Loaded, failure, halved
from kontext_batch.services.hand import Batch, Hand, Left

log = structlog.get_logger(__name__)

AHEAD_SECONDS = 5.0
"""How long before a slot is free the step that is to have it is claimed and fetched. With more of it a worker holds,
at the end of a run, what another might begin."""


@dataclass(slots=True)
class Row:
    """A step that is in a session."""

    loaded: Loaded
    joined: int
    place: int
    """How many had joined the batch before it."""
    seconds: float = 0.0
    """Its share of what the device sampled."""

    @property
    def step(self) -> LeasedStep:
        return self.loaded.step

    @property
    def steps(self) -> int:
        return int(self.step.params["steps"])

    @property
    def timings(self) -> Mapping[str, float]:
        return {"fetch": self.loaded.seconds, "sample": self.seconds}


@dataclass(slots=True)
class Sampler:
    """Owns the device while it runs."""

    executor: Executor
    hand: Hand
    on_step: OnStep
    unwanted: Callable[[], frozenset[tuple[int, int]]]
    """(step id, token) of what nobody wants any more."""
    ending: Callable[[], bool]
    """Whether what is in the session is all that is still to be sampled."""
    rows: dict[int, Row] = field(default_factory=dict)
    """What is in the session, by step id."""
    step_seconds: float = math.inf
    """How long the last denoise step took."""

    def run(self) -> None:
        """One session after another, until none is left to sample or to wait for. Raises as `Hand.heed` does."""
        while (first := self.hand.await_prepared()) is not None:
            if self.ending():
                self._give_back(self.hand.refused())
                continue
            with ExitStack() as stack:
                try:
                    session = stack.enter_context(self.executor.editor.session(first.params))
                except (StepError, InfrastructureError) as error:
                    self.hand.hand_on([Left(step, self._failure(step, error)) for step in self.hand.refused()])
                    continue
                self.hand.has_slots(session.free)
                batch = Batch(self.executor.record(first))
                try:
                    self._sample(session, batch)
                except _SessionLost as lost:
                    self._lose(batch, lost.error)
                finally:
                    metrics.BATCH_STEPS.labels(first.lane).observe(len(batch.joined))

    def _sample(self, session: EditSession, batch: Batch) -> None:
        """Until nothing is left, nobody wants what is in, or a step comes back: of a batch it is a member but once."""
        while self.rows or ((first := self.hand.await_prepared()) is not None and first.id not in batch.joined):
            self._admit(session, batch)
            if not self.rows:
                continue
            self._step(session, batch)
            self.hand.heed()
            if self.rows and self.unwanted() >= {(row.step.id, row.step.token) for row in self.rows.values()}:
                self._give_back([row.step for row in self.rows.values()])
                self.rows.clear()
                self.hand.stays(0)
                return

    def _admit(self, session: EditSession, batch: Batch) -> None:
        while session.free and (loaded := self.hand.next(but=batch.joined)) is not None:
            step = loaded.step
            if self.ending() or (step.id, step.token) in self.unwanted():
                self._give_back([step])
                continue
            self.rows[step.id] = Row(loaded, batch.clock, len(batch.joined))
            batch.joined.add(step.id)
            try:
                with _device():
                    session.admit(step.id, loaded.prepared)
            except StepError as error:
                self.hand.hand_on([self._left(self.rows.pop(step.id), batch, self._failure(step, error))])
            else:
                with self.executor.about([step]):
                    log.debug("step joined", rows=len(self.rows), clock=batch.clock)
        self._tell_who_stays(batch)

    def _step(self, session: EditSession, batch: Batch) -> None:
        rows = list(self.rows.values())
        metrics.BATCH_OCCUPANCY.labels(rows[0].step.lane).observe(len(rows) / self.hand.rows)
        started = time.perf_counter()
        with _device():
            session.step()
        self.step_seconds = time.perf_counter() - started
        metrics.PHASE_SECONDS.labels("compute").observe(self.step_seconds)
        batch.clock += 1
        for row in rows:
            row.seconds += self.step_seconds / len(rows)
        with _device():
            retired = session.retire()
        leaving = []
        for ticket, result in retired:
            row = self.rows.pop(ticket)
            end = self._failure(row.step, result) if isinstance(result, StepError) else result
            leaving.append(self._left(row, batch, end))
        self.hand.hand_on(leaving)
        self._tell_who_stays(batch)
        self.on_step(sum(batch.clock - row.joined for row in rows), sum(row.steps for row in rows))

    def _tell_who_stays(self, batch: Batch) -> None:
        to_go = (row.joined + row.steps - batch.clock for row in self.rows.values())
        self.hand.stays(sum(steps * self.step_seconds > AHEAD_SECONDS for steps in to_go))

    def _lose(self, batch: Batch, error: InfrastructureError) -> None:
        """What has ended the session is what all that were in have met."""
        rows = list(self.rows.values())
        self.rows.clear()
        self.hand.hand_on([self._left(row, batch, self._failure(row.step, error, len(rows))) for row in rows])
        self.hand.stays(0)

    def _left(self, row: Row, batch: Batch, result: SampledPicture | StepFailed) -> Left:
        if row.joined == batch.clock:
            return Left(row.step, result, row.timings)
        return Left(row.step, result, row.timings, batch, BatchMember(row.step.id, row.joined, batch.clock, row.place))

    def _failure(self, step: LeasedStep, error: Exception, rows: int = 1) -> StepFailed:
        """Of a step that was one of so many rows."""
        with self.executor.about([step]):
            if isinstance(error, OutOfMemory) and rows > 1:
                return halved(step, error, rows)
            return failure(step, error)

    def _give_back(self, steps: list[LeasedStep]) -> None:
        self.hand.hand_on([Left(step, None) for step in steps])


class _SessionLost(Exception):
    """The session cannot go on."""

    def __init__(self, error: InfrastructureError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _device() -> Iterator[None]:
    """The device computes within. What it has no room for, or cannot do, ends the session."""
    try:
        with metrics.ACTIVITY.computing():
            yield
    except InfrastructureError as error:
        raise _SessionLost(error) from error
