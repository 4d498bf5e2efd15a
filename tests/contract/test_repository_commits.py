"""Commits: fenced by tokens, once only, and what becomes of children, uploads and batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sqlalchemy as sa

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import StepState
from kontext_batch.ports import BatchMember, BatchRecord, LeasedStep, StepDone, StepFailed
from tests.contract.plans import LANE, artifact_of, claim, done, failed, key, make_plan, submit

S = StepState


pytestmark = pytest.mark.usefixtures("two_workers")


def intend(repository: SqlRepository, *steps: LeasedStep) -> None:
    repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in steps])


def uploads(engine: sa.Engine) -> list[tuple[str, int, str]]:
    with engine.begin() as conn:
        rows = conn.exec_driver_sql("SELECT uri, token, state FROM uploads ORDER BY id")
        return [(row[0], row[1], row[2]) for row in rows]


def everything(engine: sa.Engine, *tables: str) -> list[list[tuple[object, ...]]]:
    with engine.begin() as conn:
        return [sorted(map(tuple, conn.exec_driver_sql(f"SELECT * FROM {table}")), key=repr) for table in tables]


def batch(*steps: LeasedStep) -> BatchRecord:
    members = tuple(BatchMember(step.id, index, 28) for index, step in enumerate(steps))
    return BatchRecord("w1", LANE, "cuda:0", "feed", "bfloat16", {"torch": "2.9"}, members)


def test_a_commit_frees_the_children_whose_last_parent_it_was(repository: SqlRepository) -> None:
    graph = {"a": [], "b": [], "c": ["a", "a"], "d": ["a", "b"], "e": ["a"]}
    submit(repository, make_plan(graph, lanes={"e": "operations"}))
    one, two = claim(repository)
    report = repository.commit(batch(one), [done(one)])
    assert (report.committed, report.fenced) == ((one.id,), ())
    assert report.woken == {LANE: 1, "operations": 1}
    assert repository.commit(batch(two), [done(two)]).woken == {LANE: 1}
    assert not repository.verify()


def test_one_commit_of_both_parents_frees_a_child_once(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": [], "c": ["a", "b", "a", "b"]}))
    report = repository.commit(None, [done(step) for step in claim(repository)])
    assert report.woken == {LANE: 1}
    assert not repository.verify()


def test_a_commit_writes_down_how_the_pixels_came_about(repository: SqlRepository, engine: sa.Engine) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": []}))
    one, two = claim(repository)
    repository.commit(batch(one, two), [done(one, latents=True), done(two)])
    [attempt] = repository.attempts(one.id)
    assert (attempt.number, attempt.worker_id, attempt.outcome, attempt.timings) == (1, "w1", "ok", {"sample": 0.5})
    assert attempt.ended is not None
    assert attempt.started <= attempt.ended
    assert repository.run_steps(run_id)[0].artifact == artifact_of(one)
    with engine.begin() as conn:
        made = conn.execute(
            sa.text("SELECT id, worker_id, lane, device, model_sha256, numeric_mode FROM batches")
        ).one()
        assert made == (attempt.batch_id, "w1", LANE, "cuda:0", "feed", "bfloat16")
        members = conn.execute(sa.text('SELECT step_id, joined, "left" FROM batch_members ORDER BY step_id')).all()
        assert members == [(one.id, 0, 28), (two.id, 1, 28)]
        slots = conn.execute(sa.text("SELECT step_id, slot FROM step_outputs ORDER BY 1, 2")).all()
        assert slots == [(one.id, "image"), (one.id, "latents"), (two.id, "image")]
    assert repository.lane_seconds()[LANE] < 60


def test_a_fault_of_the_step_skips_everything_below_it(repository: SqlRepository) -> None:
    graph = {"a": [], "x": [], "b": ["a"], "c": ["b", "x"], "d": ["c", "b"], "y": ["x"]}
    run_id = submit(repository, make_plan(graph))
    one, two = claim(repository)
    report = repository.commit(batch(one, two), [failed(one), done(two)])
    assert report.committed == (one.id, two.id)
    assert report.woken == {LANE: 1}, "only y: what is skipped is not freed"
    found = {row.node: row.state for row in repository.run_steps(run_id)}
    assert found == {"a": S.FAILED, "x": S.DONE, "b": S.SKIPPED, "c": S.SKIPPED, "d": S.SKIPPED, "y": S.READY}
    assert repository.run_steps(run_id, states=[S.FAILED])[0].error == "it went wrong"
    assert [(row.outcome, row.error) for row in repository.attempts(one.id)] == [("error", "it went wrong")]
    assert not repository.verify()


def test_two_failed_parents_skip_a_child_once(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": [], "c": ["a", "b"]}))
    one, two = claim(repository)
    repository.commit(None, [failed(one)])
    repository.commit(None, [failed(two)])
    assert repository.run(run_id).steps == {S.FAILED: 2, S.SKIPPED: 1}


def test_a_child_of_a_done_and_a_failed_parent_is_skipped_whatever_the_order(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": [], "c": ["a", "b"]}))
    one, two = claim(repository)
    repository.commit(None, [failed(one)])
    assert repository.commit(None, [done(two)]).woken == {}
    assert repository.run(run_id).steps == {S.FAILED: 1, S.DONE: 1, S.SKIPPED: 1}


def test_a_stale_token_changes_nothing_but_its_own_traces(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    [old] = claim(repository)
    intend(repository, old)
    repository.reconcile(gone_workers=["w1"])
    assert uploads(engine) == [(artifact_of(old).uri, 1, "orphaned")]
    [new] = claim(repository, "w2")
    intend(repository, new)
    intend(repository, old)
    untouched = ("steps", "artifacts", "step_outputs", "edges", "batches", "batch_members", "runs", "deliveries")
    before = everything(engine, *untouched)
    report = repository.commit(batch(old), [done(old)])
    assert (report.committed, report.fenced, report.woken) == ((), (old.id,), {})
    assert everything(engine, *untouched) == before
    assert [row.outcome for row in repository.attempts(old.id)] == ["fenced", None]
    assert [state for _, token, state in uploads(engine) if token == 1] == ["orphaned", "orphaned"]
    assert repository.orphaned_uploads() == [], "the new lease announces the same object"
    assert repository.commit(batch(new), [done(new)]).committed == (new.id,)
    assert repository.orphaned_uploads() == [], "and now it is an artifact"
    assert not repository.verify()


@pytest.mark.parametrize("result", [done, failed])
def test_a_token_is_stale_after_a_release(repository: SqlRepository, result: object) -> None:
    submit(repository, make_plan({"a": []}))
    [step] = claim(repository)
    repository.release([(step.id, step.token)])
    report = repository.commit(None, [result(step)])  # type: ignore[operator]
    assert report.fenced == (step.id,)
    assert repository.find_steps(key("a"))[0].state is S.READY


def test_a_batch_is_committed_in_part_when_one_lease_was_lost(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    one, two = claim(repository)
    repository.release([(one.id, one.token)])
    [again] = claim(repository, "w2")
    report = repository.commit(batch(one, two), [done(one), done(two)])
    assert (report.committed, report.fenced) == ((two.id,), (one.id,))
    repository.commit(None, [done(again)])
    assert len(everything(engine, "batch_members")[0]) == 2, "how the batch was composed explains its pixels"
    assert not repository.verify()


@pytest.mark.parametrize("result", [done, failed])
def test_a_commit_that_is_repeated_says_the_same(repository: SqlRepository, engine: sa.Engine, result: object) -> None:
    """The connection may break after the database has committed and before it could say so."""
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    [step] = claim(repository)
    intend(repository, step)
    first = repository.commit(batch(step), [result(step)])  # type: ignore[operator]
    before = everything(engine, "steps", "attempts", "uploads", "artifacts", "step_outputs", "batches")
    again = repository.commit(batch(step), [result(step)])  # type: ignore[operator]
    assert (again.committed, again.fenced, again.woken) == (first.committed, (), {})
    assert everything(engine, "steps", "attempts", "uploads", "artifacts", "step_outputs", "batches") == before


def test_uploads_are_committed_with_their_artifact_or_orphaned(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": [], "c": [], "d": []}))
    one, two, three, four = claim(repository)
    intend(repository, one, two, three, four)
    repository.intend_uploads([("file:///objects/latents", one.id, one.token)])
    assert {state for *_, state in uploads(engine)} == {"intent"}
    assert repository.orphaned_uploads() == []
    repository.commit(None, [done(one), failed(two), failed(three, retry_in=5.0)])
    repository.release([(four.id, four.token)])
    assert {uri: state for uri, _, state in uploads(engine)} == {
        artifact_of(one).uri: "committed",
        artifact_of(two).uri: "orphaned",
        artifact_of(three).uri: "orphaned",
        artifact_of(four).uri: "orphaned",
        "file:///objects/latents": "orphaned",
    }
    repository.intend_uploads([])
    assert not repository.verify()


def test_steps_with_equal_bytes_share_an_artifact(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    one, two = claim(repository)
    intend(repository, one)
    repository.intend_uploads([(artifact_of(one).uri, two.id, two.token)])
    shared = done(one).outputs
    repository.commit(None, [done(one), StepDone(two.id, two.token, shared, {})])
    assert list(repository.artifact_uris()) == [artifact_of(one).uri]
    assert {state for *_, state in uploads(engine)} == {"committed"}


def test_commits_of_one_batch_add_their_members_to_it(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": [], "c": ["a"]}))
    one, two = claim(repository)
    first = repository.commit(batch(one), [done(one)])
    [three] = claim(repository)
    assert first.batch_id is not None
    for step, joined, left in ((three, 28, 78), (two, 1, 29)):
        added = replace(batch(), members=(BatchMember(step.id, joined, left),), id=first.batch_id)
        assert repository.commit(added, [done(step)]).batch_id == first.batch_id
    found = repository.batch(first.batch_id)
    told = {each.step_id: (each.joined, each.left, each.outcome) for each in found.members}
    assert told == {one.id: (0, 28, "ok"), two.id: (1, 29, "ok"), three.id: (28, 78, "ok")}
    assert not repository.verify()


def test_an_error_of_any_bytes_is_stored(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}))
    [step] = claim(repository)
    repository.commit(None, [StepFailed(step.id, step.token, "no\0tool \udcff " + "x" * 20_000, "E", None)])
    error = repository.run_steps(run_id)[0].error
    assert error is not None
    assert error.startswith("no�tool ? xxx")
    assert len(error) == 10_000


def test_nothing_to_commit_is_no_error(repository: SqlRepository, engine: sa.Engine) -> None:
    report = repository.commit(batch(), [])
    assert (report.committed, report.fenced, report.woken) == ((), (), {})
    assert everything(engine, "batches") == [[]]


def test_a_commit_that_breaks_leaves_nothing_behind(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    [step] = claim(repository)
    unknown = BatchRecord("no such worker", LANE, "cpu", None, "exact", {}, ())
    tables = ("steps", "attempts", "artifacts", "step_outputs", "batches")
    before = everything(engine, *tables)
    with pytest.raises(sa.exc.IntegrityError):
        repository.commit(unknown, [done(step)])
    assert everything(engine, *tables) == before
    assert repository.commit(None, [done(step)]).committed == (step.id,)
