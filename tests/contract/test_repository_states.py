"""Every arrow of the diagram in `planning.states` is taken, and no other one ever is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import TRANSITIONS, StepState, may_move
from kontext_batch.ports import LeasedStep
from tests.contract.database import read_moves, record_moves
from tests.contract.plans import LEASE, done, failed, finish, held_by, key, make_plan, submit, worker

S = StepState
DRAWN = {(old.value, new.value) for old, moves in TRANSITIONS.items() for new in moves}


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


class Scene:
    """A chain p -> s -> t; `s` is the step that is looked at."""

    def __init__(self, repository: SqlRepository, *, alone: bool) -> None:
        self.repository = repository
        self.graph: dict[str, list[str]] = {"s": []} if alone else {"p": [], "s": ["p"], "t": ["s"]}
        self.run = submit(repository, make_plan(self.graph))
        self.leases: list[LeasedStep] = []

    def claim(self) -> list[LeasedStep]:
        self.leases += self.repository.claim("w1", limit=8, lease_seconds=LEASE)
        return self.leases[-1:]

    def lose(self) -> None:
        self.repository.reconcile(gone_workers=["w1"])
        self.repository.register_worker(worker("w1"))

    def state(self) -> StepState:
        return self.repository.find_steps(key("s"))[0].state

    def collect(self) -> None:
        self.repository.cancel_run(self.run)
        for each in self.repository.collectable(keep_bytes=0):
            self.repository.forget_artifact(each.sha256)

    def collect_and_read(self) -> None:
        self.collect()
        submit(self.repository, make_plan({**self.graph, "u": ["s"]}))

    # ---- ways into each state

    def to_blocked(self) -> None:
        pass

    def to_ready(self) -> None:
        if "p" in self.graph:
            self.repository.commit(None, [done(step) for step in self.claim()])

    def to_leased(self) -> None:
        self.to_ready()
        self.claim()

    def to_done(self) -> None:
        self.to_leased()
        self.repository.commit(None, [done(self.leases[-1])])

    def to_failed(self) -> None:
        self.to_leased()
        self.repository.commit(None, [failed(self.leases[-1])])

    def to_quarantined(self) -> None:
        self.to_ready()
        for _ in range(3):
            self.claim()
            self.lose()

    def to_skipped(self) -> None:
        self.repository.commit(None, [failed(step) for step in self.claim()])

    def to_cancelled(self) -> None:
        self.repository.cancel_run(self.run)


def put_in(repository: SqlRepository, state: StepState, *, alone: bool = False) -> Scene:
    scene = Scene(repository, alone=alone)
    getattr(scene, f"to_{state.value}")()
    assert scene.state() is state
    return scene


Act = Callable[[Scene], object]
ACTS: dict[str, Act] = {
    "claim": lambda scene: scene.claim(),
    "commit done": lambda scene: scene.repository.commit(None, [done(step) for step in scene.leases]),
    "commit failed": lambda scene: scene.repository.commit(None, [failed(step) for step in scene.leases]),
    "commit for later": lambda scene: scene.repository.commit(None, [failed(s, retry_in=9) for s in scene.leases]),
    "release": lambda scene: scene.repository.release(held_by(scene.leases)),
    "retire": lambda scene: scene.repository.retire_worker("w1"),
    "lose": lambda scene: scene.lose(),
    "heartbeat": lambda scene: scene.repository.extend_leases("w1", LEASE, held_by(scene.leases)),
    "cancel": lambda scene: scene.repository.cancel_run(scene.run),
    "retry": lambda scene: scene.repository.retry_run(scene.run),
    "submit": lambda scene: submit(scene.repository, make_plan(scene.graph)),
    "finish": lambda scene: scene.repository.finish_runs(),
    "collect": lambda scene: scene.collect(),
    "collect and read": lambda scene: scene.collect_and_read(),
}  # fmt: skip


@pytest.mark.parametrize("state", list(StepState))
def test_no_act_on_any_state_takes_a_move_that_is_not_drawn(
    repository: SqlRepository, engine: sa.Engine, state: StepState
) -> None:
    record_moves(engine)
    scene = put_in(repository, state)
    for act in ACTS.values():
        act(scene)
        assert not repository.verify()
    assert read_moves(engine) <= DRAWN


def test_every_drawn_move_is_taken(repository: SqlRepository, engine: sa.Engine) -> None:
    record_moves(engine)
    for state, act, alone in [
        (S.DONE, ACTS["collect and read"], False),  # j: to blocked, since its parent is made again too
        (S.DONE, ACTS["collect and read"], True),  # j: to ready
        (S.FAILED, ACTS["retry"], True),  # i
        (S.QUARANTINED, ACTS["retry"], True),
        (S.CANCELLED, ACTS["retry"], True),
        (S.CANCELLED, ACTS["submit"], False),
        (S.SKIPPED, ACTS["submit"], False),
        (S.LEASED, ACTS["lose"], False),  # c
        (S.READY, ACTS["cancel"], False),  # g
    ]:
        scene = put_in(repository, state, alone=alone)
        act(scene)
        assert scene.state() is not state
        _clear(repository, engine)
    for final in (S.FAILED, S.QUARANTINED):  # to blocked: the parent, done meanwhile, was collected
        scene = put_in(repository, final)
        scene.collect()
        repository.retry_run(scene.run)
        assert scene.state() is S.BLOCKED
        _clear(repository, engine)
    # A skipped step becomes ready at once when its failed parent was done by another run meanwhile.
    scene = put_in(repository, S.SKIPPED)
    other = submit(repository, make_plan({"p": []}))
    finish(repository, run_id=other)
    repository.retry_run(scene.run)
    assert scene.state() is S.READY
    assert read_moves(engine) == DRAWN
    assert all(may_move(S(old), S(new)) for old, new in read_moves(engine))
    assert not repository.verify()


def _clear(repository: SqlRepository, engine: sa.Engine) -> None:
    """Forget every run and step, so that the next scene starts anew."""
    for run in repository.runs():
        repository.cancel_run(run.id)
    repository.retire_worker("w1")
    repository.register_worker(worker("w1"))
    with engine.begin() as conn:
        for table in ("deliveries", "run_steps", "edges", "step_sources", "step_params", "step_outputs", "uploads"):
            conn.exec_driver_sql(f"DELETE FROM {table}")
        for table in ("attempts", "steps", "events", "runs"):
            conn.exec_driver_sql(f"DELETE FROM {table}")
