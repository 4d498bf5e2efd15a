"""A photo is forgotten: what came from it goes, nothing of it comes back, whatever workers do meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Collection
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from kontext_batch.errors import Held, PlanRefused
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.inbox import DropState, NewDrop
from kontext_batch.planning.states import LIVE, RunState, StepState
from kontext_batch.ports import Act, Descent, SettledDelivery, StepDone
from tests.contract.plans import (
    LEASE,
    artifact_of,
    done,
    finish,
    held_by,
    make_plan,
    new_run,
    settle,
    source,
    submit,
    worker,
)

BY = Act("ann", "cli", "forget")
PHOTO = source("a").sha256


@pytest.fixture(autouse=True)
def _workers(repository: SqlRepository) -> None:
    repository.register_worker(worker("w1"))


def take_down(
    repository: SqlRepository, photo: str = PHOTO, *, uris: Collection[str] = (), despite_hold: bool = False
) -> Descent:
    return repository.take_down(
        photo, "consent withdrawn", uris=uris, removes=lambda uri: False, despite_hold=despite_hold, by=BY
    )


def bury(repository: SqlRepository) -> list[str]:
    """Delete what was taken down; returns URIs of artifacts."""
    deleted: list[str] = []
    for stone in repository.tombstones(pending=True):
        if stone.kind == "artifact":
            assert repository.bury_artifact(stone.sha256, stone.uri, deleted.append)
        else:
            repository.settle_tombstone(stone.sha256, stone.uri, deleted=True)
    repository.withdraw()
    return sorted(deleted)


def states(repository: SqlRepository, run_id: int) -> dict[str, StepState]:
    return {row.node: row.state for row in repository.run_steps(run_id)}


def test_all_that_came_from_a_photo_is_found_under_whichever_path_it_lay(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({"a": [], "b": ["a"], "x": [], "y": ["x"]}, deliver=["b", "y"]))
    second = submit(repository, make_plan({"a": [], "c": ["a", "x"], "x": []}, deliver=["c"], folder="else"))
    finish(repository)
    for each in repository.pending_deliveries():
        settle(repository, each)
    repository.finish_runs()
    found = repository.descent(PHOTO)
    assert (found.steps, found.live, found.runs) == (3, 0, (first, second))
    assert found.uris == ("file:///in/a.png",)
    assert [each.path for each in found.deliveries] == ["file:///out/b.png", "file:///else/c.png"]
    made = {row.artifact.sha256 for node in "abc" for row in repository.find_steps(node) if row.artifact}
    assert {each.sha256 for each in found.artifacts} == made
    assert repository.descent("0" * 64).steps == 0
    assert repository.photos("file:///in/a.png") == [PHOTO]


def test_what_was_taken_down_is_deleted_and_stays_known(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "x": []}, deliver=["b", "x"]))
    finish(repository)
    for each in repository.pending_deliveries():
        settle(repository, each)
    repository.finish_runs()
    told = take_down(repository, uris=["file:///copy/a.png"])
    gone = bury(repository)
    assert gone == sorted(each.uri for each in told.artifacts)
    assert len(gone) == 2
    assert [(each.kind, each.uri, each.deleted is not None) for each in repository.tombstones(photo=PHOTO)][2:] == [
        ("file", "file:///out/b.png", True),
        ("photo", "file:///copy/a.png", False),
        ("photo", "file:///in/a.png", False),
    ]
    assert {each.who for each in repository.tombstones()} == {"ann"}
    assert states(repository, run_id) == dict.fromkeys("abx", StepState.DONE), "rows stay for the lineage"
    after = repository.descent(PHOTO)
    assert (after.steps, after.artifacts) == (2, ())
    assert [each.withdrawn is None for each in after.deliveries] == [False]
    assert list(repository.artifact_uris()) == [repository.find_steps("x")[0].artifact.uri]  # type: ignore[union-attr]
    assert [(each.action, each.subject) for each in repository.audit()] == [("forget", f"photo:{PHOTO}")]
    take_down(repository)
    assert bury(repository) == [], "done twice, nothing is left to be done"
    assert not repository.verify()


def test_no_plan_reads_it_again_and_nothing_of_it_is_retried(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "x": []}, deliver=["b"]))
    finish(repository, run_id=run_id)
    take_down(repository)
    with pytest.raises(PlanRefused, match=r"r\.yaml:3: file:///in/a\.png was taken down .*consent withdrawn"):
        submit(repository, make_plan({"a": []}))
    assert repository.forgotten([PHOTO, "0" * 64]).keys() == {PHOTO}
    repository.finish_runs()
    assert repository.retry_run(run_id) == 0
    assert list(repository.claim("w1", limit=8, lease_seconds=LEASE)) == []
    assert repository.pending_deliveries() == []
    submit(repository, make_plan({"x": [], "z": ["x"]}))
    assert finish(repository) == 1, "what has nothing to do with it goes on"
    assert not repository.verify()


def test_a_picture_made_from_it_that_is_read_as_a_photo_goes_with_it(
    repository: SqlRepository, engine: sa.Engine
) -> None:
    submit(repository, make_plan({"a": []}, deliver=["a"]))
    submit(repository, make_plan({"reader": [], "below": ["reader"]}))
    finish(repository)
    [made] = repository.find_steps("a")
    [reader] = repository.find_steps("reader")
    assert made.artifact is not None
    with engine.begin() as conn:
        sources = t.step_sources
        conn.execute(sa.update(sources).where(sources.c.step_id == reader.id).values(sha256=made.artifact.sha256))
    found = take_down(repository)
    assert found.steps == 3
    assert made.artifact.sha256 in repository.forgotten([made.artifact.sha256])


def test_bytes_that_others_made_too_stay(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "x": []}))
    one, other = repository.claim("w1", limit=8, lease_seconds=LEASE)
    same = done(one).outputs
    repository.commit(None, [done(one), StepDone(other.id, other.token, same, {})])
    [shared] = repository.descent(PHOTO).shared
    assert shared == artifact_of(one)
    take_down(repository)
    assert bury(repository) == []
    assert list(repository.artifact_uris()) == [shared.uri]
    assert repository.forgotten([shared.sha256]) == {}
    take_down(repository, source("x").sha256)
    assert bury(repository) == [shared.uri], "and go with the last of them"
    assert not repository.verify()


def test_what_others_make_between_takedown_and_deletion_stays(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "x": []}))
    one, other = repository.claim("w1", limit=8, lease_seconds=LEASE)
    repository.commit(None, [done(one)])
    take_down(repository)
    repository.intend_uploads([(artifact_of(one).uri, other.id, other.token)])
    [stone] = repository.tombstones(pending=True)
    deleted: list[str] = []
    assert not repository.bury_artifact(stone.sha256, stone.uri, deleted.append), "somebody is about to put it"
    repository.commit(None, [StepDone(other.id, other.token, done(one).outputs, {})])
    assert repository.bury_artifact(stone.sha256, stone.uri, deleted.append)
    assert deleted == []
    [stone] = [each for each in repository.tombstones() if each.kind == "artifact"]
    assert "made the same bytes" in str(stone.note)


def test_live_steps_are_cancelled_and_leased_ones_fenced(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "x": [], "sheet": ["x", "b"]}, deliver=["sheet"]))
    other = submit(repository, make_plan({"a": []}))
    [leased, free] = repository.claim("w1", limit=8, lease_seconds=LEASE)
    repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in (leased, free)])
    told = take_down(repository)
    assert (told.steps, told.live) == (3, 3)
    assert states(repository, run_id) == {
        "a": StepState.CANCELLED,
        "b": StepState.CANCELLED,
        "x": StepState.LEASED,
        "sheet": StepState.CANCELLED,
    }
    report = repository.commit(None, [done(leased), done(free)])
    assert (report.committed, report.fenced) == ((free.id,), (leased.id,))
    assert repository.extend_leases("w1", LEASE, held_by([leased])) == 0
    assert repository.orphaned_uploads() == [artifact_of(leased).uri]
    repository.intend_uploads([(artifact_of(leased).uri, leased.id, leased.token)])  # a worker that knows of nothing
    assert repository.orphaned_uploads() == [artifact_of(leased).uri]
    assert dict(repository.finish_runs()) == {run_id: RunState.PARTIAL, other: RunState.FAILED}
    assert [attempt.outcome for attempt in repository.attempts(leased.id)] == ["fenced"]
    assert not repository.verify()


@pytest.mark.parametrize("signed", [None, "f" * 64])
def test_a_file_that_is_brought_meanwhile_is_taken_away(repository: SqlRepository, signed: str | None) -> None:
    run_id = submit(repository, make_plan({"a": []}, deliver=["a"]))
    finish(repository)
    [claimed] = repository.claim_deliveries("w1", limit=8, seconds=300.0)
    take_down(repository)
    assert repository.is_claimed(claimed.path)
    kinds = {each.kind for each in repository.tombstones(pending=True)}
    assert kinds == {"artifact", "claim"}
    brought = SettledDelivery(claimed.id, "file:///out/a.v2.png", 2, file_sha256=signed)
    repository.settle_deliveries("w1", [brought])
    assert not repository.is_claimed(claimed.path)
    [file] = [each for each in repository.tombstones(pending=True) if each.kind == "file"]
    assert (file.uri, file.sha256) == (brought.path, signed or claimed.artifact.sha256)
    assert dict(repository.finish_runs()) == {run_id: RunState.DONE}
    assert not repository.verify()


def test_reports_beside_drops_are_written_anew(repository: SqlRepository) -> None:
    plan = make_plan({"a": []}, deliver=["a"])
    new = NewDrop(uri="s3://b/in/x.yaml", etag="1", modified=datetime.now(UTC), owner="acme")
    drop = repository.claim_drop(new, seconds=60)
    assert drop is not None
    repository.create_run(new_run(plan), plan, drop=(drop.id, drop.token))
    finish(repository)
    for each in repository.pending_deliveries():
        settle(repository, each)
    repository.finish_runs()

    def answer() -> None:
        [due] = repository.claim_answers(limit=8, seconds=60)
        assert due.answer is None
        assert repository.settle_answer(due.id, due.token, DropState.FINISHED, "digest", seconds=60)

    answer()
    take_down(repository)
    answer()  # without the pictures
    bury(repository)
    answer()  # without the files
    assert repository.claim_answers(limit=8, seconds=60) == []


def test_a_hold_stands_against_it(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"], "x": []}))
    finish(repository)
    [step] = repository.find_steps("b")
    repository.add_hold(f"step:{step.id}", "case 4711", by=Act("bea", "cli", "holds add"))
    for held in (f"step:{step.id}", f"photo:{PHOTO}"):
        with pytest.raises(Held, match=f"{held} is held by bea: case 4711"):
            take_down(repository)
        repository.release_hold(held, by=BY)
        repository.add_hold(f"photo:{PHOTO}", "case 4711", by=Act("bea", "cli", "holds add"))
    assert repository.tombstones() == []
    take_down(repository, source("x").sha256)
    take_down(repository, despite_hold=True)
    assert len(bury(repository)) == 3


@pytest.mark.timeout(300)
def test_nothing_comes_back_while_workers_compute_and_deliver(repository: SqlRepository, engine: sa.Engine) -> None:
    """Workers commit as fast as they can while photos are forgotten one after the other."""
    photos = [f"p{number}" for number in range(12)]
    graph: dict[str, list[str]] = {}
    for name in photos:
        graph |= {name: [], f"{name}-b": [name], f"{name}-c": [f"{name}-b"]}
    submit(repository, make_plan(graph, deliver=[f"{name}-c" for name in photos]))
    objects: set[str] = set()
    lock, begun, failures = threading.Lock(), threading.Event(), list[BaseException]()

    def work(name: str) -> None:
        try:
            repository.register_worker(worker(name))
            while steps := list(repository.claim(name, limit=3, lease_seconds=LEASE)):
                repository.intend_uploads([(artifact_of(step).uri, step.id, step.token) for step in steps])
                with lock:
                    objects.update(artifact_of(step).uri for step in steps)
                begun.set()
                repository.commit(None, [done(step) for step in steps])
                claimed = repository.claim_deliveries(name, limit=2, seconds=300.0)
                repository.settle_deliveries(name, [SettledDelivery(each.id, each.path, 1) for each in claimed])
        except BaseException as error:
            failures.append(error)

    def delete(uri: str) -> None:
        with lock:
            objects.discard(uri)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(2, 5)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    for name in photos[::2]:
        take_down(repository, source(name).sha256)
        for stone in repository.tombstones(pending=True):
            if stone.kind == "artifact":
                repository.bury_artifact(stone.sha256, stone.uri, delete)
    for thread in threads:
        thread.join(120)
    assert failures == []
    finish(repository)  # what waited for others' commits
    for each in repository.claim_deliveries("w1", limit=100, seconds=300.0):
        settle(repository, each)
    repository.forget_uploads(repository.orphaned_uploads(), delete)
    lost = [name for photo in photos[::2] for name in (photo, f"{photo}-b", f"{photo}-c")]
    assert all(row.state not in LIVE for name in lost for row in repository.find_steps(name))
    assert [repository.descent(source(photo).sha256).artifacts for photo in photos[::2]] == [()] * 6
    with engine.begin() as conn:
        kept = set(conn.scalars(sa.select(t.artifacts.c.uri).where(t.artifacts.c.collected_at.is_(None))))
        delivered = set(
            conn.scalars(sa.select(t.deliveries.c.delivered_path).where(t.deliveries.c.state == "delivered"))
        )
    assert objects <= kept, "an object of a forgotten photo lies there still"
    assert len(kept) == 3 * len(photos[1::2])
    files = {each.uri for each in repository.tombstones() if each.kind in ("file", "claim")}
    brought = {f"file:///out/{name}-c.png" for name in photos[::2]} & delivered
    assert brought <= files, "what was delivered of a forgotten photo is known, to be deleted"
    assert not repository.verify()
