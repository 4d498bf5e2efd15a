"""Runs: submitted, shared, asked for anew, retried, cancelled, finished."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import ImageInfo
from kontext_batch.planning.states import RunState, StepState
from tests.contract.plans import (
    LEASE,
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
DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c", "b"]}


@pytest.fixture(autouse=True)
def _worker(repository: SqlRepository) -> None:
    repository.register_worker(worker())


def states(repository: SqlRepository, run_id: int) -> dict[str, str]:
    return {row.node: row.state.value for row in repository.run_steps(run_id)}


def fail_first(repository: SqlRepository, *, name: str | None = None) -> None:
    """Claim what is ready; `name` (else all of it) fails, the rest is done."""
    leased = repository.claim("w1", limit=8, lease_seconds=LEASE)
    repository.commit(None, [failed(step) if name in (None, step.params["name"]) else done(step) for step in leased])


def collect_all(repository: SqlRepository) -> int:
    return sum(repository.forget_artifact(each.sha256) for each in repository.collectable(keep_bytes=0))


def deliver_all(repository: SqlRepository) -> None:
    for each in repository.pending_deliveries():
        settle(repository, each, path=each.path, version=1)


def accounts(engine: sa.Engine) -> dict[str, int]:
    """The run on whose account each step is, by the step's name."""
    with engine.begin() as conn:
        rows = conn.exec_driver_sql("SELECT node, steps.run_id FROM steps JOIN run_steps ON step_id = id")
        return {row[0]: row[1] for row in rows}


def test_a_new_run_waits_where_it_reads(repository: SqlRepository, engine: sa.Engine) -> None:
    run_id = submit(repository, make_plan(DIAMOND, deliver=["d"]))
    assert states(repository, run_id) == {"a": "ready", "b": "blocked", "c": "blocked", "d": "blocked"}
    with engine.begin() as conn:
        waits = conn.exec_driver_sql("SELECT deps_left FROM steps ORDER BY id").scalars().all()
    assert waits == [0, 1, 1, 2], "parents count, not edges"
    summary = repository.run(run_id)
    assert (summary.state, summary.steps, summary.cached) == (RunState.RUNNING, {S.READY: 1, S.BLOCKED: 3}, 0)
    assert (summary.deliveries, summary.delivered, summary.failed_deliveries) == (1, 0, 0)
    assert summary.created.tzinfo is not None
    assert repository.recipe_text(run_id) == "text"
    assert not repository.verify()


def test_a_run_is_worked_off_delivered_and_done(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan(DIAMOND, deliver=["d"]))
    assert finish(repository) == 4
    assert repository.finish_runs() == [], "something is left to deliver"
    deliver_all(repository)
    assert repository.finish_runs() == [(run_id, RunState.DONE)]
    assert repository.finish_runs() == []
    summary = repository.run(run_id)
    assert (summary.state, summary.delivered) == (RunState.DONE, 1)
    assert summary.finished is not None
    assert summary.finished >= summary.created
    assert not repository.verify()


def test_a_second_run_finds_everything_cached(repository: SqlRepository) -> None:
    plan = make_plan(DIAMOND, deliver=["d"])
    submit(repository, plan)
    finish(repository)
    again = submit(repository, replace(plan, deliveries=()))
    summary = repository.run(again)
    assert (summary.cached, summary.steps) == (4, {S.DONE: 4})
    assert repository.claim("w1", limit=8, lease_seconds=LEASE, run_id=again) == []
    assert (again, RunState.DONE) in repository.finish_runs()


def test_a_shared_live_step_goes_on_the_account_of_the_higher_priority(
    repository: SqlRepository, engine: sa.Engine
) -> None:
    submit(repository, make_plan({"x": []}), priority=5)
    submit(repository, make_plan(DIAMOND), priority=1)
    second = submit(repository, make_plan({"a": [], "b": ["a"], "e": ["b"]}), priority=9)
    assert repository.run(second).cached == 0
    assert accounts(engine) == {"a": 3, "b": 3, "c": 2, "d": 2, "e": 3, "x": 1}
    [leased] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    assert leased.params["name"] == "a"
    submit(repository, make_plan(DIAMOND), priority=0)
    assert repository.find_steps("x")[0].state is S.READY
    assert not repository.verify()


