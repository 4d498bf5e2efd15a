"""The states of a step and the moves between them (DESIGN.md section 3).

                      (a) parents done             (b) claim              (d) commit
          blocked ─────────────────────▶ ready ─────────────▶ leased ─────────────────▶ done
             │                            │ ▲                   │ │ │                     │
             │ (f) a parent failed        │ └───────────────────┘ │ └──▶ quarantined      │ (j) asked anew,
             ▼                            │  (c) retry, release,  │  (h) lost too often   │     artifact collected
          skipped                         │      lease ran out    │         │             │
             │          (g) no live run   ▼                       ▼ (e)     │             │
             │              wants it   cancelled                failed      │             │
             │                            │                       │         │             │
             └────────────────────────────┴──────────┬────────────┴─────────┴─────────────┘
                                                     ▼ (i) asked anew
                                              blocked | ready

(g) also leaves from blocked. Whatever is not drawn is refused.
"""

from __future__ import annotations

from enum import StrEnum


class StepState(StrEnum):
    """Where a step stands; the value is what the database holds."""

    BLOCKED = "blocked"
    """Waits for parents (`deps_left` > 0)."""
    READY = "ready"
    """May be claimed, from `not_before` on."""
    LEASED = "leased"
    """A worker holds it until `lease_until`, under `lease_token`."""
    DONE = "done"
    """Its outputs are committed; never computed again while its artifact is kept."""
    FAILED = "failed"
    """The step's own fault; its dependents are skipped."""
    QUARANTINED = "quarantined"
    """It took down too many workers; nobody touches it until it is asked for anew."""
    SKIPPED = "skipped"
    """A parent failed, was skipped or was quarantined."""
    CANCELLED = "cancelled"
    """No live run wants it."""


S = StepState

TRANSITIONS: dict[StepState, frozenset[StepState]] = {
    S.BLOCKED: frozenset({S.READY, S.SKIPPED, S.CANCELLED}),
    S.READY: frozenset({S.LEASED, S.CANCELLED}),
    S.LEASED: frozenset({S.DONE, S.FAILED, S.QUARANTINED, S.READY}),
    S.DONE: frozenset({S.BLOCKED, S.READY}),
    S.FAILED: frozenset({S.BLOCKED, S.READY}),
    S.QUARANTINED: frozenset({S.BLOCKED, S.READY}),
    S.SKIPPED: frozenset({S.BLOCKED, S.READY}),
    S.CANCELLED: frozenset({S.BLOCKED, S.READY}),
}

LIVE = frozenset({S.BLOCKED, S.READY, S.LEASED})
"""States from which a step may still become done without being asked for anew."""

UNSUCCESSFUL = frozenset({S.FAILED, S.QUARANTINED, S.SKIPPED, S.CANCELLED})
"""Final states without an output."""


def may_move(old: StepState, new: StepState) -> bool:
    """Whether the diagram above has an arrow from `old` to `new`."""
    return new in TRANSITIONS[old]


class RunState(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    """Some of its steps are live."""
    PAUSED = "paused"
    """Nothing more is claimed for it until it is resumed; what is leased is finished."""
    DONE = "done"
    """Every step is done and everything wanted is delivered."""
    PARTIAL = "partial"
    """Finished; some steps failed or were skipped, the rest is delivered."""
    FAILED = "failed"
    """Finished; nothing was delivered because of failures."""
    CANCELLED = "cancelled"
    """Stopped by a person."""


OPEN_RUNS = frozenset({RunState.RUNNING, RunState.PAUSED})
"""States of runs that still want their steps."""
