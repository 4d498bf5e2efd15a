"""The beat looks how everything stands, seldom enough to cost the database next to nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from kontext_batch.observability.fleet import FLEET, Fleet
from kontext_batch.ports import Repository

LOOK_SECONDS = 15.0
"""Least time between two looks."""
PAUSE = 50
"""A look is followed by this many times its own length, so that it takes at most 2 % of a connection."""


@dataclass(slots=True)
class Watch:
    """Looks when it is time to; call it as often as you like."""

    repository: Repository
    fleet: Fleet = FLEET
    clock: Callable[[], float] = time.monotonic
    _next: float | None = None

    def tick(self) -> bool:
        """Says whether it looked."""
        started = self.clock()
        if self._next is not None and started < self._next:
            return False
        standing = self.repository.standing()
        took = self.clock() - started
        self.fleet.show(
            steps={(lane, state.value): number for (lane, state), number in standing.steps.items()},
            queue_age=standing.queue_age,
            runs={state.value: number for state, number in standing.runs.items()},
            pending_deliveries=standing.pending_deliveries,
            workers=standing.workers,
            longest_silence=standing.longest_silence,
            sends=standing.sends,
            looked_at=time.time(),
            took=took,
        )
        self._next = self.clock() + max(LOOK_SECONDS, PAUSE * took)
        return True
