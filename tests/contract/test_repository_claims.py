"""Leases: who gets what, how long, and what becomes of it when a worker is lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa

from kontext_batch.lineage import tables as t
from kontext_batch.lineage.claim import SILENT_SECONDS
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.lineage.sql import now_plus
from kontext_batch.planning.states import StepState
from kontext_batch.ports import InHand, LeasedStep, Ready, Share, StepFailed
from kontext_batch.services.turns import Turns
from tests.contract.plans import (
    LANE,
    LEASE,
    artifact_of,
    claim,
    done,
    failed,
    finish,
    held_by,
    key,
    make_plan,
    source,
    submit,
    worker,
)

S = StepState


pytestmark = pytest.mark.usefixtures("two_workers")


def names(steps: list[LeasedStep]) -> list[str]:
    return [step.params["name"] for step in steps]


def lose(repository: SqlRepository, worker_id: str = "w1") -> None:
    repository.reconcile(gone_workers=[worker_id])
    repository.register_worker(worker(worker_id))


def run_out(repository: SqlRepository, worker_id: str, steps: Sequence[LeasedStep]) -> None:
    repository.extend_leases(worker_id, 0.0, held_by(steps))
    time.sleep(0.002)


def state_of(repository: SqlRepository, name: str) -> StepState:
    return repository.find_steps(key(name))[0].state


def test_a_claim_takes_the_highest_priority_then_the_oldest(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}), priority=1)
    submit(repository, make_plan({"c": [], "d": []}), priority=2)
    assert names(claim(repository, limit=3)) == ["c", "d", "a"]  # filled up from the next run
    assert names(claim(repository, "w2", limit=3)) == ["b"]
    assert claim(repository) == []


def test_a_claim_is_of_one_lane(repository: SqlRepository) -> None:
    lanes = {"b": "edit/other", "d": "edit/other"}
    submit(repository, make_plan({name: [] for name in "abcd"}, lanes=lanes))
    assert names(claim(repository)) == ["b", "d"]  # of one run, by the lane's name
    assert names(claim(repository)) == ["a", "c"]


def test_the_ranking_is_asked_with_all_that_is_ready_and_leased(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({name: [] for name in "abc"}, lanes={"c": "operations"}), priority=3)
    second = submit(repository, make_plan({"d": [], "e": ["d"]}))
    claim(repository, limit=1)
    told: list[Ready] = []

    def nothing(ready: Sequence[Ready]) -> list[Share]:
        told.extend(ready)
        return []

    assert claim(repository, ranking=nothing) == []
    assert told == [
        Ready(first, "studio", 3, LANE, 1, 1, "r.yaml"),
        Ready(first, "studio", 3, "operations", 1, 1, "r.yaml"),
        Ready(second, "studio", 0, LANE, 0, 1, "r.yaml"),
    ]


def test_what_the_ranking_allows_is_claimed_and_no_more(repository: SqlRepository) -> None:
    first = submit(repository, make_plan({name: [] for name in "abc"}))
    second = submit(repository, make_plan({name: [] for name in "def"}, lanes={"f": "edit/other"}))
    shares = [Share(second, LANE, limit=1), Share(second, "edit/other"), Share(first, LANE, limit=2)]
    assert names(claim(repository, ranking=lambda ready: shares)) == ["d", "a", "b"]
    shares = [Share(first, "edit/none"), Share(first, LANE, limit=0)]
    assert names(claim(repository, ranking=lambda ready: shares)) == []


def test_a_lane_that_is_not_served_is_left_alone(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}, lanes={"b": "operations"}), priority=3)
    assert names(claim(repository, ranking=Turns(lanes=lambda lane: lane == "operations"))) == ["b"]
    assert claim(repository, ranking=Turns(lanes=lambda lane: False)) == []
    assert names(claim(repository, ranking=Turns(lanes=lambda lane: lane == LANE))) == ["a"]


def test_caps_hold_while_many_workers_claim_at_once(repository: SqlRepository) -> None:
    for start in range(0, 60, 20):
        submit(repository, make_plan({f"s{start + index}": [] for index in range(20)}))
    for name in ("w1", "w2", "w3", "w4"):
        repository.register_worker(worker(name))
    claimed: list[LeasedStep] = []

    def work(name: str) -> None:
        turns = Turns(run_cap=5, owner_cap=11)
        for _ in range(8):
            claimed.extend(claim(repository, name, limit=3, ranking=turns, capped=turns.capped))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("w1", "w2", "w3", "w4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by_run = Counter(step.run_id for step in claimed)
    assert sum(by_run.values()) == 11
    assert max(by_run.values()) <= 5
    repository.release(held_by(claimed))
    assert len(claim(repository, ranking=Turns(run_cap=5), capped=True)) == 8  # 5 of one run and 3 of another


def test_a_claim_can_be_kept_to_one_run(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}, lanes={"b": "edit/other"}), priority=5)
    second = submit(repository, make_plan({"b": [], "c": []}, lanes={"b": "edit/other"}))
    assert names(claim(repository, run_id=second)) == ["c"]  # on its own account
    assert names(claim(repository, run_id=second)) == ["b"]  # on that of the other, and wanted too
    assert claim(repository, run_id=second) == []
    assert names(claim(repository)) == ["a"]


def test_a_claim_brings_everything_that_the_step_reads(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": [], "c": ["a", "b", "a"]}))
    first, second = claim(repository)
    assert [(each.role, each.position, each.uri, each.sha256) for each in first.sources] == [
        ("image", 0, source("a").uri, source("a").sha256)
    ]
    assert (first.key, first.operation, first.lane, first.params) == (key("a"), "edit", LANE, {"name": "a"})
    assert first.parents == ()
    repository.commit(None, [done(first, latents=True), done(second)])
    [third] = claim(repository)
    assert third.sources == ()
    read = [(each.role, each.position, each.key, each.artifact, each.latents) for each in third.parents]
    with_latents = artifact_of(first), artifact_of(first, slot="latents")
    assert read == [
        ("image", 0, key("a"), *with_latents),
        ("reference", 0, key("b"), artifact_of(second), None),
        ("reference", 1, key("a"), *with_latents),
    ]


def test_tokens_grow_with_each_claim(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    for token in (1, 2, 3):
        [step] = claim(repository)
        assert (step.token, step.attempt) == (token, 1)
        repository.release(held_by([step]))


def test_a_release_costs_no_attempt(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    one, two = claim(repository)
    repository.release([(one.id, one.token), (two.id, two.token + 1)])
    assert (state_of(repository, "a"), state_of(repository, "b")) == (S.READY, S.LEASED)
    assert [row.outcome for row in repository.attempts(one.id)] == ["released"]
    [again] = claim(repository)
    assert (again.attempt, again.losses) == (1, 0)
    repository.release([])
    assert not repository.verify()


def test_goodbye_gives_leases_back_at_no_cost(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    [kept] = claim(repository, "w2", limit=1)
    [step] = claim(repository)
    repository.retire_worker("w1")
    assert [each.id for each in repository.workers()] == ["w2"]
    assert (state_of(repository, "b"), state_of(repository, "a")) == (S.READY, S.LEASED)
    assert repository.attempts(step.id)[0].outcome == "released"
    assert repository.commit(None, [done(kept)]).committed == (kept.id,)
    repository.register_worker(worker("w1"))
    assert {each.id for each in repository.workers()} == {"w1", "w2"}
    assert repository.workers()[0].engine == {"torch": "2"}
    assert not repository.verify()


def test_the_heartbeat_keeps_a_lease(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    [mine] = claim(repository, limit=1)
    theirs = claim(repository, "w2")
    run_out(repository, "w1", [mine])
    run_out(repository, "w2", theirs)
    assert repository.extend_leases("w1", LEASE, held_by([mine])) == 1
    assert repository.reconcile().returned == 1
    assert repository.extend_leases("w2", LEASE, held_by(theirs)) == 0
    assert repository.commit(None, [done(mine)]).committed == (mine.id,)


def test_the_heartbeat_keeps_no_lease_that_its_worker_knows_nothing_of(repository: SqlRepository) -> None:
    """As a database has them that came back without its last commits: the worker has done that step long ago."""
    submit(repository, make_plan({"a": [], "b": []}))
    forgotten = claim(repository, limit=1)
    [known] = claim(repository, limit=1)
    run_out(repository, "w1", [*forgotten, known])
    assert repository.extend_leases("w2", LEASE, held_by([known])) == 0, "somebody else's of the same token"
    assert repository.extend_leases("w1", LEASE, held_by([known])) == 1
    assert repository.reconcile().returned == 1
    assert names(claim(repository, "w2")) == names(forgotten)


def test_a_lease_that_ran_out_returns_its_step(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    [step] = claim(repository)
    assert repository.reconcile().returned == 0
    run_out(repository, "w1", [step])
    assert claim(repository, "w2") == [], "it is returned by reconcile, not by a claim"
    report = repository.reconcile()
    assert (report.returned, report.quarantined) == (1, 0)
    [row] = repository.attempts(step.id)
    assert (row.outcome, row.error) == ("lost", "the worker is gone, or was silent for too long")
    assert row.ended is not None
    [again] = claim(repository, "w2")
    assert (again.token, again.losses) == (2, 1)
    assert not repository.verify()


def test_leases_of_a_process_that_is_gone_return_at_once(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": []}))
    claim(repository, "w1", limit=1)
    claim(repository, "w2", limit=1)
    assert repository.reconcile(gone_workers=["w1", "unknown"]).returned == 1
    assert [each.id for each in repository.workers()] == ["w2"]
    assert (state_of(repository, "a"), state_of(repository, "b")) == (S.READY, S.LEASED)
    assert repository.reconcile(gone_workers=["w1"]).returned == 0


def test_after_a_loss_the_steps_of_that_batch_go_one_by_one(repository: SqlRepository) -> None:
    submit(repository, make_plan({name: [] for name in "abcde"}))
    claim(repository, limit=3)
    lose(repository)
    assert names(claim(repository)) == ["a"]
    assert names(claim(repository)) == ["b"]
    assert names(claim(repository)) == ["c"]
    assert names(claim(repository)) == ["d", "e"]


def test_a_step_to_be_claimed_alone_is_left_out_of_other_batches(repository: SqlRepository) -> None:
    submit(repository, make_plan({"b": [], "c": []}))
    claim(repository, limit=1)
    lose(repository)
    submit(repository, make_plan({"a": []}), priority=1)
    assert names(claim(repository)) == ["a", "c"]
    assert names(claim(repository)) == ["b"]


def test_a_step_that_loses_three_workers_is_quarantined(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": ["a"], "c": ["b"]}))
    for losses in (0, 1, 2):
        [step] = claim(repository)
        assert step.losses == losses
        lose(repository)
    assert [row.state for row in repository.run_steps(run_id)] == [S.QUARANTINED, S.SKIPPED, S.SKIPPED]
    [first, *_] = repository.run_steps(run_id)
    assert first.error is not None
    assert "3 workers" in first.error
    assert claim(repository) == []
    assert not repository.verify()
    assert repository.retry_run(run_id) == 3
    assert names(claim(repository)) == ["a"]


def test_losses_and_faults_are_counted_apart(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    claim(repository)
    lose(repository)
    [step] = claim(repository)
    repository.commit(None, [failed(step, retry_in=0.0)])
    [step] = claim(repository)
    assert (step.losses, step.attempt) == (1, 3)
    lose(repository)
    [step] = claim(repository)
    assert step.losses == 2


def test_a_step_that_is_put_back_waits_its_time(repository: SqlRepository) -> None:
    run_id = submit(repository, make_plan({"a": [], "b": []}))
    one, two = claim(repository)
    report = repository.commit(None, [failed(one, retry_in=0.0), failed(two, retry_in=3600.0)])
    assert (report.committed, report.woken) == ((one.id, two.id), {})
    [again] = claim(repository)
    assert claim(repository, run_id=run_id) == []
    assert (again.id, again.attempt, again.token) == (one.id, 2, 2)
    assert [row.error for row in repository.run_steps(run_id)] == ["it went wrong"] * 2
    repository.commit(None, [done(again)])
    assert repository.run_steps(run_id)[0].error is None
    assert not repository.verify()


def test_a_claim_by_an_unknown_worker_is_our_own_mistake(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": []}))
    with pytest.raises(sa.exc.IntegrityError):
        claim(repository, "nobody")
    assert state_of(repository, "a") is S.READY


def test_blocked_steps_are_not_claimed(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": ["a"]}))
    assert names(claim(repository)) == ["a"]
    assert claim(repository) == []


def test_finish_works_everything_off(repository: SqlRepository) -> None:
    graph = {"a": [], **{f"b{i}": ["a"] for i in range(20)}, "c": [f"b{i}" for i in range(20)]}
    submit(repository, make_plan(graph))
    assert finish(repository) == 22
    assert not repository.verify()


def test_a_worker_that_was_silent_for_too_long_counts_as_gone_until_it_is_heard_of(
    repository: SqlRepository, engine: sa.Engine
) -> None:
    """Of another host, which nobody here can look at: each pod has a name of its own."""
    repository.register_worker(worker("pod-1"))
    repository.register_worker(worker("pod-2"))
    with engine.begin() as conn:
        conn.execute(
            sa.update(t.workers).where(t.workers.c.id == "pod-1").values(heartbeat=now_plus(-2 * SILENT_SECONDS))
        )
    repository.reconcile()
    assert {each.id for each in repository.workers()} & {"pod-1", "pod-2"} == {"pod-2"}
    repository.extend_leases("pod-1", LEASE, ())
    assert {each.id for each in repository.workers()} >= {"pod-1", "pod-2"}


def test_a_delivery_that_is_put_off_is_given_to_nobody_for_a_while(repository: SqlRepository) -> None:
    repository.register_worker(worker())
    submit(repository, make_plan({"a": [], "b": []}, deliver=["a", "b"]))
    repository.commit(None, [done(step) for step in repository.claim("w1", limit=8, lease_seconds=LEASE)])
    first, second = repository.claim_deliveries("w1", limit=8, seconds=300)
    assert repository.claim_deliveries("w2", limit=8, seconds=300) == []
    repository.settle_deliveries("w1", [], back=[first.id], later=[second.id])
    assert [each.id for each in repository.claim_deliveries("w2", limit=8, seconds=300)] == [first.id]
    repository.settle_deliveries("w1", [], back=[first.id])
    assert repository.claim_deliveries("w1", limit=8, seconds=300) == [], "it is another's by now"
    repository.retire_worker("w2")
    assert [each.id for each in repository.claim_deliveries("w1", limit=8, seconds=300)] == [first.id]


def test_a_run_is_held_back_by_its_own_backlog_unless_another_needs_its_steps(repository: SqlRepository) -> None:
    repository.register_worker(worker())
    lanes = dict.fromkeys(("o1", "o2", "o3"), "operations")
    first = submit(repository, make_plan(dict.fromkeys(lanes, ()) | {"clean": ()}, recipe="first", lanes=lanes))
    alone = submit(repository, make_plan({"p1": (), "e": ()}, recipe="alone", lanes={"p1": "operations"}))
    assert list(repository.backlogged_runs(3)) == []
    assert list(repository.backlogged_runs(2)) == [first]
    second = submit(repository, make_plan({"clean": (), "mine": ("clean",)}, recipe="second"))
    assert list(repository.backlogged_runs(2)) == [], "the second would wait for `clean` for ever"
    repository.pause_run(second)
    assert list(repository.backlogged_runs(2)) == [first]
    repository.resume_run(second)
    held = Turns(lanes=lambda lane: lane != "operations", backlogged=frozenset(repository.backlogged_runs(2)))
    assert {step.run_id for step in claim(repository, ranking=held)} >= {first, alone}
    assert list(repository.backlogged_runs(2)) == [first], "nobody waits for it any more: it is leased"


# -------------------------------------------------------------------------------------- beside what is in hand


def limited(step: LeasedStep, batch_limit: int) -> StepFailed:
    return replace(failed(step, retry_in=0.0), batch_limit=batch_limit)


def test_steps_join_what_is_in_hand_until_another_lane_has_its_turn(repository: SqlRepository) -> None:
    submit(repository, make_plan({"a": [], "b": [], "c": []}, lanes={"c": "operations"}))
    [a] = claim(repository, limit=1)
    [b] = claim(repository, in_hand=InHand(LANE, 1))
    assert [a.lane, b.lane] == [LANE, LANE]
    assert claim(repository, in_hand=InHand(LANE, 2)) == []
    assert names(claim(repository)) == ["c"]


def test_a_step_with_a_batch_limit_waits_in_its_turn_for_room(repository: SqlRepository) -> None:
    submit(repository, make_plan({name: [] for name in "abcd"}))
    [a, b] = claim(repository, limit=2)
    repository.commit(None, [limited(a, 1), limited(b, 2)])
    for in_hand in (InHand(LANE, 2), InHand(LANE, 1)):
        assert claim(repository, in_hand=in_hand) == [], "what comes after it waits as well"
    [alone] = claim(repository)
    assert (alone.id, alone.batch_limit) == (a.id, 1)
    repository.commit(None, [done(alone)])
    assert claim(repository, in_hand=InHand(LANE, 2)) == []
    beside = claim(repository, in_hand=InHand(LANE, 1))
    assert [(step.id, step.batch_limit) for step in beside] == [(b.id, 2)]
    assert names(claim(repository, in_hand=InHand(LANE, 2))) == ["c", "d"]
