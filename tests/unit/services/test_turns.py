"""Fair turns: who is next, decided without a database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kontext_batch.ports import LeasedStep, Ready, Share
from kontext_batch.services.turns import Turns

LANE, OTHER = "edit/a", "edit/b"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ready(run_id: int, owner: str = "one", *, lane: str = LANE, priority: int = 0, leased: int = 0) -> Ready:
    return Ready(run_id, owner, priority, lane, leased, leased)


def leased(share: Share, count: int = 1) -> list[LeasedStep]:
    return [LeasedStep(n, share.run_id, "k", "edit", {}, share.lane, 1, 1, 0, (), ()) for n in range(count)]


def serve(turns: Turns, waiting: Sequence[Ready], times: int) -> list[int]:
    """The runs that are served, when each share is a batch of its own."""
    order = []
    for _ in range(times):
        share = turns(waiting)[0]
        turns.took(leased(share))
        order.append(share.run_id)
    return order


def test_priority_comes_before_everything() -> None:
    turns = Turns()
    turns.took(leased(Share(1, LANE)))
    ranked = turns([ready(1), ready(2, lane=OTHER, priority=1)])
    assert [share.run_id for share in ranked] == [2, 1]


def test_owners_take_turns_however_many_runs_they_have() -> None:
    waiting = [*(ready(number, "big") for number in range(1, 9)), ready(9, "small")]
    served = serve(Turns(), waiting, 8)
    assert Counter(served)[9] == 4
    assert len(set(served)) == 5  # and so do the runs of one owner


def test_who_has_less_leased_by_all_workers_comes_first() -> None:
    ranked = Turns()([ready(1, "one", leased=8), ready(2, "two", leased=3), ready(3, "three", leased=5)])
    assert [share.run_id for share in ranked] == [2, 3, 1]


def test_a_loaded_model_is_kept_for_a_while_and_not_for_ever() -> None:
    clock = Clock()
    turns = Turns(patience=30, clock=clock)
    waiting = [ready(1, "one"), ready(2, "two", lane=OTHER)]
    assert serve(turns, waiting, 3) == [1, 1, 1]
    clock.now = 29
    assert serve(turns, waiting, 1) == [1]
    clock.now = 30
    assert serve(turns, waiting, 3) == [2, 2, 2]
    clock.now = 60
    assert serve(turns, waiting, 1) == [1]
    assert serve(turns, [waiting[1]], 1) == [2]  # nothing else is left: no reason to wait


def test_lanes_that_are_not_served_are_left_out() -> None:
    turns = Turns(lanes=lambda lane: lane == OTHER)
    assert turns([ready(1), ready(2, lane=OTHER)]) == [Share(2, OTHER, "one")]


def test_caps_leave_what_is_free_under_them() -> None:
    turns = Turns(run_cap=8, owner_cap=10)
    assert turns.capped
    assert turns([Ready(1, "one", 0, LANE, 3, 9), Ready(2, "two", 0, LANE, 3, 4), Ready(3, "one", 0, LANE, 9, 12)]) == [
        Share(2, LANE, "two", limit=5, owner_limit=6),
        Share(1, LANE, "one", limit=5, owner_limit=1),
        Share(3, LANE, "one", limit=0, owner_limit=0),
    ]
    assert not Turns().capped
