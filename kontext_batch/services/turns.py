"""Whose steps a worker takes next: priority first, then fair turns of owners and of runs, within caps.

Deciding alone: the repository says what is ready and how much is leased, and leases what is chosen here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kontext_batch.planning.plan import OPERATIONS_LANE
from kontext_batch.ports import LeasedStep, Ready, Share

PATIENCE_SECONDS = 30.0
"""How long a worker stays with the lane whose model it has loaded while others of equal priority wait."""


@dataclass(slots=True)
class Turns:
    """One worker's memory of whom it has served. Called with what is ready, it says what may be taken, best first."""

    lanes: Callable[[str], bool] | None = None
    """Which lanes this worker serves; None: all."""
    run_cap: int | None = None
    """Most steps of one run that are leased at once, over all workers."""
    owner_cap: int | None = None
    backlogged: frozenset[int] = frozenset()
    """Runs of which too much waits to be finished or delivered: of their steps those of Pillow alone are taken."""
    patience: float = PATIENCE_SECONDS
    clock: Callable[[], float] = time.monotonic
    _lane: str | None = None
    """Whose model is loaded."""
    _since: float = 0.0
    _turn: int = 0
    _served: dict[tuple[str, str | int], int] = field(default_factory=dict)
    """("lane", name), ("owner", name) or ("run", id) -> the turn in which it was last served."""
    _owners: dict[int, str] = field(default_factory=dict)

    def serves(self, lane: str) -> bool:
        """Whether this worker takes steps of that lane."""
        return self.lanes is None or self.lanes(lane)

    @property
    def lane(self) -> str | None:
        """The lane that was last taken from."""
        return self._lane

    @property
    def capped(self) -> bool:
        """Whether what is leased must not change between looking and claiming."""
        return self.run_cap is not None or self.owner_cap is not None

    def __call__(self, ready: Sequence[Ready]) -> list[Share]:
        self._owners = {each.run_id: each.owner for each in ready}
        if len(self._served) > 4 * len(ready) + 1000:  # of runs and lanes that are over
            known: set[tuple[str, str | int]] = {("owner", each.owner) for each in ready}
            known |= {("lane", each.lane) for each in ready}
            known |= {("run", each.run_id) for each in ready}
            self._served = {name: turn for name, turn in self._served.items() if name in known}
        served = [
            each
            for each in ready
            if self.serves(each.lane) and (each.lane == OPERATIONS_LANE or each.run_id not in self.backlogged)
        ]
        return [
            Share(
                each.run_id,
                each.lane,
                each.owner,
                limit=None if self.run_cap is None else max(0, self.run_cap - each.leased),
                owner_limit=None if self.owner_cap is None else max(0, self.owner_cap - each.owner_leased),
            )
            for each in sorted(served, key=self._order)
        ]

    def took(self, steps: Sequence[LeasedStep]) -> None:
        """Remember what was leased: whoever was served waits for the others' turns."""
        self._turn += 1
        for step in steps:
            if step.lane != self._lane:
                self._lane, self._since = step.lane, self.clock()
            names = ("lane", step.lane), ("run", step.run_id), ("owner", self._owners.get(step.run_id, ""))
            self._served.update(dict.fromkeys(names, self._turn))

    def _order(self, each: Ready) -> tuple[float, ...]:
        stays = each.lane == self._lane and self.clock() - self._since < self.patience
        return (
            -each.priority,
            0 if stays else 1,
            self._served.get(("lane", each.lane), 0),
            each.owner_leased,
            self._served.get(("owner", each.owner), 0),
            each.leased,
            self._served.get(("run", each.run_id), 0),
            each.run_id,
        )
