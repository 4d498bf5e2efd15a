"""Dropped recipes in both databases: each becomes one run, whoever looks and dies; each answer is looked at in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kontext_batch.errors import LeaseLost, ObjectNotFound, SettingsError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.inbox import Cancel, ClaimedDrop, DropState, NewDrop
from kontext_batch.planning.states import RunState
from kontext_batch.ports import Act
from tests.contract.plans import finish, make_plan, new_run, worker

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def sound(repository: SqlRepository) -> Iterator[None]:
    """Whatever a test did, the rules of `lineage.verify` hold."""
    yield
    assert repository.verify() == []


def found(name: str = "x.yaml", etag: str = "1", **values: Any) -> NewDrop:
    return NewDrop(uri=f"s3://b/in/{name}", etag=etag, modified=NOON, owner="acme", **values)


def claim(repository: SqlRepository, new: NewDrop, seconds: float = 60) -> ClaimedDrop:
    drop = repository.claim_drop(new, seconds=seconds)
    assert drop is not None
    return drop


def start(repository: SqlRepository, drop: ClaimedDrop) -> int:
    plan = make_plan({f"a{drop.id}": []})
    return repository.create_run(new_run(plan), plan, drop=(drop.id, drop.token))


def states(repository: SqlRepository) -> list[DropState]:
    return [row.state for row in reversed(repository.drops())]


def test_a_drop_becomes_one_run(repository: SqlRepository) -> None:
    new = found()
    assert repository.claimable_drops([(new.uri, "1"), (new.uri, "2")]) == [(new.uri, "1"), (new.uri, "2")]
    drop = claim(repository, new)
    assert (drop.uri, drop.stem, drop.tries) == ("s3://b/in/x.yaml", "s3://b/in/x", 1)
    assert repository.claim_drop(new, seconds=60) is None
    run_id = start(repository, drop)
    assert repository.claimable_drops([(new.uri, "1"), (new.uri, "2")]) == [(new.uri, "2")]
    assert repository.claim_drop(new, seconds=60) is None
    with pytest.raises(LeaseLost):
        start(repository, drop)
    assert len(repository.runs()) == 1
    [row] = repository.drops()
    assert (row.state, row.run_id, row.owner, row.error) == (DropState.ACCEPTED, run_id, "acme", None)


def test_two_watchers_at_once_claim_it_once(repository: SqlRepository) -> None:
    names = [f"{number}.yaml" for number in range(12)]
    claimed: list[ClaimedDrop] = []
    together = threading.Barrier(4)

    def watch() -> None:
        together.wait()
        for name in names:
            drop = repository.claim_drop(found(name), seconds=60)
            if drop is not None:
                claimed.append(drop)
                start(repository, drop)

    watchers = [threading.Thread(target=watch) for _ in range(4)]
    for each in watchers:
        each.start()
    for each in watchers:
        each.join()
    assert sorted(drop.uri for drop in claimed) == sorted(found(name).uri for name in names)
    assert len(repository.runs()) == len(names)
    assert set(states(repository)) == {DropState.ACCEPTED}


def test_a_watcher_that_died_over_a_drop_loses_it_to_the_next(repository: SqlRepository) -> None:
    dead = claim(repository, found(), seconds=0)
    assert repository.claimable_drops([(dead.uri, "1")]) == [(dead.uri, "1")]
    heir = repository.claim_lost_drop(seconds=60)
    assert heir is not None
    assert (heir.id, heir.token, heir.tries) == (dead.id, dead.token + 1, 2)
    with pytest.raises(LeaseLost):
        start(repository, dead)
    assert repository.runs() == []  # and left nothing behind
    assert not repository.settle_drop(dead.id, dead.token, DropState.REFUSED, "late")
    assert not repository.postpone_drop(dead.id, dead.token, seconds=0, blame=True)
    assert repository.claim_lost_drop(seconds=60) is None
    start(repository, heir)


def test_who_puts_a_drop_off_says_whether_it_is_to_blame(repository: SqlRepository) -> None:
    drop = claim(repository, found())
    assert repository.postpone_drop(drop.id, drop.token, seconds=0, blame=False)
    again = claim(repository, found())
    assert again.tries == 1
    assert repository.postpone_drop(again.id, again.token, seconds=0, blame=True)
    assert claim(repository, found()).tries == 2


def test_a_file_that_is_still_being_written_waits(repository: SqlRepository) -> None:
    assert repository.claim_drop(found(etag="half", settle_seconds=60), seconds=60) is None
    assert repository.claim_drop(found(etag="half", settle_seconds=60), seconds=60) is None
    assert repository.claimable_drops([(found().uri, "half")]) == []
    assert repository.claim_lost_drop(seconds=60) is None
    assert repository.claim_drop(found(etag="whole", settle_seconds=0.001), seconds=60) is None
    assert [row.etag for row in repository.drops()] == ["whole"]  # what it was before is forgotten
    threading.Event().wait(0.05)
    assert repository.claimable_drops([(found().uri, "whole")]) != []
    claim(repository, found(etag="whole", settle_seconds=0.001))


def test_the_same_bytes_under_the_same_name_are_known(repository: SqlRepository) -> None:
    first = claim(repository, found(etag="1"))
    assert repository.note_drop(first.id, "f" * 64) is None
    run_id = start(repository, first)
    second = claim(repository, found(etag="2"))
    assert repository.note_drop(second.id, "f" * 64) == run_id
    other = claim(repository, found("y.yaml"))
    assert repository.note_drop(other.id, "f" * 64) is None


def test_answers_take_turns_and_are_fenced(repository: SqlRepository) -> None:
    runs = {}
    for name in ("x.yaml", "y.yaml"):
        drop = claim(repository, found(name))
        runs[start(repository, drop)] = drop.id
    first = repository.claim_answers(limit=1, seconds=60)
    second = repository.claim_answers(limit=5, seconds=0)
    assert [each.run_id for each in (*first, *second)] == list(runs)
    assert all(each.newest and each.answer is None for each in (*first, *second))
    [late], [heir] = second, repository.claim_answers(limit=5, seconds=60)
    assert heir.id == late.id
    assert repository.settle_answer(heir.id, heir.token, DropState.FINISHED, "last", seconds=5)
    assert states(repository) == [DropState.ACCEPTED, DropState.FINISHED]
    assert not repository.settle_answer(late.id, late.token, DropState.ACCEPTED, "stale", seconds=60)
    [again] = repository.claim_answers(limit=5, seconds=60)
    assert (again.id, again.answer) == (late.id, None)  # written once more: the stale one may lie on top


def test_only_the_newest_drop_of_a_stem_is_answered(repository: SqlRepository) -> None:
    start(repository, claim(repository, found(etag="1")))
    start(repository, claim(repository, found("x.yml")))
    bad = claim(repository, found(etag="3"))
    assert [each.newest for each in repository.claim_answers(limit=5, seconds=0)] == [False, False]
    repository.settle_drop(bad.id, bad.token, DropState.REPEATED, "as before")
    assert [each.newest for each in repository.claim_answers(limit=5, seconds=0)] == [False, True]


def test_a_run_that_is_retried_is_answered_anew(repository: SqlRepository) -> None:
    run_id = start(repository, claim(repository, found()))
    repository.cancel_run(run_id)
    [due] = repository.claim_answers(limit=5, seconds=60)
    assert repository.settle_answer(due.id, due.token, DropState.CANCELLED, "last", seconds=5)
    assert repository.claim_answers(limit=5, seconds=60) == []
    repository.retry_run(run_id)
    [due] = repository.claim_answers(limit=5, seconds=60)
    assert due.answer is None
    repository.register_worker(worker())
    assert finish(repository) == 1


def test_a_cancel_file_cancels_once_what_was_there_before_it(repository: SqlRepository, engine: sa.Engine) -> None:
    run_id = start(repository, claim(repository, found()))
    file = "s3://b/in/x.cancel"
    assert repository.cancel_drops([]) == []
    assert repository.cancel_drops([Cancel("s3://b/in/other.cancel", "1", NOON, "acme")]) == []
    assert repository.cancel_drops([Cancel(file, "1", NOON - timedelta(seconds=1), "acme")]) == []
    assert repository.audit() == []
    assert repository.cancel_drops([Cancel(file, "1", NOON, "acme")]) == [run_id]
    [row] = repository.audit(subject=f"run:{run_id}")
    assert (row.who, row.via, row.action, row.details) == ("acme", "inbox", "runs cancel", {"file": file})
    assert repository.run(run_id).state is RunState.CANCELLED
    repository.retry_run(run_id)
    assert repository.cancel_drops([Cancel(file, "1", NOON, "acme")]) == []  # the file that still lies there
    assert len(repository.audit()) == 1
    assert repository.cancel_drops([Cancel(file, "2", NOON + timedelta(seconds=1), "acme")]) == [run_id]
    with engine.begin() as conn:
        assert conn.scalar(sa.select(t.inbox.c.cancelled_by)) == "2"


def test_a_refused_drop_is_tried_again_when_asked(repository: SqlRepository) -> None:
    drop = claim(repository, found())
    by = Act("alice", "cli", "inbox retry")
    for which in (drop.id, drop.uri):
        with pytest.raises(SettingsError, match="is claimed: `workers beat` acts on it"):
            repository.retry_drop(which, by=by)
    assert repository.settle_drop(drop.id, drop.token, DropState.REFUSED, "x.yaml:1: no\0table")
    [row] = repository.drops()
    assert (row.state, row.error) == (DropState.REFUSED, "x.yaml:1: no�table")
    assert repository.claimable_drops([(drop.uri, "1")]) == []
    assert repository.audit() == []
    assert repository.retry_drop(drop.uri, by=by).id == drop.id
    assert [(row.action, row.subject) for row in repository.audit()] == [("inbox retry", f"drop:{drop.id}")]
    again = repository.claim_lost_drop(seconds=60)
    assert again is not None
    run_id = start(repository, again)
    with pytest.raises(SettingsError, match=f"has run {run_id}: `runs retry {run_id}`"):
        repository.retry_drop(drop.id)
    for unknown in (99, "s3://b/in/z.yaml"):
        with pytest.raises(ObjectNotFound, match=f"no drop {unknown}"):
            repository.retry_drop(unknown)


def test_a_drop_without_what_its_state_says_is_found(repository: SqlRepository, engine: sa.Engine) -> None:
    start(repository, claim(repository, found()))
    claim(repository, found("y.yaml"))
    with engine.begin() as conn:
        before = conn.execute(sa.select(t.inbox.c.id, t.inbox.c.run_id, t.inbox.c.claimed_until)).all()
        conn.execute(sa.update(t.inbox).values(run_id=None, claimed_until=None))
    assert sorted(each.rule for each in repository.verify()) == [
        "a drop has a run just when it was accepted",
        "a drop that is not settled is looked at again",
        "a drop that is not settled is looked at again",
    ]
    with engine.begin() as conn:
        for row in before:
            back = sa.update(t.inbox).where(t.inbox.c.id == row.id)
            conn.execute(back.values(run_id=row.run_id, claimed_until=row.claimed_until))
