"""Runs leave for an archive and come into another database, from SQLite to PostgreSQL and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from kontext_batch.errors import BadArchive, ObjectNotFound, SettingsError
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.states import RunState, StepState
from kontext_batch.ports import SECTIONS, Act, BatchMember, BatchRecord, Imported, Row
from tests.contract.plans import LEASE, artifact_of, done, failed, finish, make_plan, settle, source, submit, worker

BY = Act("ann", "cli", "import")
Held = dict[str, list[Row]]


@pytest.fixture
def other(sqlite_template: Path, tmp_path: Path) -> Iterator[SqlRepository]:
    """Another database; of SQLite, whichever the first one is of."""
    path = shutil.copy(sqlite_template, tmp_path / "other.sqlite")
    repository = SqlRepository(f"sqlite:///{path}")
    yield repository
    repository.close()


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def uri_of(sha256: str, media_type: str) -> str:
    return f"file:///objects/{sha256}"


def archive(repository: SqlRepository, run_id: int) -> Held:
    """As it is in a file."""
    told = {section: list(repository.archived(run_id, section)) for section in SECTIONS}
    held: Held = json.loads(json.dumps(told))
    return held


def bring(repository: SqlRepository, held: Held) -> Imported:
    done = repository.import_run(lambda section: iter(held[section]), uri_of, by=BY)
    shas = iter([row["sha256"] for row in held["artifacts"] if row["kept"]])
    for sha256 in repository.missing_artifacts(shas):
        repository.announce_artifact(sha256)
        assert repository.restore_artifact(sha256, lambda uri: None)
    return done


def computed(repository: SqlRepository, **options: list[str]) -> int:
    """A run of three steps, one of which another reads twice, all in one batch where they can be."""
    plan = make_plan({"a": [], "b": ["a", "a"], "c": ["b"]}, deliver=["c"], **options)  # type: ignore[arg-type]
    run_id = submit(repository, plan)
    while steps := list(repository.claim("w1", limit=8, lease_seconds=LEASE)):
        record = BatchRecord("w1", steps[0].lane, "cpu", "0" * 64, "exact", {"torch": "2"}, ())
        members = tuple(BatchMember(step.id, 0, 1, place) for place, step in enumerate(steps))
        repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in steps])
        repository.commit(replace(record, members=members), [done(step) for step in steps])
    for each in repository.pending_deliveries(run_id):
        settle(repository, each)
    repository.finish_runs()
    return run_id


def test_a_run_comes_whole_into_another_database_and_back(
    repository: SqlRepository, other: SqlRepository, engine: sa.Engine
) -> None:
    submit(repository, make_plan({"before": []}))
    finish(repository)
    repository.finish_runs()
    run_id = computed(repository)
    held = archive(repository, run_id)
    told = bring(other, held)
    assert (told.run_id, told.old_run, told.known, told.new_steps) == (1, run_id, False, 3)
    assert not other.verify()
    mine, theirs = repository.run(run_id), other.run(1)
    assert (theirs.state, theirs.steps, theirs.delivered) == (RunState.DONE, {StepState.DONE: 3}, 1)
    assert (theirs.created.replace(microsecond=0), theirs.gpu_seconds) == (
        mine.created.replace(microsecond=0),
        mine.gpu_seconds,
    )
    for node in "abc":
        [ours], [here] = repository.find_steps(node, run_id=run_id), other.find_steps(node)
        assert ours.artifact is not None
        assert here.artifact is not None
        assert (ours.key, ours.params, ours.artifact.sha256) == (here.key, here.params, here.artifact.sha256)
        [attempt], [original] = other.attempts(here.id), repository.attempts(ours.id)
        assert (attempt.outcome, attempt.timings, attempt.worker_id) == ("ok", original.timings, "w1")
        assert other.batch(attempt.batch_id or 0).libraries == {"torch": "2"}
    [last] = other.find_steps("c")
    assert len(other.ancestors(last.id)) == len(repository.ancestors(repository.find_steps("c")[0].id)) == 3
    assert [row.node for row in other.find_steps("file:///out/c.png")] == ["c"]
    again = bring(other, held)
    assert (again.known, again.new_steps, again.run_id) == (True, 0, 1)
    assert [each.action for each in other.audit()] == ["import"], "what changed nothing is not noted"

    home = bring(repository, archive(other, 1))
    assert (home.known, home.run_id, home.new_steps) == (True, run_id, 0), "it comes home as the run that it is"
    assert not repository.verify()


def test_what_was_imported_is_not_computed_again(repository: SqlRepository, other: SqlRepository) -> None:
    bring(other, archive(repository, computed(repository)))
    other.register_worker(worker("w1"))
    run_id = submit(other, make_plan({"a": [], "b": ["a", "a"], "c": ["b"]}, deliver=["c"], folder="here"))
    assert other.run(run_id).cached == 3
    assert finish(other) == 0
    [pending] = other.pending_deliveries()
    assert pending.artifact.uri == uri_of(pending.artifact.sha256, "")


def test_without_bytes_a_step_is_made_again_when_its_picture_is_wanted(
    repository: SqlRepository, other: SqlRepository
) -> None:
    held = archive(repository, computed(repository))
    held["artifacts"] = [{**row, "kept": row["output"]} for row in held["artifacts"]]
    bring(other, held)
    assert not other.verify()
    other.register_worker(worker("w1"))
    submit(other, make_plan({"a": [], "b": ["a", "a"], "c": ["b"]}, deliver=["c"], folder="here"))
    assert finish(other) == 0, "nobody reads the intermediates"
    submit(other, make_plan({"a": [], "new": ["a"]}))
    assert finish(other) == 2


def test_steps_that_are_here_stay_as_they_are(repository: SqlRepository, other: SqlRepository) -> None:
    held = archive(repository, computed(repository))
    other.register_worker(worker("w1"))
    submit(other, make_plan({"a": []}))
    [step] = other.claim("w1", limit=1, lease_seconds=LEASE)
    other.commit(None, [failed(step)])
    other.finish_runs()
    told = bring(other, held)
    assert (told.new_steps, told.known_steps, told.undone) == (2, 1, 2), (
        "what reads a step that failed here is not done"
    )
    assert {row.node: row.state for row in other.run_steps(told.run_id)} == {
        "a": StepState.FAILED,
        "b": StepState.CANCELLED,
        "c": StepState.CANCELLED,
    }
    assert not other.verify()
    assert other.retry_run(told.run_id) == 3
    assert finish(other) == 3
    assert not other.verify()


def test_other_bytes_of_an_equal_key_do_not_replace_ours(repository: SqlRepository, other: SqlRepository) -> None:
    held = archive(repository, computed(repository))
    other.register_worker(worker("w1"))
    submit(other, make_plan({"a": []}))
    [step] = other.claim("w1", limit=1, lease_seconds=LEASE)
    ours = done(step, size=7).outputs[0]
    different = replace(ours, artifact=replace(ours.artifact, sha256="1" * 64, uri="file:///objects/1"))
    other.commit(None, [replace(done(step), outputs=(different,))])
    other.finish_runs()
    told = bring(other, held)
    assert (told.known_steps, told.differing) == (1, 1)
    [row] = other.find_steps("a")
    assert row.artifact is not None
    assert row.artifact.sha256 == "1" * 64
    assert not other.verify()


def test_what_was_taken_down_here_is_left_out(repository: SqlRepository, other: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "x": [], "y": ["x", "b"]}, deliver=["b", "x"]))
    finish(repository)
    for each in repository.pending_deliveries():
        settle(repository, each)
    repository.finish_runs()
    other.take_down(
        source("a").sha256, "why", uris=["file:///in/a.png"], removes=lambda uri: False, despite_hold=False, by=BY
    )
    told = bring(other, archive(repository, run_id))
    assert (told.new_steps, told.forgotten) == (1, 3)
    assert [row.node for row in other.run_steps(told.run_id)] == ["x"]
    assert len(list(other.artifact_uris())) == 1
    assert not other.verify()


def test_an_import_that_is_broken_off_leaves_orphans_and_goes_on(
    repository: SqlRepository, other: SqlRepository
) -> None:
    held = archive(repository, computed(repository))
    other.import_run(lambda section: iter(held[section]), uri_of, by=BY)
    shas = [row["sha256"] for row in held["artifacts"]]
    first, *_ = missing = sorted(other.missing_artifacts(iter(shas)))
    assert missing == sorted(shas)
    other.announce_artifact(first)
    assert other.orphaned_uploads() == [uri_of(first, "")]

    def broken(uri: str) -> None:
        raise OSError("killed")

    with pytest.raises(OSError):
        other.restore_artifact(first, broken)
    assert other.orphaned_uploads() == [uri_of(first, "")]
    assert sorted(other.missing_artifacts(iter(shas))) == missing
    assert bring(other, held).known
    assert other.orphaned_uploads() == []
    assert sorted(other.artifact_uris()) == sorted(uri_of(each, "") for each in shas)
    assert not other.verify()


def test_only_a_run_that_has_ended_leaves(repository: SqlRepository) -> None:
    with pytest.raises(ObjectNotFound):
        list(repository.archived(7, "run"))
    run_id = submit(repository, make_plan({"a": []}))
    with pytest.raises(SettingsError, match="when it has ended"):
        list(repository.archived(run_id, "run"))
    repository.cancel_run(run_id)
    [row] = repository.archived(run_id, "steps")
    assert row["state"] == "cancelled"


def test_no_place_that_an_archive_names_is_delivered_to(repository: SqlRepository, other: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["a", "b"]))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.intend_uploads([(artifact_of(step).uri, step.id, step.token)])
    record = BatchRecord("w1", step.lane, "cpu", "0" * 64, "exact", {"torch": "2"}, (BatchMember(step.id, 0, 1, 0),))
    repository.commit(record, [done(step)])
    repository.cancel_run(run_id)
    there = bring(other, archive(repository, run_id)).run_id
    other.register_worker(worker("w1"))
    assert other.retry_run(there, by=BY) == 1, "its steps may be made"
    assert finish(other) == 1
    assert not other.pending_deliveries()
    other.finish_runs()
    assert other.run(there).state is RunState.FAILED, "nothing was delivered"
    assert not other.verify()


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("run", {"created": 5}),
        ("run", {"priority": 10**30}),
        ("run", {"cached": "x"}),
        ("run", {"budget": "x"}),
        ("run", {"usage": [["w1", "x"]]}),
        ("artifacts", {"bytes": 10**30}),
        ("artifacts", {"width": "wide"}),
        ("workers", {"heartbeat": 5}),
        ("workers", {"engine": []}),
        ("models", {"licence": [1]}),
        ("batches", {"libraries": None}),
        ("steps", {"error": 5}),
        ("instances", {"axes": [["item", 5]]}),
        ("instances", {"first": "yes"}),
    ],
)
def test_values_of_other_types_are_refused(
    repository: SqlRepository, other: SqlRepository, section: str, change: Row
) -> None:
    held = archive(repository, computed(repository))
    held["models"] = [{"sha256": "0" * 64, "name": "tiny", "layout": "flux", "licence": ""}]
    held[section] = [{**row, **change} for row in held[section]]
    with pytest.raises(BadArchive, match="nothing was imported"):
        bring(other, held)
    assert not other.runs()