@pytest.mark.parametrize("priority", [1, 5])
def test_a_step_stays_on_the_older_account_unless_the_newer_has_a_higher_priority(
    repository: SqlRepository, engine: sa.Engine, priority: int
) -> None:
    submit(repository, make_plan({"a": []}), priority=5)
    submit(repository, make_plan({"a": []}), priority=priority)
    assert accounts(engine) == {"a": 1}


def test_a_failed_chain_is_put_back_by_a_new_run(repository: SqlRepository) -> None:
    first = submit(repository, make_plan(DIAMOND))
    fail_first(repository)
    assert states(repository, first) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "skipped"}
    assert repository.finish_runs() == [(first, RunState.FAILED)]
    second = submit(repository, make_plan({"a": [], "b": ["a"]}))
    assert states(repository, second) == {"a": "ready", "b": "blocked"}
    assert states(repository, first) == {"a": "ready", "b": "blocked", "c": "skipped", "d": "skipped"}
    assert repository.find_steps("a")[0].error is None
    assert not repository.verify()
    assert finish(repository) == 2
    third = submit(repository, make_plan(DIAMOND))
    assert states(repository, third) == {"a": "done", "b": "done", "c": "ready", "d": "blocked"}
    assert repository.run(third).cached == 2
    assert finish(repository) == 2
    assert not repository.verify()


def test_what_is_put_back_starts_from_zero(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}))
    fail_first(repository)
    submit(repository, make_plan({"a": []}))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    assert (step.attempt, step.losses, step.token) == (1, 0, 2)
    repository.commit(None, [done(step)])
    assert [(row.number, row.outcome) for row in repository.attempts(step.id)] == [(1, "error"), (1, "ok")]
    assert repository.run(run_id).steps == {S.DONE: 1}


def test_a_step_that_is_asked_for_anew_is_read_as_it_is_written_now(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}, params={"model": "old"}))
    fail_first(repository)
    plan = make_plan({"a": []}, params={"model": "new"}, lanes={"a": "edit/new"})
    moved = replace(plan.steps[0].inputs[0], source=replace(source("a"), uri="file:///moved/a.png"))
    repository.create_run(new_run(plan), replace(plan, steps=(replace(plan.steps[0], inputs=(moved,)),)))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    assert step.params["model"] == "new"
    assert [each.uri for each in step.sources] == ["file:///moved/a.png"]


def test_a_live_step_is_read_from_where_its_picture_lies_now(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    plan = make_plan({"a": []})
    image: ImageInfo = replace(source("a"), uri="file:///moved/a.png")
    moved = replace(plan.steps[0].inputs[0], source=image)
    repository.create_run(new_run(plan), replace(plan, steps=(replace(plan.steps[0], inputs=(moved,)),)))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    assert [each.uri for each in step.sources] == ["file:///moved/a.png"]


def test_collected_pictures_stay_away_while_nobody_needs_them(repository: SqlRepository) -> None:
    plan = make_plan({"a": [], "b": ["a"]})
    submit(repository, plan)
    finish(repository)
    repository.finish_runs()
    assert collect_all(repository) == 2
    assert repository.step_states([key("a"), key("b"), key("unknown")]) == {}
    again = submit(repository, plan)
    assert states(repository, again) == {"a": "done", "b": "done"}
    assert repository.run(again).cached == 2


def test_a_collected_picture_is_made_again_for_a_new_reader(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    finish(repository)
    repository.finish_runs()
    collect_all(repository)
    again = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}))
    assert states(repository, again) == {"a": "ready", "b": "blocked", "c": "blocked"}
    assert repository.run(again).cached == 0
    assert not repository.verify()
    assert finish(repository) == 3
    assert repository.step_states([key("a")]) == {key("a"): S.DONE}
    assert not repository.verify()


