"""What is kept: intermediates by age, holds."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from kontext_batch.errors import ObjectNotFound
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.lineage.sql import now_plus
from kontext_batch.ports import Act
from tests.contract.plans import LEASE, artifact_of, done, finish, make_plan, settle, source, submit, worker

BY = Act("ann", "cli", "test")
DAY = 86400.0


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def pass_days(engine: sa.Engine, days: float) -> None:
    """Everything happened so many days earlier."""
    with engine.begin() as conn:
        moment = now_plus(-days * DAY)
        conn.execute(sa.update(t.artifacts).values(created=moment))
        conn.execute(sa.update(t.runs).values(created=moment))
        conn.execute(sa.update(t.runs).where(t.runs.c.finished.is_not(None)).values(finished=moment))


def finish_and_deliver(repository: SqlRepository) -> None:
    finish(repository)
    for each in repository.pending_deliveries():
        settle(repository, each)
    repository.finish_runs()


def sha(repository: SqlRepository, node: str) -> str:
    [row] = repository.find_steps(node)
    assert row.artifact is not None
    return row.artifact.sha256


def shas(repository: SqlRepository, *nodes: str) -> list[str]:
    return sorted(sha(repository, node) for node in nodes)


def test_intermediates_expire_and_what_is_delivered_stays(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}, deliver=["c"]))
    finish_and_deliver(repository)
    assert repository.expired(days=1) == []
    assert not repository.forget_artifact(sha(repository, "a"), expired_days=1), "it is too young"
    pass_days(engine, 2)
    assert sorted(each.sha256 for each in repository.expired(days=1)) == shas(repository, "a", "b")
    assert repository.expired(days=3) == []
    assert len(repository.expired(days=1, limit=1)) == 1
    assert not repository.forget_artifact(sha(repository, "c"), expired_days=1)
    deleted: list[str] = []
    assert repository.forget_artifact(sha(repository, "a"), deleted.append, expired_days=1)
    assert len(deleted) == 1
    assert [each.sha256 for each in repository.expired(days=1)] == [sha(repository, "b")]
    assert not repository.verify()


def test_what_somebody_wants_is_not_expired(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["b"]))
    finish_and_deliver(repository)
    pass_days(engine, 9)
    run_id = submit(repository, make_plan({"a": [], "x": ["a"]}))  # open: it reads `a`
    assert repository.expired(days=1) == []
    assert not repository.forget_artifact(sha(repository, "a"), expired_days=1)
    finish(repository)
    assert repository.run(run_id).finished is None
    assert repository.expired(days=1) == [], "an open run wants it, though all is computed"
    repository.finish_runs()
    assert repository.expired(days=1) == [], "it was wanted just now"
    pass_days(engine, 2)
    assert sorted(each.sha256 for each in repository.expired(days=1)) == shas(repository, "a", "x")


def test_latents_of_what_is_delivered_stay(repository: SqlRepository, engine: sa.Engine) -> None:
    """Without them the step would be computed again, to be delivered again."""
    submit(repository, make_plan({"a": [], "b": ["a"]}, deliver=["b"]))
    while steps := list(repository.claim("w1", limit=8, lease_seconds=LEASE)):
        repository.commit(None, [done(step, latents=True) for step in steps])
    for each in repository.pending_deliveries():
        settle(repository, each)
    repository.finish_runs()
    pass_days(engine, 2)
    assert len(repository.expired(days=1)) == 2, "picture and latents of `a`"


def test_above_the_size_limit_what_is_delivered_goes_last(repository: SqlRepository, engine: sa.Engine) -> None:
    submit(repository, make_plan({"a": []}, deliver=["a"]))
    finish_and_deliver(repository)
    submit(repository, make_plan({"b": [], "c": ["b"]}, deliver=["c"]))
    finish_and_deliver(repository)
    assert [each.sha256 for each in repository.collectable(keep_bytes=200)] == [sha(repository, "b")]
    pass_days(engine, 2)
    assert repository.collectable(keep_bytes=200, expired_days=1) == [], "`b` goes by its age"
    assert [each.sha256 for each in repository.collectable(keep_bytes=100, expired_days=1)] in (
        [sha(repository, "a")],
        [sha(repository, "c")],
    )


@pytest.mark.parametrize("held", ["run", "step", "photo", "picture"])
def test_a_hold_keeps_what_it_names_and_all_that_explains_it(
    repository: SqlRepository, engine: sa.Engine, held: str
) -> None:
    submit(repository, make_plan({"other": []}))
    run_id = submit(repository, make_plan({"a": [], "side": [], "b": ["a", "side"], "c": ["b"]}))
    finish(repository)
    repository.finish_runs()
    [step] = repository.find_steps("b")
    subject = {
        "run": f"run:{run_id}",
        "step": f"step:{step.id}",
        "photo": f"photo:{source('a').sha256}",
        "picture": f"picture:{sha(repository, 'b')}",
    }[held]
    assert repository.add_hold(subject, "case 4711", by=BY)
    assert not repository.add_hold(subject, "case 4712", by=BY)
    kept = {"a", "side", "b"} | ({"c"} if held in ("run", "photo") else set())
    gone = {"other", "a", "side", "b", "c"} - kept
    pass_days(engine, 2)
    assert sorted(each.sha256 for each in repository.collectable(keep_bytes=0)) == shas(repository, *gone)
    assert sorted(each.sha256 for each in repository.expired(days=1)) == shas(repository, *gone)
    for node in sorted(kept):
        assert not repository.forget_artifact(sha(repository, node)), node
    for node in sorted(gone):
        assert repository.forget_artifact(sha(repository, node)), node
    assert repository.release_hold(subject, by=BY)
    assert not repository.release_hold(subject, by=BY)
    for node in sorted(kept):
        assert repository.forget_artifact(sha(repository, node)), node
    assert [(each.subject, each.reason, each.who) for each in repository.holds(released=True)] == [
        (subject, "case 4711", "ann")
    ]
    assert repository.holds() == []
    assert [each.subject for each in repository.audit()] == [subject, subject], "what changed nothing is not noted"


def test_a_hold_on_nothing_is_refused(repository: SqlRepository) -> None:
    for subject in ("run:7", "step:7"):
        with pytest.raises(ObjectNotFound):
            repository.add_hold(subject, "why", by=BY)


def test_a_hold_keeps_what_its_step_made_before_it_was_made_anew(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": []}, deliver=["a"]))
    [step] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.intend_uploads([(artifact_of(step).uri, step.id, step.token)])
    repository.commit(None, [done(step)])
    [pending] = repository.pending_deliveries()
    settle(repository, pending)
    repository.finish_runs()
    repository.add_hold(f"run:{run_id}", "why", by=BY)
    before = artifact_of(step).sha256
    repository.lost_artifact(before)
    submit(repository, make_plan({"a": []}, deliver=["a"], folder="else"))
    [again] = repository.claim("w1", limit=1, lease_seconds=LEASE)
    repository.commit(None, [done(again)])
    assert not repository.forget_artifact(before)
