"""The table of moves says what the diagram draws."""

from __future__ import annotations

import pytest

from kontext_batch.planning.states import LIVE, TRANSITIONS, UNSUCCESSFUL, StepState, may_move

S = StepState
ARROWS = {
    "a": {(S.BLOCKED, S.READY)},
    "b": {(S.READY, S.LEASED)},
    "c": {(S.LEASED, S.READY)},
    "d": {(S.LEASED, S.DONE)},
    "e": {(S.LEASED, S.FAILED)},
    "f": {(S.BLOCKED, S.SKIPPED)},
    "g": {(S.BLOCKED, S.CANCELLED), (S.READY, S.CANCELLED)},
    "h": {(S.LEASED, S.QUARANTINED)},
    "i": {
        (old, new)
        for old in (S.FAILED, S.QUARANTINED, S.SKIPPED, S.CANCELLED)
        for new in (S.BLOCKED, S.READY)
    },
    "j": {(S.DONE, S.BLOCKED), (S.DONE, S.READY)},
}  # fmt: skip
DRAWN = set().union(*ARROWS.values())


@pytest.mark.parametrize("old", list(StepState))
@pytest.mark.parametrize("new", list(StepState))
def test_exactly_the_drawn_moves_are_allowed(old: StepState, new: StepState) -> None:
    assert may_move(old, new) == ((old, new) in DRAWN)


def test_every_state_has_moves_and_belongs_to_one_kind() -> None:
    assert set(TRANSITIONS) == set(StepState)
    assert LIVE | UNSUCCESSFUL | {S.DONE} == set(StepState)
    assert not LIVE & UNSUCCESSFUL
    assert S.DONE not in LIVE | UNSUCCESSFUL


def test_every_state_can_be_reached_from_a_new_step() -> None:
    reached = {S.BLOCKED, S.READY}
    while grown := {new for old in reached for new in TRANSITIONS[old]} - reached:
        reached |= grown
    assert reached == set(StepState)