def test_only_the_collected_part_of_a_chain_is_made_again(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    finish(repository)
    repository.finish_runs()
    [first, _] = repository.collectable(keep_bytes=0)
    made_by_b = repository.find_steps("b")[0].artifact
    assert made_by_b is not None
    assert repository.forget_artifact(made_by_b.sha256)
    again = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}))
    assert states(repository, again) == {"a": "done", "b": "ready", "c": "blocked"}
    assert first.sha256 != made_by_b.sha256
    assert not repository.verify()


def test_a_collected_picture_is_made_again_for_a_delivery(repository: SqlRepository) -> None:
    plan = make_plan({"a": [], "b": ["a"]}, deliver=["b"])
    submit(repository, plan)
    finish(repository)
    deliver_all(repository)
    repository.finish_runs()
    collect_all(repository)
    again = submit(repository, plan)
    assert states(repository, again) == {"a": "ready", "b": "blocked"}
    finish(repository)
    assert [each.path for each in repository.pending_deliveries(again)] == ["file:///out/b.png"]
    assert not repository.verify()


def test_a_lost_picture_is_made_again_and_its_live_readers_wait_for_it(repository: SqlRepository) -> None:
    graph = {"a": [], "x": [], "b": ["a"], "c": ["a"], "d": ["a", "x"], "e": ["b", "a"]}
    run_id = submit(repository, make_plan(graph))
    first, other = repository.claim("w1", limit=2, lease_seconds=LEASE)
    repository.commit(None, [done(first)])
    repository.lost_artifact(done(first).outputs[0].artifact.sha256)
    [reader] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.commit(None, [failed(reader)])
    assert states(repository, run_id) == {
        "a": "done", "x": "leased", "b": "failed", "c": "ready", "d": "blocked", "e": "skipped"
    }  # fmt: skip
    again = submit(repository, make_plan(graph))
    assert states(repository, again) == {
        "a": "ready", "x": "leased", "b": "blocked", "c": "blocked", "d": "blocked", "e": "blocked"
    }  # fmt: skip
    assert not repository.verify()
    repository.commit(None, [done(other)])
    assert finish(repository) == 5
    assert repository.run(run_id).steps == {S.DONE: 6}
    assert not repository.verify()


def test_a_lease_whose_picture_is_being_made_again_comes_back_blocked(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"], "c": ["a"]}))
    [first] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.commit(None, [done(first)])
    one, two = repository.claim("w1", limit=2, lease_seconds=LEASE)
    repository.lost_artifact(done(first).outputs[0].artifact.sha256)
    again = submit(repository, make_plan({"a": [], "d": ["a"]}))
    assert states(repository, again) == {"a": "ready", "d": "blocked"}
    assert not repository.verify()
    repository.release([(one.id, one.token)])
    repository.commit(None, [failed(two, retry_in=0.0)])
    assert [row.state for row in repository.steps_by_id([one.id, two.id])] == [S.BLOCKED, S.BLOCKED]
    assert not repository.verify()
    assert finish(repository) == 4
    assert not repository.verify()


def test_retry_puts_back_what_did_not_succeed(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "x": []}, deliver=["b", "x"]))
    fail_first(repository, name="a")
    deliver_all(repository)
    assert repository.finish_runs() == [(run_id, RunState.PARTIAL)]
    assert repository.retry_run(run_id) == 2
    summary = repository.run(run_id)
    assert (summary.state, summary.finished) == (RunState.RUNNING, None)
    assert states(repository, run_id) == {"a": "ready", "b": "blocked", "x": "done"}
    assert not repository.verify()
    finish(repository)
    deliver_all(repository)
    assert repository.finish_runs() == [(run_id, RunState.DONE)]
    assert repository.retry_run(run_id) == 0
    assert repository.run(run_id).state is RunState.DONE


