"""What replays, verification and explanations ask of a database."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import StepState
from kontext_batch.ports import Act, SourceInput, StepDone, StepOutput
from tests.contract.plans import artifact_of, claim, done, finish, key, make_plan, new_run, source, submit, worker

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def test_a_stored_step_has_all_that_it_read_and_made(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a", "a"], "c": ["b"]}))
    [first] = claim(repository)
    repository.commit(None, [done(first, latents=True)])
    ids = {row.key: row.id for row in repository.run_steps(run_id)}
    found = repository.stored_steps([*ids.values(), 999])
    assert set(found) == set(ids.values())
    a, b, c = (found[ids[key(name)]] for name in "abc")
    assert (a.key, a.operation, a.state, a.params["name"]) == (key("a"), "edit", StepState.DONE, "a")
    assert a.sources == (SourceInput("image", 0, source("a").uri, source("a").sha256),)
    assert {slot: (each.artifact, each.collected) for slot, each in a.outputs.items()} == {
        slot: (artifact_of(first, slot=slot), None) for slot in ("image", "latents")
    }
    assert a.recipes == ("r.yaml",)
    assert [(each.role, each.position, each.step_id, each.key) for each in b.parents] == [
        ("image", 0, a.id, key("a")),
        ("reference", 0, a.id, key("a")),
    ]
    assert b.parents[0].outputs == a.outputs
    assert (b.sources, b.outputs, c.parents[0].state, c.parents[0].outputs) == ((), {}, StepState.READY, {})
    repository.lost_artifact(artifact_of(first).sha256)
    lost = repository.stored_steps([a.id])[a.id].outputs["image"].collected
    assert lost is not None
    assert abs(lost - datetime.now(UTC)) < timedelta(days=1)
    assert repository.stored_steps([]) == {}


def test_artifacts_are_read_in_order_and_noted(repository: SqlRepository) -> None:
    submit(repository, make_plan({name: [] for name in "abcd"}))
    steps = claim(repository)
    repository.commit(None, [done(step) for step in steps])
    hashes = sorted(artifact_of(step).sha256 for step in steps)
    repository.note(Act("ann", "cli", "verify"), "verification")
    since = repository.audit(subject="verification", limit=1)[0].at

    def unread(after: str = "", limit: int = 10) -> list[str]:
        return [each.sha256 for each in repository.unread_artifacts(since=since, after=after, limit=limit)]

    assert unread() == hashes
    assert unread(hashes[0], 2) == hashes[1:3]
    assert repository.unread_artifacts_size(since=since) == (4, 400)
    repository.note_read_artifacts([(hashes[2], "missing: \0 nothing"), (hashes[0], None), ("0" * 64, None)])
    assert repository.unread_artifacts_size(since=LONG_AGO) == (2, 200)
    assert repository.unread_artifacts_size(since=datetime.now(UTC) + timedelta(days=1)) == (4, 400)
    [damaged] = repository.damaged_artifacts()
    assert (damaged.artifact.sha256, damaged.problem) == (hashes[2], "missing: � nothing")
    assert damaged.steps == tuple(step.id for step in steps if artifact_of(step).sha256 == hashes[2])
    assert abs(damaged.found - datetime.now(UTC)) < timedelta(days=1)
    repository.note_read_artifacts([(hashes[2], None)])
    repository.note_read_artifacts([])
    assert repository.damaged_artifacts() == []


def test_what_was_collected_is_neither_read_nor_blamed_nor_has_an_old_problem(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    [step] = claim(repository)
    repository.commit(None, [done(step)])
    sha256 = artifact_of(step).sha256
    repository.note_read_artifacts([(sha256, "missing: x")])
    assert repository.is_kept(sha256)
    repository.lost_artifact(sha256)
    assert not repository.is_kept(sha256)
    assert repository.damaged_artifacts() == []
    repository.note_read_artifacts([(sha256, "missing: y")])
    assert repository.unread_artifacts_size(since=LONG_AGO) == (0, 0)
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    [again] = claim(repository)
    repository.commit(None, [StepDone(again.id, again.token, (StepOutput("image", artifact_of(step)),), {})])
    assert repository.is_kept(sha256)
    assert repository.damaged_artifacts() == []
    assert repository.unread_artifacts_size(since=LONG_AGO) == (1, 100)


def test_an_artifact_that_two_steps_make_keeps_its_problem(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    one, other = claim(repository)
    repository.commit(None, [done(one)])
    repository.note_read_artifacts([(artifact_of(one).sha256, "changed: x")])
    repository.commit(None, [StepDone(other.id, other.token, (StepOutput("image", artifact_of(one)),), {})])
    [damaged] = repository.damaged_artifacts()
    assert damaged.steps == (one.id, other.id)


def test_uses_of_a_step_and_the_instances_around_them(repository: SqlRepository) -> None:
    plan = make_plan({"a": []})
    changed = make_plan({"a2": []})
    renamed = replace(changed, instances=(replace(changed.instances[0], node="a", axes=plan.instances[0].axes),))
    first = submit(repository, plan)
    finish(repository)
    second = submit(repository, plan)
    elsewhere = repository.create_run(new_run(make_plan({"a": []}, recipe="other")), plan)
    third = submit(repository, renamed)
    step_id = repository.run_steps(first)[0].id
    uses = repository.step_uses(step_id)
    assert [(each.run_id, each.recipe, each.cached, each.node, each.axes) for each in uses] == [
        (first, "r", False, "a", (("item", "a"),)),
        (second, "r", True, "a", (("item", "a"),)),
        (elsewhere, "other", True, "a", (("item", "a"),)),
    ]
    assert (uses[0].file, uses[0].line) == ("r.yaml", 3)
    assert repository.nearest_instance(uses[0], later=False) is None
    found = repository.nearest_instance(uses[1], later=False)
    assert found is not None
    assert (found[0], found[1], found[2].key, found[2].inputs) == (
        first,
        step_id,
        key("a"),
        (("image", 0, source("a").uri, source("a").sha256),),
    )
    after = repository.nearest_instance(uses[1], later=True)
    assert after is not None
    assert after[:2] == (third, repository.run_steps(third)[0].id)
    assert repository.nearest_instance(uses[2], later=True) is None
    assert repository.step_uses(999) == []


def test_attempts_say_for_which_time_the_step_was_asked_for(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    [step] = claim(repository)
    repository.commit(None, [done(step)])
    repository.lost_artifact(artifact_of(step).sha256)
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    finish(repository)
    assert [each.asked for each in repository.attempts(step.id)] == [1, 2]
