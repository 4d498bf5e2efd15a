"""Questions of the planner and of people."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import Instance
from kontext_batch.planning.states import StepState
from kontext_batch.ports import BatchRecord, InputRecord, ModelRow, Repository, SourceInput
from tests.contract.plans import (
    LANE,
    LEASE,
    artifact_of,
    done,
    failed,
    finish,
    key,
    make_plan,
    new_run,
    settle,
    source,
    submit,
    worker,
)

S = StepState


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def test_it_is_a_repository(repository: SqlRepository) -> None:
    port: Repository = repository
    assert port.runs() == []


def test_states_of_known_keys(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"], "c": []}))
    one, two = repository.claim("w1", limit=2, lease_seconds=LEASE)
    repository.commit(None, [done(one), failed(two)])
    found = repository.step_states([key(name) for name in ("a", "b", "c", "unknown")])
    assert found == {key("a"): S.DONE, key("b"): S.READY, key("c"): S.FAILED}
    assert repository.step_states([]) == {}


def test_inputs_are_remembered_by_their_place(repository: SqlRepository) -> None:
    first = InputRecord("file:///a.png", "1", "aa", 10, 4, 5, "PNG")
    broken = InputRecord("file:///b.png", "1", "bb", 0, 0, 0, "", "0 bytes")
    repository.remember_inputs([first, broken])
    assert repository.inputs(["file:///a.png", "file:///b.png", "file:///c.png"]) == {
        first.uri: first,
        broken.uri: broken,
    }
    changed = InputRecord("file:///a.png", "2", "cc", 11, 4, 5, "JPEG")
    repository.remember_inputs([first, changed])
    assert repository.inputs(["file:///a.png"]) == {changed.uri: changed}
    repository.remember_inputs([])


def test_models_are_remembered_by_their_hash(repository: SqlRepository) -> None:
    dev = ModelRow("dev", "diffusers", "aa", "non-commercial")
    repository.remember_models([dev, ModelRow("tiny", "diffusers", "bb", "Apache-2.0")])
    repository.remember_models([dev])
    assert [each.name for each in repository.models()] == ["dev", "tiny"]


def test_the_newest_run_of_each_instance_is_told(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    submit(repository, make_plan({"a": [], "c": ["a"]}))
    submit(repository, make_plan({"z": []}, recipe="another"))
    finish(repository)
    plan = make_plan({"a2": []}, params={"take": 3})
    instance = Instance("a", (("item", "a"),), 1, key("a2"))
    repository.create_run(new_run(plan), replace(plan, instances=(instance,)))
    found = repository.latest_instances("r")
    assert {(node, axes) for node, axes, _ in found} == {(name, (("item", name),)) for name in "abc"}
    newest = found["a", (("item", "a"),), 1]
    assert (newest.key, newest.take, newest.state) == (key("a2"), 3, S.READY)
    assert newest.inputs == (("image", 0, source("a2").uri, source("a2").sha256),)
    older = found["b", (("item", "b"),), 1]
    assert (older.state, older.inputs, older.params) == (S.DONE, (("image", 0, "", key("a")),), {"name": "b"})
    assert repository.latest_instances("nothing") == {}


def test_one_step_may_stand_at_several_places_of_a_run(repository: SqlRepository) -> None:
    plan = make_plan({"a": []})
    instances = tuple(Instance(node, (), 1, key("a")) for node in ("first", "second"))
    run_id = repository.create_run(new_run(plan), replace(plan, instances=instances))
    assert [row.node for row in repository.run_steps(run_id)] == ["first", "second"]
    assert repository.run(run_id).steps == {S.READY: 1}
    finish(repository)
    assert repository.run(run_id).steps == {S.DONE: 1}


def test_steps_are_found_by_whatever_people_have_at_hand(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["b"]))
    finish(repository)
    [pending] = repository.pending_deliveries()
    settle(repository, pending, path="file:///out/b.v2.png", version=2)
    second = submit(repository, make_plan({"a": []}))
    [b] = repository.find_steps("b")
    assert (b.node, b.axes, b.state, b.attempts) == ("b", (("item", "b"),), S.DONE, 1)
    assert b.artifact is not None
    for text in (key("b"), key("b")[:12], key("b")[3:12], "b.png", "file:///out/b.v2.png", b.artifact.sha256[:10]):
        assert repository.find_steps(text) == [b], text
    assert [row.node for row in repository.find_steps("a")] == ["a"]
    assert [row.node for row in repository.find_steps("a", run_id=second)] == ["a"]
    assert repository.find_steps("b", run_id=second) == []
    assert [row.node for row in repository.find_steps("b", run_id=first)] == ["b"]
    for text in ("", " ", "%", "_", "b2:", "100%"):
        assert repository.find_steps(text) == []
    assert repository.steps_by_id([b.id, 999]) == [b]
    assert repository.steps_by_id([]) == []


def test_the_end_of_a_path_is_given_as_the_file_is_called(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}, deliver=["a"], folder="RX%20100%23"))
    for text in ("RX 100#/a.png", "RX%20100%23/a.png", "/RX 100#/a.png"):
        assert [row.node for row in repository.find_steps(text)] == ["a"], text
    assert repository.find_steps("RX 100/a.png") == []


def test_ancestors_and_sources(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b", "a"], "other": ["a"]}))
    a, b, c, _ = (row.id for row in repository.run_steps(run_id))
    assert repository.ancestors(c) == [(c, a, "reference"), (c, b, "image"), (b, a, "image")]
    assert repository.ancestors(a) == []
    assert repository.step_sources(a) == [SourceInput("image", 0, source("a").uri, source("a").sha256)]
    assert repository.step_sources(b) == []
    assert repository.step_inputs([a, c, 999]) == {
        a: [("image", 0, source("a").uri, source("a").sha256)],
        c: [("image", 0, "", key("b")), ("reference", 0, "", key("a"))],
    }
    assert repository.step_inputs([]) == {}


def test_run_steps_can_be_kept_to_some_states(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"]}))
    assert [row.node for row in repository.run_steps(run_id, states=[S.BLOCKED, S.DONE])] == ["b"]
    assert repository.run_steps(run_id, states=[]) == []
    assert repository.run_steps(999) == []


def test_times_are_told_by_lane(repository: SqlRepository) -> None:
    assert repository.lane_seconds() == {}
    submit(repository, make_plan({"a": [], "b": [], "c": []}, lanes={"c": "operations"}))
    for _ in range(2):
        steps = repository.claim("w1", limit=8, lease_seconds=LEASE)
        record = BatchRecord("w1", steps[0].lane, "cpu", None, "exact", {}, ())
        repository.commit(record, [done(step) for step in steps])
    found = repository.lane_seconds()
    assert set(found) == {LANE, "operations"}
    assert all(0 <= seconds < 60 for seconds in found.values())


def test_pictures_of_steps_are_told(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": []}))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.commit(None, [done(step, latents=True)])
    assert [row.artifact for row in repository.run_steps(run_id)] == [artifact_of(step), None]
