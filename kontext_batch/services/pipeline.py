"""One lane of a model, in three stages that wait for one another no longer than they must.

    feed     claim steps, fetch and prepare what they read       threads that wait for database and store
    sample   admit, step, retire (services.sample)               the thread that calls `run`: the device's
    keep     encode, announce, put and commit what was sampled,  threads that wait for database and store
             give back what nobody wants

Steps join and leave between denoise steps: the slot of one that leaves is another's before the next denoise step, and
what a commit has made ready joins the same session. `services.hand` is what lies between the stages.

What a stage meets that is no step's fault is raised by `run`, after what is sampled is kept. An outage that claims or
looks meet waits for its turn: what is in hand is sampled and kept first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from kontext_batch.errors import InfrastructureError, KontextBatchError, NotAllowed, StorageFull, StorageReadOnly
from kontext_batch.ports import CommitReport, InHand, LeasedStep, StepFailed, StepResult
from kontext_batch.services.execute import Executor, Finished
from kontext_batch.services.hand import Hand, Left, Stopped
from kontext_batch.services.sample import Sampler

In = TypeVar("In")
Out = TypeVar("Out")

STORE_THREADS = 8
"""Fetches at once, and as many puts."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """For one lane, and used once."""

    executor: Executor
    hand: Hand
    sampler: Sampler
    claim: Callable[[int, InHand], Sequence[LeasedStep]]
    """Leases so many steps more of the lane, or fewer; nothing when there is none, or its turn is over."""
    committed: Callable[[CommitReport, int], None]
    """Told of each commit, and for how many steps more there is room."""
    meanwhile: Callable[[], None]
    """What else is due, each so often."""
    look_seconds: float

    def run(self, steps: Sequence[LeasedStep]) -> bool:
        """Work on these steps and on what joins them, until `claim` has no more; False when it was stopped.

        No thread is left behind. What a stop, or a store that takes nothing, keeps from being done is given back; of
        other faults the worker knows what becomes of what it holds.
        """
        stopped = False
        try:
            with self._keeping(), self._feeding(steps):
                try:
                    self.sampler.run()
                except Stopped:
                    stopped = True
            self._give_back()
            for fault in self.hand.faults():
                raise fault
        except (StorageFull, StorageReadOnly, NotAllowed):
            self._give_back()  # not their fault: they wait until there is room, or another place
            raise
        return not stopped

    def _give_back(self) -> None:
        steps = self.hand.leases.held()
        if steps:
            self.executor.give_back(steps)
            self.hand.kept(steps)

    # ----------------------------------------------------------------------------------------------------------- feed

    @contextmanager
    def _feeding(self, steps: Sequence[LeasedStep]) -> Iterator[None]:
        """Within, threads claim, fetch and look; at the end none of it goes on."""
        lane = steps[0].lane
        with ThreadPoolExecutor(STORE_THREADS, "fetch") as pool:
            self._take(steps, pool)
            try:
                feed = partial(self._patiently, partial(self._feed, lane, pool))
                with _threads(self.hand.end_feeding, feed=feed, look=partial(self._patiently, self._look)):
                    yield
            finally:
                pool.shutdown(cancel_futures=True)

    def _patiently(self, work: Callable[[], None]) -> None:
        """What is in hand is no part of it, and is done before anybody hears of its faults."""
        try:
            work()
        except KontextBatchError as error:
            self.hand.fail_late(error)
        except BaseException as error:
            self.hand.fail(error)

    def _feed(self, lane: str, pool: ThreadPoolExecutor) -> None:
        while room := self.hand.await_room():
            self._take(self.claim(room, InHand(lane, len(self.hand.leases))), pool)

    def _take(self, steps: Sequence[LeasedStep], pool: ThreadPoolExecutor) -> None:
        self.hand.took(steps)
        for step in steps:
            pool.submit(self._load, step)

    def _load(self, step: LeasedStep) -> None:
        try:
            with self.executor.about([step]):
                loaded = self.executor.load(step)
            self.hand.loaded(step, loaded)
        except BaseException as error:
            self.hand.fail(error)

    def _look(self) -> None:
        while not self.hand.await_end_of_feeding(self.look_seconds):
            self.meanwhile()

    # ----------------------------------------------------------------------------------------------------------- keep

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Within, threads keep what leaves the session; at the end all of it is kept."""
        with (
            ThreadPoolExecutor(STORE_THREADS, "keep") as pool,
            _threads(self.hand.end_sampling, keep=partial(self._keep, pool)),
        ):
            yield

    def _keep(self, pool: ThreadPoolExecutor) -> None:
        try:
            while group := self.hand.await_left():
                with self.executor.about([left.step for left in group]):
                    self._keep_through_outages(group, pool)
        except BaseException as error:
            self.hand.fail(error)

    def _keep_through_outages(self, group: Sequence[Left], pool: ThreadPoolExecutor) -> None:
        """What is sampled is offered until it is kept, or a stop comes; meanwhile nothing more is claimed."""
        while True:
            try:
                return self._keep_together(group, pool)
            except (StorageFull, StorageReadOnly, NotAllowed):
                raise
            except InfrastructureError as error:
                if self.hand.stopping:
                    raise
                self.hand.fail_late(error)

    def _keep_together(self, group: Sequence[Left], pool: ThreadPoolExecutor) -> None:
        """What has left one batch since the last commit."""
        batch, unwanted = group[0].batch, [left.step for left in group if left.result is None]
        if unwanted:
            self.executor.give_back(unwanted)
        results: list[StepResult] = [
            replace(left.result, timings=left.timings) for left in group if isinstance(left.result, StepFailed)
        ]
        sampled = [left for left in group if not (left.result is None or isinstance(left.result, StepFailed))]
        if not (results or sampled):
            self.hand.kept(unwanted)
            return
        finished = _spread(pool, self._encoded, sampled)
        self.executor.announce(finished)
        results += _spread(pool, self.executor.put, finished)
        record = None
        if batch is not None:
            record = replace(batch.record, members=tuple(left.member for left in group if left.member is not None))
        report = self.executor.commit(record, group[0].step.lane, results)
        if batch is not None and report.batch_id is not None:
            batch.record = replace(batch.record, id=report.batch_id)
        self.committed(report, self.hand.kept([left.step for left in group]))

    def _encoded(self, left: Left) -> Finished:
        assert left.result is not None
        assert not isinstance(left.result, StepFailed)
        picture = left.result.encode(xmp=self.executor.xmp_of(left.step))
        return self.executor.finished(left.step, replace(picture, timings={**picture.timings, **left.timings}))


@contextmanager
def _threads(end: Callable[[], None], **work: Callable[[], None]) -> Iterator[None]:
    """Threads by name, until `end` has told them that it is over."""
    started = []
    try:
        for name, each in work.items():
            thread = threading.Thread(target=each, name=name)
            thread.start()
            started.append(thread)
        yield
    finally:
        end()
        for thread in started:
            thread.join()


def _spread(pool: ThreadPoolExecutor, work: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
    """`pool.map` whose log lines are about what those of this thread are about."""
    futures = [pool.submit(copy_context().run, work, item) for item in items]
    return [future.result() for future in futures]
