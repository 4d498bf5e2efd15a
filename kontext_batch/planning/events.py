"""Events that leave the system: what they are called, who wants them, and when a try that failed is made again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from kontext_batch.planning.backoff import doubling_delay
from kontext_batch.planning.states import RunState

EventName = Literal["run.finished", "run.done", "run.partial", "run.failed", "run.cancelled"]
"""`run.finished` stands for the other four; an event itself bears one of those."""

KEPT_FOR = timedelta(days=7)
"""An event that nobody was there to send for so long is not sent any more."""
MAX_TRIES = 17
"""Of one event to one webhook before it is given up: by then about 30 hours have passed."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 6 * 3600.0


def name_of(state: RunState) -> str:
    """Of the event that a run has come to this final state."""
    return f"run.{state.value}"


def retry_delay(tries: int, *, spread: Callable[[], float] = random.random) -> float | None:
    """Seconds to wait after try number `tries` (1-based) failed, doubling, with jitter; None: give up."""
    if tries >= MAX_TRIES:
        return None
    return doubling_delay(tries, first=FIRST_RETRY_SECONDS, longest=LONGEST_RETRY_SECONDS, spread=spread())


@dataclass(frozen=True, slots=True)
class Webhook:
    """Who wants which events; where it lies and how it is signed is known at the edge alone."""

    name: str
    events: frozenset[str]
    owners: frozenset[str] | None = None
    """Only of runs of these owners; None: of all."""

    def wants(self, event: str, owner: str) -> bool:
        named = event in self.events or (event.startswith("run.") and "run.finished" in self.events)
        return named and (self.owners is None or owner in self.owners)


@dataclass(frozen=True, slots=True)
class ClaimedSend:
    """An event that this process is to send to one webhook; what it records is fenced by `token`."""

    id: int
    token: int
    webhook: str
    tries: int
    """1 for the first."""
    event_id: str
    """The same at each try: receivers know by it what they have had."""
    event: str
    created: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WebhookRow:
    """How the events of one webhook stand."""

    webhook: str
    waiting: int
    delivered: int
    given_up: int
    last_error: str | None
    """Of the newest one that is not delivered."""
