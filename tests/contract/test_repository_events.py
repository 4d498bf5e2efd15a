"""The outbox in both databases: a run that ends and its event are one, and each send is one beat's at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from kontext_batch.lineage import events, runs
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.repository import SqlRepository
from kontext_batch.planning.events import ClaimedSend, Webhook, name_of
from kontext_batch.planning.states import RunState
from tests.contract.plans import failed, finish, make_plan, submit, worker

ANY = Webhook("any", frozenset({"run.finished"}))


def end_as(repository: SqlRepository, state: RunState) -> int:
    """A run that is about to end as `state`: `finish_runs`, or `cancel_run`, gives it that."""
    repository.register_worker(worker())
    run_id = submit(repository, make_plan({f"{state}-a": [], f"{state}-b": []}))
    if state is RunState.PARTIAL:
        [first] = repository.claim("w1", limit=1, lease_seconds=60)
        repository.commit(None, [failed(first)])
    elif state is RunState.FAILED:
        repository.commit(None, [failed(step) for step in repository.claim("w1", limit=2, lease_seconds=60)])
    if state in (RunState.DONE, RunState.PARTIAL):
        finish(repository)
    return run_id


def ending(repository: SqlRepository, run_id: int, state: RunState) -> Callable[[], object]:
    return repository.finish_runs if state is not RunState.CANCELLED else lambda: repository.cancel_run(run_id)


def rows(engine: sa.Engine, table: sa.Table) -> list[Any]:
    with engine.begin() as conn:
        return list(conn.execute(sa.select(table).order_by(table.c.id)))


def an_event(repository: SqlRepository, webhooks: list[Webhook]) -> int:
    run_id = end_as(repository, RunState.DONE)
    repository.finish_runs()
    repository.address_events(webhooks)
    return run_id


ENDS = [RunState.DONE, RunState.PARTIAL, RunState.FAILED, RunState.CANCELLED]


@pytest.mark.parametrize("state", ENDS)
def test_a_run_that_ends_makes_one_event(repository: SqlRepository, engine: sa.Engine, state: RunState) -> None:
    run_id = end_as(repository, state)
    assert rows(engine, t.events) == []
    end = ending(repository, run_id, state)
    end()
    end()
    [event] = rows(engine, t.events)
    assert (event.name, event.run_id, event.owner) == (name_of(state), run_id, "studio")
    summary = repository.run(run_id)
    assert summary.state is state
    assert summary.finished is not None
    assert event.data["state"] == state.value
    assert event.data["finished"] == summary.finished.isoformat()
    assert event.data["steps"] == {each.value: number for each, number in summary.steps.items()}


@pytest.mark.parametrize("state", ENDS)
def test_there_is_no_end_without_its_event_nor_an_event_without_its_end(
    repository: SqlRepository, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch, state: RunState
) -> None:
    run_id = end_as(repository, state)

    def written_and_lost(conn: sa.Connection, summary: Any) -> None:
        events.note_end(conn, summary)
        raise RuntimeError("the process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "note_end", written_and_lost)
        with pytest.raises(RuntimeError):
            ending(repository, run_id, state)()
    assert repository.run(run_id).state is RunState.RUNNING
    assert rows(engine, t.events) == []
    ending(repository, run_id, state)()
    assert repository.run(run_id).state is state
    assert len(rows(engine, t.events)) == 1


def test_a_run_that_is_retried_ends_again(repository: SqlRepository, engine: sa.Engine) -> None:
    run_id = end_as(repository, RunState.FAILED)
    repository.finish_runs()
    repository.retry_run(run_id)
    finish(repository)
    repository.finish_runs()
    first, second = rows(engine, t.events)
    assert [first.name, second.name] == ["run.failed", "run.done"]
    assert first.uid != second.uid


def test_an_event_is_addressed_once_to_those_who_want_it(repository: SqlRepository, engine: sa.Engine) -> None:
    repository.register_worker(worker())
    webhooks = [
        ANY,
        Webhook("faults", frozenset({"run.failed", "run.partial"})),
        Webhook("mine", frozenset({"run.done"}), owners=frozenset({"studio"})),
        Webhook("others", frozenset({"run.done"}), owners=frozenset({"press"})),
    ]
    an_event(repository, webhooks)
    assert repository.address_events(webhooks) == 0
    assert [row.webhook for row in rows(engine, t.event_sends)] == ["any", "mine"]


def test_an_event_that_nobody_was_there_to_send_is_for_nobody(repository: SqlRepository, engine: sa.Engine) -> None:
    end_as(repository, RunState.DONE)
    repository.finish_runs()
    with engine.begin() as conn:
        conn.execute(sa.update(t.events).values(created=datetime.now(UTC) - timedelta(days=8)))
    assert repository.address_events([ANY]) == 0
    assert rows(engine, t.event_sends) == []
    assert rows(engine, t.events)[0].addressed is not None


def claim(repository: SqlRepository, *, seconds: float = 60, limit: int = 10) -> list[ClaimedSend]:
    return list(repository.claim_sends(["any"], limit=limit, seconds=seconds))


def test_a_send_is_claimed_by_one_and_fenced(repository: SqlRepository, engine: sa.Engine) -> None:
    run_id = an_event(repository, [ANY])
    [first] = claim(repository, seconds=-1)  # its sender is lost at once
    [second] = claim(repository)
    assert claim(repository) == []
    assert (first.event_id, first.event, first.data["run"]) == (second.event_id, "run.done", run_id)
    assert (first.tries, second.tries) == (1, 2)
    assert not repository.settle_send(first.id, first.token)
    assert repository.settle_send(second.id, second.token)
    assert not repository.settle_send(second.id, second.token, error="late")
    [row] = rows(engine, t.event_sends)
    assert (row.state, row.error, row.tries) == ("delivered", None, 2)


def test_a_send_that_failed_waits_or_is_given_up(repository: SqlRepository, engine: sa.Engine) -> None:
    an_event(repository, [ANY])
    [send] = claim(repository)
    assert repository.settle_send(send.id, send.token, error="HTTP 500", retry_in=3600)
    assert claim(repository) == []
    with engine.begin() as conn:
        conn.execute(sa.update(t.event_sends).values(due=datetime.now(UTC) - timedelta(seconds=1)))
    [send] = claim(repository)
    assert repository.settle_send(send.id, send.token, error="not tried", retry_in=-1, untried=True)
    [send] = claim(repository)
    assert send.tries == 2
    assert repository.settle_send(send.id, send.token, error="password=pw1234 was refused", retry_in=None)
    assert claim(repository) == []
    [row] = repository.webhook_rows()
    assert (row.webhook, row.waiting, row.delivered, row.given_up) == ("any", 0, 0, 1)
    assert row.last_error == "password=*** was refused"
    assert repository.standing().sends == {("any", "given_up"): 1}


def test_a_webhook_that_is_not_set_any_more_is_left_alone(repository: SqlRepository) -> None:
    an_event(repository, [ANY, Webhook("gone", frozenset({"run.done"}))])
    assert [send.webhook for send in claim(repository)] == ["any"]


def test_senders_at_once_claim_each_send_once(repository: SqlRepository) -> None:
    for number in range(12):
        repository.cancel_run(submit(repository, make_plan({f"a{number}": []})))
    made = repository.address_events([ANY])
    assert made == 12
    claimed: list[int] = []

    def work() -> None:
        while found := claim(repository, limit=2):
            claimed.extend(send.id for send in found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(set(claimed))
    assert len(claimed) == made
