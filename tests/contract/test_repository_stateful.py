"""Everything in any order, on SQLite: the rules of `lineage.verify` hold, and no result counts twice."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import TRANSITIONS, RunState
from kontext_batch.ports import LeasedStep
from tests.contract.database import read_moves, record_moves
from tests.contract.plans import LEASE, artifact_of, done, failed, finish, make_plan, settle, submit, worker

DRAWN = {(old.value, new.value) for old, moves in TRANSITIONS.items() for new in moves}
GRAPH: dict[str, list[str]] = {
    "a": [],
    "b": [],
    "c": ["a"],
    "d": ["a", "b"],
    "e": ["c", "c", "d"],
    "f": ["d"],
    "g": ["e", "f", "a"],
}
WORKERS = ["w1", "w2"]
LOST_RULES = (
    "the pictures that a live step reads from done parents are there",
    "what a running run has still to deliver is there",
)
LEAVES = st.sets(st.sampled_from(sorted(GRAPH)), min_size=1, max_size=3)


def above(names: set[str]) -> dict[str, list[str]]:
    """The part of `GRAPH` that `names` need."""
    needed = set(names)
    for name in reversed(list(GRAPH)):
        if name in needed:
            needed |= set(GRAPH[name])
    return {name: parents for name, parents in GRAPH.items() if name in needed}


class Store(RuleBasedStateMachine):
    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="kontext-stateful-")
        shutil.copy(self.template, f"{self.folder}/db.sqlite")
        url = f"sqlite:///{self.folder}/db.sqlite"
        self.repository, self.engine = SqlRepository(url), open_database(url)
        record_moves(self.engine)
        self.held: dict[int, LeasedStep] = {}
        """What is leased, by step id: the model of the fence."""
        self.stale: list[LeasedStep] = []
        self.owners: dict[int, str] = {}
        self.lost = False
        """An object was lost behind the database's back: readers of it that are under way cannot be helped."""

    def teardown(self) -> None:
        try:
            self._work_off()
        finally:
            self.repository.close()
            close_database(self.engine)
            shutil.rmtree(self.folder)

    def _work_off(self) -> None:
        """Whatever happened, everything can be brought to an end."""
        for run in self.repository.runs():
            if run.state is RunState.PAUSED:
                self.repository.resume_run(run.id)
        self.repository.reconcile(gone_workers=WORKERS)
        self.repository.register_worker(worker("w1"))
        finish(self.repository)
        for pending in self.repository.pending_deliveries():
            settle(self.repository, pending, path=pending.path, version=1)
        self.repository.finish_runs()
        assert all(run.state is not RunState.RUNNING for run in self.repository.runs())
        self.rules_hold()
        assert read_moves(self.engine) <= DRAWN

    @initialize()
    def register(self) -> None:
        for pid, name in enumerate(WORKERS):
            self.repository.register_worker(worker(name, pid=pid))

    @invariant()
    def rules_hold(self) -> None:
        lost = LOST_RULES if self.lost else ()
        assert not [each for each in self.repository.verify() if each.rule not in lost]

    @rule(names=LEAVES, priority=st.integers(0, 2), deliver=st.booleans())
    def submit(self, names: set[str], priority: int, deliver: bool) -> None:
        plan = make_plan(above(names), deliver=sorted(names) if deliver else [])
        submit(self.repository, plan, priority=priority)

    @rule(name=st.sampled_from(WORKERS), limit=st.integers(1, 4))
    def claim(self, name: str, limit: int) -> None:
        claimed = self.repository.claim(name, limit=limit, lease_seconds=LEASE)
        paused = {run.id for run in self.repository.runs() if run.state is RunState.PAUSED}
        assert not {step.run_id for step in claimed} & paused
        for step in claimed:
            assert step.id not in self.held
            assert len(step.parents) == len(GRAPH[step.params["name"]])  # lost or not, each is named
            self.held[step.id], self.owners[step.id] = step, name

    def _let_go(self, step_id: int) -> LeasedStep:
        step = self.held.pop(step_id)
        self.stale.append(step)
        return step

    @precondition(lambda self: self.held)
    @rule(data=st.data(), kind=st.sampled_from(["done", "done", "done", "failed", "later"]), announce=st.booleans())
    def commit(self, data: st.DataObject, kind: str, announce: bool) -> None:
        step_ids = data.draw(st.sets(st.sampled_from(sorted(self.held)), min_size=1))
        steps = [self._let_go(step_id) for step_id in sorted(step_ids)]
        if announce:
            self.repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in steps])
        retry_in = 0.0 if kind == "later" else None
        results = [done(step) if kind == "done" else failed(step, retry_in=retry_in) for step in steps]
        report = self.repository.commit(None, results)
        assert set(report.committed) == step_ids
        assert report.fenced == ()

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), succeeds=st.booleans())
    def commit_late(self, data: st.DataObject, succeeds: bool) -> None:
        step = data.draw(st.sampled_from(self.stale))
        before = self.repository.steps_by_id([step.id])
        self.repository.intend_uploads([(artifact_of(step).uri, step.id, step.token)])
        report = self.repository.commit(None, [done(step) if succeeds else failed(step)])
        assert report.woken == {}
        assert self.repository.steps_by_id([step.id]) == before

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        step = self._let_go(data.draw(st.sampled_from(sorted(self.held))))
        self.repository.release([(step.id, step.token)])

    @rule(name=st.sampled_from(WORKERS), politely=st.booleans())
    def worker_goes(self, name: str, politely: bool) -> None:
        if politely:
            self.repository.retire_worker(name)
        else:
            self.repository.reconcile(gone_workers=[name])
        for step_id in [step_id for step_id in self.held if self.owners[step_id] == name]:
            self._let_go(step_id)
        self.repository.register_worker(worker(name))

    def _some_run(self, data: st.DataObject) -> int | None:
        runs = self.repository.runs()
        return data.draw(st.sampled_from([run.id for run in runs])) if runs else None

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if (run_id := self._some_run(data)) is not None:
            self.repository.cancel_run(run_id)

    @rule(data=st.data(), act=st.sampled_from(["pause", "resume", "prioritize"]), priority=st.integers(0, 2))
    def steer(self, data: st.DataObject, act: str, priority: int) -> None:
        if (run_id := self._some_run(data)) is None:
            return
        if act == "pause":
            self.repository.pause_run(run_id)
        elif act == "resume":
            self.repository.resume_run(run_id)
        else:
            self.repository.prioritize_run(run_id, priority)

    @rule(data=st.data(), names=st.none() | LEAVES)
    def retry(self, data: st.DataObject, names: set[str] | None) -> None:
        if (run_id := self._some_run(data)) is not None:
            keys = (
                None if names is None else [row.key for row in self.repository.run_steps(run_id) if row.node in names]
            )
            self.repository.retry_run(run_id, keys=keys)

    @rule(works=st.booleans())
    def deliver(self, works: bool) -> None:
        for pending in self.repository.pending_deliveries(limit=2):
            if works:
                settle(self.repository, pending, path=pending.path, version=1)
            else:
                settle(self.repository, pending, error="no")

    @rule()
    def finish(self) -> None:
        self.repository.finish_runs()

    @rule(name=st.sampled_from(sorted(GRAPH)))
    def lose_object(self, name: str) -> None:
        for row in self.repository.find_steps(name):
            if row.node == name and row.artifact is not None:
                self.repository.lost_artifact(row.artifact.sha256)
                self.lost = True

    @rule(keep=st.integers(0, 3))
    def collect(self, keep: int) -> None:
        for artifact in self.repository.collectable(keep_bytes=keep * 100):
            assert self.repository.forget_artifact(artifact.sha256, lambda uri: None)
        self.repository.forget_uploads(self.repository.orphaned_uploads(), lambda uri: None)


@pytest.mark.timeout(300)
def test_any_order_of_everything_keeps_the_rules(sqlite_template: Path) -> None:
    class Here(Store):
        template = sqlite_template

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=int(os.environ.get("KONTEXT_TEST_EXAMPLES", "25")),
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
