"""Deliveries, and what may be removed and when."""

from __future__ import annotations

import pytest

from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.ports import LeasedStep, StepDone
from tests.contract.plans import LEASE, artifact_of, done, failed, finish, make_plan, settle, submit, worker


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def claim(repository: SqlRepository, *, limit: int = 8) -> list[LeasedStep]:
    return list(repository.claim("w1", limit=limit, lease_seconds=LEASE))


def test_a_delivery_is_pending_once_its_step_is_done(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["a", "b"]))
    other = submit(repository, make_plan({"a": []}, deliver=["a"], folder="other"))
    assert repository.pending_deliveries() == []
    [step] = claim(repository)
    repository.commit(None, [done(step)])
    pending = repository.pending_deliveries()
    assert [(each.run_id, each.path, each.if_exists, each.artifact) for each in pending] == [
        (run_id, "file:///out/a.png", "version", artifact_of(step)),
        (other, "file:///other/a.png", "version", artifact_of(step)),
    ]
    assert [each.run_id for each in repository.pending_deliveries(other)] == [other]
    assert len(repository.pending_deliveries(limit=1)) == 1
    settle(repository, pending[0], path="file:///out/a.v2.png", version=2)
    assert [each.run_id for each in repository.pending_deliveries()] == [other]
    assert repository.run(run_id).delivered == 1
    assert [row.node for row in repository.find_steps("a.v2.png")] == ["a"]
    assert not repository.verify()


def test_the_files_of_a_run_are_those_of_pictures_that_it_made(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}, deliver=["a"]))
    finish(repository)
    run_id = submit(repository, make_plan({"a": [], "b": []}, deliver=["a", "b"]))
    assert repository.made_files(run_id) == []
    finish(repository)
    for each in repository.pending_deliveries(run_id):
        settle(repository, each, path=each.path.replace(".png", ".v2.png"), version=2)
    assert repository.made_files(run_id) == ["file:///out/b.v2.png"]


def test_a_failed_step_leaves_its_delivery_waiting(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}, deliver=["a"]))
    repository.commit(None, [failed(step) for step in claim(repository)])
    assert repository.pending_deliveries() == []
    summary = repository.run(run_id)
    assert (summary.deliveries, summary.delivered, summary.failed_deliveries) == (1, 0, 0)


def test_what_is_still_to_be_read_or_delivered_is_not_collected(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"], "c": []}, deliver=["c"]))
    one, other = claim(repository)
    repository.commit(None, [done(one), done(other)])
    assert repository.collectable(keep_bytes=0) == []
    assert not repository.forget_artifact(artifact_of(one).sha256)
    assert not repository.forget_artifact(artifact_of(other).sha256)
    [reader] = claim(repository)
    assert not repository.forget_artifact(artifact_of(one).sha256), "it is being read"
    repository.commit(None, [done(reader)])
    [pending] = repository.pending_deliveries()
    settle(repository, pending, path=pending.path, version=1)
    assert {each.sha256 for each in repository.collectable(keep_bytes=0)} == {
        artifact_of(step).sha256 for step in (one, other, reader)
    }


def test_the_longest_unused_goes_first_and_only_as_much_as_must(repository: SqlRepository) -> None:
    for name in "abc":
        submit(repository, make_plan({name: []}))
        finish(repository)
    submit(repository, make_plan({"a": []}))  # wanted again: the newest now
    repository.finish_runs()
    steps = {row.node: row.artifact for name in "abc" for row in repository.find_steps(name)}
    in_order = [steps["b"], steps["c"], steps["a"]]
    assert repository.collectable(keep_bytes=0) == in_order
    assert repository.collectable(keep_bytes=100) == in_order[:2]
    assert repository.collectable(keep_bytes=101) == in_order[:2]
    assert repository.collectable(keep_bytes=200) == in_order[:1]
    assert repository.collectable(keep_bytes=300) == []


def test_a_collected_artifact_is_deleted_and_stays_known(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    finish(repository)
    [artifact] = repository.collectable(keep_bytes=0)
    deleted: list[str] = []
    assert repository.forget_artifact(artifact.sha256, deleted.append)
    assert deleted == [artifact.uri]
    assert not repository.forget_artifact(artifact.sha256, deleted.append)
    assert not repository.forget_artifact("unknown", deleted.append)
    assert deleted == [artifact.uri]
    assert list(repository.artifact_uris()) == []
    assert repository.find_steps("a")[0].artifact == artifact
    assert repository.collectable(keep_bytes=0) == []


def test_an_object_whose_deletion_broke_off_is_found_again(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    finish(repository)
    [artifact] = repository.collectable(keep_bytes=0)
    assert repository.orphaned_uploads() == []
    repository.forget_artifact(artifact.sha256)
    assert repository.orphaned_uploads() == [artifact.uri]

    def broken(uri: str) -> None:
        raise OSError("no network")

    with pytest.raises(OSError):
        repository.forget_uploads([artifact.uri], broken)
    assert repository.orphaned_uploads() == [artifact.uri]
    repository.forget_uploads([artifact.uri], lambda uri: None)
    assert repository.orphaned_uploads() == []


def test_an_artifact_that_cannot_be_deleted_is_not_forgotten(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    finish(repository)
    [artifact] = repository.collectable(keep_bytes=0)

    def broken(uri: str) -> None:
        raise OSError("no network")

    with pytest.raises(OSError):
        repository.forget_artifact(artifact.sha256, broken)
    assert list(repository.artifact_uris()) == [artifact.uri]


def test_an_orphan_is_safe_to_delete_only_while_nobody_names_it(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": [], "c": []}))
    one, two, three = claim(repository)
    uri = artifact_of(one).uri
    repository.intend_uploads([(uri, one.id, one.token), ("file:///objects/else", three.id, three.token)])
    repository.commit(None, [failed(one), failed(three)])
    assert set(repository.orphaned_uploads()) == {"file:///objects/else", uri}
    deleted: list[str] = []
    repository.intend_uploads([(uri, two.id, two.token)])
    assert repository.orphaned_uploads() == ["file:///objects/else"]
    repository.forget_uploads([uri, "file:///objects/else"], deleted.append)
    assert deleted == ["file:///objects/else"], "the other is announced by now"
    repository.commit(None, [StepDone(two.id, two.token, done(one).outputs, {})])
    repository.forget_uploads([uri], deleted.append)
    assert deleted == ["file:///objects/else"], "and now it is an artifact"
    assert repository.orphaned_uploads() == []
    assert not repository.verify()


def test_what_somebody_is_about_to_put_again_is_not_deleted(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    finish(repository)
    [artifact] = repository.collectable(keep_bytes=0)
    submit(repository, make_plan({"b": []}))
    [other] = claim(repository)
    repository.intend_uploads([(artifact.uri, other.id, other.token)])
    deleted: list[str] = []
    assert repository.forget_artifact(artifact.sha256, deleted.append)
    assert deleted == []
    repository.commit(None, [failed(other)])
    assert repository.orphaned_uploads() == [artifact.uri]
