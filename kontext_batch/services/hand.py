"""What the stages of a pipeline hand to one another, and when each waits: it decides, and computes nothing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from kontext_batch.errors import KontextBatchError
from kontext_batch.ports import BatchMember, BatchRecord, LeasedStep, SampledPicture, StepFailed
from kontext_batch.services.execute import Loaded
from kontext_batch.services.leases import Leases

DRY_SECONDS = 1.0
"""Between two claims when nothing was ready, and no commit has changed that."""
POLL_SECONDS = 0.1
"""How long it may take until a stop is seen while there is nothing to sample."""


class Stopped(Exception):
    """The worker was told to give back what it has in hand."""


@dataclass(slots=True)
class Batch:
    """A session, for the lineage."""

    record: BatchRecord
    clock: int = 0
    """Denoise steps taken."""
    joined: set[int] = field(default_factory=set)
    """Ids of all steps that were in."""


@dataclass(frozen=True, slots=True)
class Left:
    """A step on its way out."""

    step: LeasedStep
    result: SampledPicture | StepFailed | None
    """None: nobody wants it, so that it is given back."""
    timings: Mapping[str, float] = field(default_factory=dict)
    batch: Batch | None = None
    """None when it took part in no denoise step."""
    member: BatchMember | None = None


class Hand:
    """What is in hand of one lane, from the claim to the commit.

        claimed -> prepared -> in the session -> left -> committed

    No more than `rows` steps are claimed or prepared beside those that stay in the session, and no more than three
    times `rows` in all: that bounds the memory. All waiting is done here, under one lock.
    """

    def __init__(self, leases: Leases, rows: int, stopping: threading.Event) -> None:
        """`rows`: slots of a session. `stopping`: set to give back what is in hand."""
        self.leases, self.rows, self._stopping = leases, rows, stopping
        self._changed = threading.Condition()
        self._fetching = 0
        self._prepared: deque[Loaded] = deque()
        self._staying = 0
        self._left: list[Left] = []
        self._dry, self._look_at = False, 0.0
        self._news = False
        self._fed = self._sampled = False
        self._fault: BaseException | None = None
        self._late_fault: KontextBatchError | None = None

    # ----------------------------------------------------------------------------------------------------------- feed

    @property
    def room(self) -> int:
        """How many steps more may be claimed."""
        waiting, held, limit = self._fetching + len(self._prepared), len(self.leases), self.leases.batch_limit
        room = min(self.rows - self._staying - waiting, 3 * self.rows - held)
        return max(0, room if limit is None else min(room, limit - held))

    def await_room(self) -> int:
        """How many steps to claim now; 0 when no more are to be claimed."""
        with self._changed:
            while not self._fed:
                pause = self._look_at - time.monotonic() if self._dry else 0.0
                if pause <= 0 and (room := self.room):
                    self._dry = self._news = False
                    return room
                self._changed.wait(pause if pause > 0 else None)
        return 0

    def took(self, steps: Sequence[LeasedStep]) -> None:
        """These were claimed. When they are none, the next claim waits for a commit, or for `DRY_SECONDS`."""
        with self._changed:
            self._fetching += len(steps)
            self._dry = not steps and not self._news
            self._look_at = time.monotonic() + DRY_SECONDS
            self._changed.notify_all()

    def loaded(self, step: LeasedStep, loaded: Loaded | StepFailed) -> None:
        """One of them is prepared, or will not be."""
        with self._changed:
            self._fetching -= 1
            if isinstance(loaded, StepFailed):
                self._left.append(Left(step, loaded))
            else:
                self._prepared.append(loaded)
            self._changed.notify_all()

    def await_end_of_feeding(self, seconds: float) -> bool:
        """Whether, within so long, nothing more is to be claimed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._fed, seconds)

    def end_feeding(self) -> None:
        with self._changed:
            self._fed = True
            self._changed.notify_all()

    # --------------------------------------------------------------------------------------------------------- sample

    def await_prepared(self) -> LeasedStep | None:
        """The step that is next to be sampled; None when none will come. Raises as `heed` does."""
        with self._changed:
            while True:
                self.heed()
                if self._prepared:
                    return self._prepared[0].step
                if (self._dry or self._fed) and not len(self.leases):
                    return None
                self._changed.wait(POLL_SECONDS)

    def next(self, *, but: Collection[int]) -> Loaded | None:
        """It, which stays until `stays` tells otherwise; None when none is prepared, or when its id is one of `but`."""
        with self._changed:
            if not self._prepared or self._prepared[0].step.id in but:
                return None
            self._staying += 1
            return self._prepared.popleft()

    def refused(self) -> list[LeasedStep]:
        """All that are prepared, and not to be sampled."""
        with self._changed:
            steps = [loaded.step for loaded in self._prepared]
            self._prepared.clear()
        return steps

    def has_slots(self, rows: int) -> None:
        """A session has so many slots: fewer than were thought, where its device is short of memory."""
        with self._changed:
            self.rows = min(self.rows, rows)

    def stays(self, rows: int) -> None:
        """So many rows of the session will not leave it soon."""
        with self._changed:
            if rows != self._staying:
                self._staying = rows
                self._changed.notify_all()

    def hand_on(self, left: Sequence[Left]) -> None:
        """What leaves together is kept together."""
        with self._changed:
            self._left.extend(left)
            self._changed.notify_all()

    def end_sampling(self) -> None:
        """Nothing more will be handed on."""
        with self._changed:
            self._sampled = True
            self._changed.notify_all()

    # ----------------------------------------------------------------------------------------------------------- keep

    def await_left(self) -> list[Left]:
        """All of one batch that waits to be kept; nothing when no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._sampled)
            group = [left for left in self._left if left.batch is self._left[0].batch]
            self._left = [left for left in self._left if left.batch is not group[0].batch]
        return group

    def kept(self, steps: Sequence[LeasedStep]) -> int:
        """They are committed, or given back: something else may be ready. Returns for how many there is room."""
        self.leases.drop(steps)
        with self._changed:
            self._dry, self._news = False, True
            self._changed.notify_all()
            return self.room

    # --------------------------------------------------------------------------------------------------------- faults

    def fail(self, error: BaseException) -> None:
        """Let the thread that samples raise it at once."""
        with self._changed:
            self._fault = self._fault or error
            self._changed.notify_all()

    def fail_late(self, error: KontextBatchError) -> None:
        """Let it be raised when all that is in hand is done, to which nothing is added."""
        with self._changed:
            self._late_fault = error
            self._fed = True
            self._changed.notify_all()

    @property
    def stopping(self) -> bool:
        """Whether what is in hand is to be given back."""
        return self._stopping.is_set()

    def heed(self) -> None:
        """Raise what another stage has met, or `Stopped`."""
        if self._fault is not None:
            raise self._fault
        if self.stopping:
            raise Stopped

    def faults(self) -> list[BaseException]:
        """The worst first."""
        return [fault for fault in (self._fault, self._late_fault) if fault is not None]
