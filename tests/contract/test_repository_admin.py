"""What those need who look after runs: limits, reasons, orders to workers, exports, and who did what."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound, PlanRefused
from kontext_batch.lineage import export, migrate
from kontext_batch.lineage.engine import begin_writing, close_database, open_database
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.plan import Plan
from kontext_batch.planning.schedules import Schedule
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import Act, BatchMember, BatchRecord, LeasedStep, Orders, StepDone, StepFailed
from kontext_batch.services.limits import Limits, enforce, resume
from tests.contract.plans import (
    LANE,
    LEASE,
    artifact_of,
    claim,
    done,
    failed,
    finish,
    make_plan,
    new_run,
    settle,
    submit,
    worker,
)

S = StepState


pytestmark = pytest.mark.usefixtures("two_workers")


def budgeted(repository: SqlRepository, plan: Plan, gpu_minutes: float) -> int:
    return repository.create_run(replace(new_run(plan), budget={"gpu_minutes": gpu_minutes, "outputs": 9.0}), plan)


def record(steps: list[LeasedStep], worker_id: str = "w1") -> BatchRecord:
    members = tuple(BatchMember(step.id, 0, 28) for step in steps)
    return BatchRecord(worker_id, LANE, "cuda:0", "a" * 64, "bfloat16", {"torch": "2.6"}, members)


def sampled(step: LeasedStep, seconds: float) -> StepDone:
    return replace(done(step), timings={"sample": seconds, "put": 0.1})


def fail(repository: SqlRepository, count: int) -> None:
    repository.commit(None, [failed(step) for step in claim(repository, limit=count)])


# ---------------------------------------------------------------------------------------------------------- limits


def test_each_step_is_charged_with_what_was_sampled_for_it(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({"a": [], "b": [], "c": []}))
    second = submit(repository, make_plan({"d": []}))
    steps = claim(repository)
    assert [step.run_id for step in steps] == [first] * 3 + [second]
    seconds = dict(zip([step.id for step in steps], (8.0, 6.0, 7.0, 5.0), strict=True))
    repository.commit(record(steps), [sampled(step, seconds[step.id]) for step in steps])
    assert [repository.run(run_id).gpu_seconds for run_id in (first, second)] == [21.0, 5.0]


def test_every_worker_adds_to_what_a_run_has_used_and_a_fenced_one_does_not(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({name: [] for name in "abcd"}))
    for worker_id in ("w1", "w2", "w1"):
        [step] = claim(repository, worker_id, limit=1)
        repository.commit(record([step], worker_id), [sampled(step, 4.0)])
    [step] = claim(repository, "w2", limit=1)
    repository.release([(step.id, step.token)])
    repository.commit(record([step], "w2"), [sampled(step, 100.0)])
    assert repository.run(run_id).gpu_seconds == 12.0


def test_what_fails_has_used_its_time_too(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}))
    [step] = claim(repository)
    fault = StepFailed(step.id, step.token, "not finite", "StepError", None, {"sample": 3.0})
    repository.commit(record([step]), [fault])
    assert repository.run(run_id).gpu_seconds == 3.0


def test_a_run_that_has_used_up_its_budget_is_paused_and_goes_on_with_a_larger_one(repository: SqlRepository) -> None:
    run_id = budgeted(repository, make_plan({name: [] for name in "abc"}), 0.1)
    other = budgeted(repository, make_plan({"d": []}), 100.0)
    for expected in (RunState.RUNNING, RunState.PAUSED):
        [step] = repository.claim("w1", limit=1, lease_seconds=LEASE, run_id=run_id)
        repository.commit(record([step]), [sampled(step, 3.5)])
        assert [each for each, _ in enforce(repository, Limits())] == [run_id] * (expected is RunState.PAUSED)
        assert repository.run(run_id).state is expected
    summary = repository.run(run_id)
    assert summary.reason is not None
    assert "budget of 0.1 GPU minutes is used up (0.12 were measured)" in summary.reason
    assert [step.run_id for step in claim(repository)] == [other]
    with pytest.raises(PlanRefused, match="--budget MINUTES"):
        resume(repository, run_id)
    assert repository.run(run_id).state is RunState.PAUSED
    assert resume(repository, run_id, gpu_minutes=2.0)
    assert not resume(repository, run_id, gpu_minutes=3.0), "it is not paused: nothing changes"
    summary = repository.run(run_id)
    assert (summary.state, summary.reason) == (RunState.RUNNING, None)
    assert summary.budget == {"gpu_minutes": 2.0, "outputs": 9.0}
    assert enforce(repository, Limits()) == []
    assert len(repository.claim("w1", limit=8, lease_seconds=LEASE, run_id=run_id)) == 1


@pytest.mark.parametrize(("limits", "most"), [(Limits(failures=2), 2), (Limits(share=0.25), 2), (Limits(), 8)])
def test_a_run_in_which_too_much_fails_is_paused(repository: SqlRepository, limits: Limits, most: int) -> None:
    run_id = submit(repository, make_plan({name: [] for name in "abcdefgh"}))
    fail(repository, most)
    assert enforce(repository, limits) == []
    fail(repository, 1)
    paused = enforce(repository, limits)
    if most == 8:
        assert paused == []
        return
    [(found, reason)] = paused
    assert found == run_id
    assert reason.startswith("3 steps of 8 have failed, the limit is ")
    assert repository.run(run_id).reason == reason
    assert enforce(repository, limits) == []
    assert repository.verify() == []


def test_a_paused_run_with_nothing_left_ends_and_nothing_stands_against_it(repository: SqlRepository) -> None:
    run_id = budgeted(repository, make_plan({"a": []}), 0.01)
    [step] = claim(repository)
    repository.commit(record([step]), [sampled(step, 3.5)])
    assert len(enforce(repository, Limits())) == 1
    assert repository.finish_runs() == [(run_id, RunState.DONE)]
    assert repository.run(run_id).reason is None


def test_who_lets_a_run_go_on_knows_of_its_failures(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({name: [] for name in "abcdefgh"}))
    limits = Limits(failures=1)
    fail(repository, 2)
    assert len(enforce(repository, limits)) == 1
    assert resume(repository, run_id)
    fail(repository, 1)
    assert enforce(repository, limits) == []
    fail(repository, 1)
    assert len(enforce(repository, limits)) == 1
    assert resume(repository, run_id)
    repository.retry_run(run_id)
    assert repository.run(run_id).steps == {S.READY: 8}
    fail(repository, 1)
    assert enforce(repository, limits) == []
    fail(repository, 1)
    assert len(enforce(repository, limits)) == 1, "what failed before the retry gives no room"


def test_a_quarantined_step_is_a_failure_and_a_skipped_one_is_not(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}))
    for _ in range(3):
        claim(repository)
        repository.reconcile(gone_workers=["w1"])
        repository.register_worker(worker("w1"))
    assert repository.run(run_id).steps == {S.QUARANTINED: 1, S.SKIPPED: 2}
    [figures] = repository.run_figures()
    assert (figures.size, figures.failed) == (3, 1)


def test_steps_are_counted_alike_by_ranges_and_one_by_one(repository: SqlRepository, engine: sa.Engine) -> None:
    names = [f"s{number}" for number in range(90)]
    submit(repository, make_plan({name: [] for name in names[:60]}))
    finish(repository)
    runs = [
        submit(repository, make_plan({name: [] for name in wanted}))
        for wanted in (names, names[:3], names[0:60:2], names[40:70], [*names[:5], "new"])
    ]
    fail(repository, 2)
    before = [repository.run(run_id) for run_id in runs]
    with begin_writing(engine) as conn:
        ranges = conn.exec_driver_sql("SELECT id FROM runs WHERE ranges IS NULL").scalars().all()
        conn.exec_driver_sql("UPDATE runs SET ranges = NULL")
    assert list(ranges) == [runs[2]], "a run of many pieces is counted one by one"
    assert [repository.run(run_id) for run_id in runs] == before
    assert [sum(summary.steps.values()) for summary in before] == [90, 3, 30, 30, 6]
    assert [summary.cached for summary in before] == [60, 3, 30, 20, 5]


def test_runs_of_an_older_database_know_their_size(empty_database_url: str) -> None:
    migrate.upgrade(empty_database_url, "0003")
    engine = open_database(empty_database_url)
    moment = "2026-11-24 10:00:00.000"
    with begin_writing(engine) as conn:
        conn.exec_driver_sql(
            "INSERT INTO runs (id, recipe, recipe_sha256, recipe_text, source, owner, trigger, priority, selection,"
            f" budget, state, created) VALUES (1, 'r', '', '', '', '', 'cli', 0, '{{}}', '{{}}', 'running', '{moment}')"
        )
        for step_id, state in ((1, "done"), (2, "ready")):
            conn.exec_driver_sql(
                "INSERT INTO steps (id, key, operation, lane, state, deps_left, run_id, asked, attempts, losses,"
                f" lease_token) VALUES ({step_id}, 'k{step_id}', 'edit', 'l', '{state}', 0, 1, 1, 0, 0, 0)"
            )
        for ordinal, step_id, first in ((0, 1, "true"), (1, 2, "true"), (2, 2, "false")):
            conn.exec_driver_sql(
                "INSERT INTO run_steps (run_id, ordinal, step_id, node, axes, candidate, take, file, line, first,"
                f" cached) VALUES (1, {ordinal}, {step_id}, 'n', '[]', 1, 0, 'f', 1, {first}, {step_id == 1})"
            )
    close_database(engine)
    migrate.upgrade(empty_database_url)
    repository = SqlRepository(empty_database_url)
    summary = repository.run(1)
    assert (summary.steps, summary.cached) == ({S.DONE: 1, S.READY: 1}, 1)
    assert [figures.size for figures in repository.run_figures()] == [2]
    repository.close()
    migrate.downgrade(empty_database_url, "0003")
    migrate.upgrade(empty_database_url)


# ---------------------------------------------------------------------------------------------------------- orders


def test_a_worker_is_told_what_nobody_wants_any_more(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({"a": [], "b": []}))
    second = submit(repository, make_plan({"b": [], "c": []}))
    steps = claim(repository)
    assert repository.orders("w1") == Orders()
    repository.cancel_run(first)
    by_name = {step.params["name"]: (step.id, step.token) for step in steps}
    assert repository.orders("w1").unwanted == {by_name["a"]}
    assert repository.orders("w2") == Orders()
    repository.cancel_run(second)
    assert repository.orders("w1").unwanted == set(by_name.values())
    repository.release(list(by_name.values()))
    assert repository.run(first).steps == {S.CANCELLED: 2}
    assert repository.orders("w1") == Orders()
    assert repository.verify() == []


def test_a_run_that_is_cancelled_with_drain_gets_what_was_begun(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": [], "c": ["a"]}))
    [step] = claim(repository, limit=1)
    assert repository.cancel_run(run_id, drain=True, reason="it is morning") == 2
    assert repository.orders("w1") == Orders()
    assert repository.run(run_id).reason == "it is morning"
    repository.commit(None, [done(step)])
    assert repository.run(run_id).steps == {S.DONE: 1, S.CANCELLED: 2}
    repository.retry_run(run_id)
    assert repository.run(run_id).reason is None
    claim(repository)
    repository.cancel_run(run_id)
    assert len(repository.orders("w1").unwanted) == 2, "the drain was of the time before"


def test_workers_are_listed_and_told_to_drain(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    claim(repository, "w2")
    repository.register_worker(worker("w3"))
    repository.retire_worker("w3")
    rows = {row.id: row for row in repository.worker_rows()}
    assert {row.id: (row.held, row.draining) for row in rows.values()} == {"w1": (0, False), "w2": (2, False)}
    assert all(0 <= row.heartbeat_age < 60 for row in rows.values())
    assert {row.id for row in repository.worker_rows(retired=True) if row.retired} == {"w3"}
    for gone in ("w3", "nobody"):
        with pytest.raises(ObjectNotFound, match="workers list"):
            repository.drain_workers(gone)
    assert repository.drain_workers("w2") == ["w2"]
    assert repository.orders("w2").drain
    assert not repository.orders("w1").drain
    assert repository.drain_workers(None) == ["w1"]
    assert repository.drain_workers(None) == []
    repository.register_worker(worker("w2", pid=2))
    assert not repository.orders("w2").drain


# --------------------------------------------------------------------------------------------------------- answers


def test_an_export_has_every_instance_with_all_that_is_known(
    repository: SqlRepository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE", 2)
    run_id = submit(repository, make_plan({"a": [], "b": [], "c": ["a"]}, deliver=["b", "c"]))
    [a, b] = claim(repository)
    repository.commit(record([a, b]), [sampled(a, 2.0), failed(b, retry_in=0.0)])
    [b, c] = sorted(claim(repository), key=lambda step: str(step.params["name"]))
    repository.commit(None, [done(b), failed(c)])
    [pending] = repository.pending_deliveries(run_id)
    settle(repository, pending, path="file:///out/b.v2.png", version=2)
    rows = list(repository.export(run_id))
    assert [row.ordinal for row in rows] == [0, 1, 2]
    told = {row.node: row for row in rows}
    assert (told["a"].state, told["a"].artifact, told["a"].axes) == (S.DONE, artifact_of(a), (("item", "a"),))
    assert [(each.outcome, dict(each.timings)) for each in told["a"].attempts] == [("ok", {"sample": 2.0, "put": 0.1})]
    assert [each.outcome for each in told["b"].attempts] == ["retry", "ok"]
    [delivery] = told["b"].deliveries
    assert (delivery.state, delivery.delivered_path) == ("delivered", "file:///out/b.v2.png")
    assert (told["c"].state, told["c"].error, told["c"].artifact) == (S.FAILED, "it went wrong", None)
    assert [each.state for each in told["c"].deliveries] == ["waiting"]
    with pytest.raises(ObjectNotFound, match="no run 7"):
        list(repository.export(7))


def test_a_batch_is_told_as_it_was_computed(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    steps = claim(repository)
    repository.commit(record(steps), [sampled(steps[0], 2.0), failed(steps[1])])
    batch_id = repository.attempts(steps[0].id)[0].batch_id
    assert batch_id is not None
    found = repository.batch(batch_id)
    assert (found.worker_id, found.device, found.numeric_mode, found.libraries) == (
        "w1",
        "cuda:0",
        "bfloat16",
        {"torch": "2.6"},
    )
    assert [(each.step_id, each.joined, each.left, each.outcome) for each in found.members] == [
        (steps[0].id, 0, 28, "ok"),
        (steps[1].id, 0, 28, "error"),
    ]
    assert found.members[0].timings == {"sample": 2.0, "put": 0.1}
    with pytest.raises(ObjectNotFound, match="no batch 99"):
        repository.batch(99)


# ------------------------------------------------------------------------------------------------------------ acts


def test_an_act_is_written_down_with_what_it_changes(repository: SqlRepository) -> None:
    plan = make_plan({"a": []})
    schedule = Schedule(name="n", recipe="file:///r.yaml", cron="* * * * *", tz="UTC")

    def by(action: str) -> Act:
        return Act("alice", "cli", action, {"of": "test"})

    run_id = repository.create_run(new_run(plan), plan, by=by("submit"))
    repository.prioritize_run(run_id, 3, by=by("runs prioritize"))
    assert repository.pause_run(run_id, by=by("runs pause"))
    assert not repository.pause_run(run_id, by=by("runs pause")), "nothing changed: nothing is written"
    assert repository.resume_run(run_id, by=by("runs resume"))
    repository.retry_run(run_id, by=by("runs retry"))
    repository.cancel_run(run_id, by=by("runs cancel"))
    repository.add_schedule(schedule, by=by("schedules add"))
    repository.pause_schedule("n", paused=True, by=by("schedules pause"))
    repository.remove_schedule("n", by=by("schedules remove"))
    repository.drain_workers("w1", by=by("workers drain"))
    repository.note(by("gc"), "artifacts")
    repository.note(by("steps link"), "step:1", "step:2")
    submit(repository, make_plan({"b": []}))  # by the system
    [step] = claim(repository)
    repository.commit(None, [done(step)])
    for changed in (True, False):
        assert repository.lost_artifacts([artifact_of(step).sha256, "0" * 64], by=by("db verify")) is changed
    assert list(repository.artifact_uris()) == []
    rows = list(reversed(repository.audit()))
    assert [(row.action, row.subject) for row in rows] == [
        ("submit", "run:1"),
        ("runs prioritize", "run:1"),
        ("runs pause", "run:1"),
        ("runs resume", "run:1"),
        ("runs retry", "run:1"),
        ("runs cancel", "run:1"),
        ("schedules add", "schedule:n"),
        ("schedules pause", "schedule:n"),
        ("schedules remove", "schedule:n"),
        ("workers drain", "worker:w1"),
        ("gc", "artifacts"),
        ("steps link", "step:1"),
        ("steps link", "step:2"),
        ("db verify", "artifacts"),
    ]
    assert {(row.who, row.via, row.details["of"]) for row in rows} == {("alice", "cli", "test")}
    assert rows[-1].at - rows[0].at < timedelta(minutes=5)
    assert [row.action for row in repository.audit(subject="run:1", limit=2)] == ["runs cancel", "runs retry"]


def test_an_act_that_fails_is_not_written_down(repository: SqlRepository) -> None:
    with pytest.raises(ObjectNotFound):
        repository.pause_run(5, by=Act("alice", "cli", "runs pause"))
    assert repository.audit() == []