def test_retry_of_keys_takes_their_readers_and_what_they_need(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"], "x": [], "y": ["x"]}))
    fail_first(repository)
    assert repository.retry_run(run_id, keys=[key("b")]) == 3
    assert states(repository, run_id) == {
        "a": "ready",
        "b": "blocked",
        "c": "blocked",
        "x": "failed",
        "y": "skipped",
    }
    assert not repository.verify()


def test_retry_delivers_what_could_not_be_delivered(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": []}, deliver=["a", "b"]))
    finish(repository)
    first, second = repository.pending_deliveries()
    settle(repository, first, path=first.path, version=1)
    settle(repository, second, error="the folder is read-only")
    assert repository.failed_deliveries(run_id) == [(second.path, "the folder is read-only")]
    assert repository.finish_runs() == [(run_id, RunState.PARTIAL)]
    assert repository.run(run_id).failed_deliveries == 1
    assert repository.retry_run(run_id) == 0
    assert repository.run(run_id).state is RunState.RUNNING
    assert [each.id for each in repository.pending_deliveries()] == [second.id]


def test_retry_makes_again_what_was_collected_before_it_arrived(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}, deliver=["a"]))
    finish(repository)
    repository.cancel_run(run_id)
    assert repository.pending_deliveries() == [], "nobody waits for it"
    assert collect_all(repository) == 1
    assert repository.retry_run(run_id) == 1
    assert states(repository, run_id) == {"a": "ready"}
    assert not repository.verify()
    finish(repository)
    assert len(repository.pending_deliveries()) == 1


def test_cancel_takes_what_no_other_run_wants(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}), priority=7)
    second = submit(repository, make_plan({"a": [], "b": ["a"]}), priority=2)
    assert repository.cancel_run(first) == 1
    assert states(repository, first) == {"a": "ready", "b": "blocked", "c": "cancelled"}
    assert repository.run(first).state is RunState.CANCELLED
    assert repository.cancel_run(first) == 0
    assert not repository.verify()
    assert repository.cancel_run(second) == 2
    assert repository.claim("w1", limit=8, lease_seconds=LEASE) == []
    assert not repository.verify()


def test_cancel_leaves_shared_steps_to_the_account_of_those_who_stay(
    repository: SqlRepository, engine: sa.Engine
) -> None:
    first = submit(repository, make_plan({"a": []}), priority=7)
    submit(repository, make_plan({"a": []}), priority=2)
    repository.cancel_run(first)
    assert accounts(engine) == {"a": 2}


def test_a_paused_run_gets_nothing_until_it_is_resumed(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["a"]}))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    assert repository.pause_run(run_id)
    assert not repository.pause_run(run_id)
    assert repository.run(run_id).state is RunState.PAUSED
    repository.commit(None, [done(step)])  # what is leased is finished
    assert states(repository, run_id) == {"a": "done", "b": "ready", "c": "ready"}
    assert repository.claim("w1", limit=8, lease_seconds=LEASE) == []
    assert repository.finish_runs() == []
    assert not repository.verify()
    assert repository.resume_run(run_id)
    assert not repository.resume_run(run_id)
    assert finish(repository) == 2
    assert repository.finish_runs() == [(run_id, RunState.DONE)]


def test_what_a_running_run_wants_does_not_wait_for_a_paused_one(repository: SqlRepository, engine: sa.Engine) -> None:
    first = submit(repository, make_plan({"a": [], "b": []}), priority=9)
    submit(repository, make_plan({"a": []}))
    repository.pause_run(first)
    assert accounts(engine) == {"a": 2, "b": 1}
    assert finish(repository) == 1
    repository.resume_run(first)
    assert accounts(engine) == {"a": 2, "b": 1}  # done: it stays with who had it computed
    assert not repository.verify()


def test_a_paused_run_may_be_cancelled(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}))
    repository.pause_run(run_id)
    assert repository.cancel_run(run_id) == 1
    assert repository.run(run_id).state is RunState.CANCELLED
    assert not repository.resume_run(run_id)


def test_another_priority_holds_from_the_next_claim_on(repository: SqlRepository, engine: sa.Engine) -> None:
    first = submit(repository, make_plan({"a": [], "b": []}))
    submit(repository, make_plan({"a": [], "c": []}), priority=1)
    repository.prioritize_run(first, 2)
    assert accounts(engine) == {"a": 1, "b": 1, "c": 2}
    leased = repository.claim("w1", limit=8, lease_seconds=LEASE)
    assert [step.params["name"] for step in leased] == ["a", "b", "c"]
    assert [step.run_id for step in leased] == [1, 1, 2]


@pytest.mark.parametrize("act", ["pause_run", "resume_run", "cancel_run"])
def test_acting_on_an_unknown_run_says_so(repository: SqlRepository, act: str) -> None:
    with pytest.raises(ObjectNotFound, match="no run 7"):
        getattr(repository, act)(7)


def test_a_lease_outlives_the_cancelling_of_its_run(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"]}))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    assert repository.cancel_run(run_id) == 1
    report = repository.commit(None, [done(step)])
    assert (report.committed, report.woken) == ((step.id,), {})
    assert states(repository, run_id) == {"a": "done", "b": "cancelled"}


def test_what_comes_back_to_a_cancelled_run_is_cancelled(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": [], "c": []}))
    one, two, _ = repository.claim("w1", limit=3, lease_seconds=LEASE)
    repository.cancel_run(run_id)
    repository.release([(one.id, one.token)])
    repository.commit(None, [failed(two, retry_in=0.0)])
    repository.reconcile(gone_workers=["w1"])
    assert set(states(repository, run_id).values()) == {"cancelled"}
    assert not repository.verify()


def test_a_cancelled_run_can_be_retried(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"]}))
    repository.cancel_run(run_id)
    assert repository.finish_runs() == []
    assert repository.retry_run(run_id) == 2
    assert states(repository, run_id) == {"a": "ready", "b": "blocked"}
    assert repository.run(run_id).state is RunState.RUNNING


def test_a_run_without_anything_to_do_is_done(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({}))
    assert repository.finish_runs() == [(run_id, RunState.DONE)]


def test_a_run_that_delivers_nothing_has_failed(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["b"]))
    finish_a = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.commit(None, [done(step) for step in finish_a])
    fail_first(repository)
    assert repository.finish_runs() == [(run_id, RunState.FAILED)]


def test_a_skipped_delivery_counts_as_arrived(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}, deliver=["a"]))
    finish(repository)
    [pending] = repository.pending_deliveries()
    settle(repository, pending, path=pending.path, version=1, skipped="something is there already")
    assert repository.finish_runs() == [(run_id, RunState.DONE)]
    summary = repository.run(run_id)
    assert (summary.delivered, summary.skipped_deliveries) == (1, 1)
    assert repository.skipped_deliveries(run_id) == [(pending.path, "something is there already")]
    assert repository.failed_deliveries(run_id) == []


def test_a_newer_run_that_delivered_to_a_path_is_known(repository: SqlRepository) -> None:
    plan = make_plan({"a": [], "b": []}, deliver=["a", "b"])
    old, new = submit(repository, plan), submit(repository, plan)
    finish(repository)
    first, second = repository.pending_deliveries(new)
    assert repository.newer_delivery(old, first.path) is None, "not yet"
    settle(repository, first, path=first.path, version=1)
    settle(repository, second, path=f"{second.path}.v2", version=2)
    assert repository.newer_delivery(old, first.path) == first
    assert repository.newer_delivery(old, second.path) is None, "it lies beside it"
    assert repository.newer_delivery(new, first.path) is None


def test_runs_are_listed_newest_first(repository: SqlRepository) -> None:
    ids = [submit(repository, make_plan({name: []})) for name in "abc"]
    assert [each.id for each in repository.runs()] == ids[::-1]
    assert [each.id for each in repository.runs(limit=2)] == ids[:0:-1]
    assert [each.steps for each in repository.runs(limit=1)] == [{S.READY: 1}]


def test_unknown_runs_are_told(repository: SqlRepository) -> None:
    for ask in (repository.run, repository.recipe_text, repository.cancel_run, repository.retry_run):
        with pytest.raises(ObjectNotFound, match="no run 77"):
            ask(77)
