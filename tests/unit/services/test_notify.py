"""From the end of a run to its receiver, over a real database and real HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from kontext_batch.errors import StepError
from kontext_batch.lineage import tables as t
from kontext_batch.lineage.engine import close_database, open_database
from kontext_batch.planning.events import MAX_TRIES, retry_delay
from kontext_batch.planning.states import RunState
from kontext_batch.services.notify import Notifier
from kontext_batch.settings import WebhookSettings
from tests.unit.receiver import Receiver, receiving
from tests.unit.services.conftest import Studio


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as found:
        yield found


@pytest.fixture
def notifier(studio: Studio, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Notifier:
    monkeypatch.setenv("DAM_SECRET", "a secret of the DAM")
    hooks = (
        WebhookSettings(name="dam", url=f"{receiver.url}/dam", secret_env="DAM_SECRET"),
        WebhookSettings(name="pager", url=f"{receiver.url}/pager", secret_env="DAM_SECRET", events=("run.failed",)),
    )
    studio.app.settings = studio.app.settings.model_copy(update={"webhooks": hooks})
    return studio.app.notifier()


def let_time_pass(studio: Studio) -> None:
    """Until whatever waits is due."""
    engine = open_database(studio.app.database_url)
    with engine.begin() as conn:
        conn.execute(sa.update(t.event_sends).values(due=datetime.now(UTC) - timedelta(seconds=1)))
    close_database(engine)


def ended(studio: Studio) -> int:
    return studio.worker().run_until_done(studio.submit()).id


def test_the_end_of_a_run_is_told_to_those_who_want_it(studio: Studio, notifier: Notifier, receiver: Receiver) -> None:
    assert notifier.tick() == 0
    run_id = ended(studio)
    assert notifier.tick() == 1
    assert notifier.tick() == 0
    [got] = receiver.requests
    assert got.path == "/dam"
    told = json.loads(got.body)
    assert told["type"] == "run.done"
    assert datetime.fromisoformat(told["timestamp"]).tzinfo is not None
    assert told["data"]["run"] == run_id
    assert (told["data"]["recipe"], told["data"]["owner"]) == ("shop", "studio@acme.example")
    assert (told["data"]["steps"], told["data"]["delivered"]) == ({"done": 10}, 4)


def test_a_run_that_failed_is_told_to_both(studio: Studio, notifier: Notifier, receiver: Receiver) -> None:
    studio.editor.fault = lambda job: StepError("it is grey")
    assert studio.worker().run_until_done(studio.submit()).state is RunState.FAILED
    assert notifier.tick() == 2
    assert sorted(each.path for each in receiver.requests) == ["/dam", "/pager"]
    assert len(set(receiver.ids)) == 1


def test_what_was_refused_is_sent_again_under_the_same_id(
    studio: Studio, notifier: Notifier, receiver: Receiver
) -> None:
    receiver.answers = [500, 204]
    ended(studio)
    assert notifier.tick() == 0
    [row] = studio.app.repository.webhook_rows()
    assert (row.waiting, row.last_error) == (1, "HTTP 500")
    assert notifier.tick() == 0
    assert len(receiver.requests) == 1  # not before its time
    let_time_pass(studio)
    assert notifier.tick() == 1
    first, second = receiver.requests
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert studio.app.repository.webhook_rows()[0].delivered == 1


def test_a_beat_that_dies_between_send_and_record_has_it_sent_again(
    studio: Studio, notifier: Notifier, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(studio)

    def die(*args: Any, **kwargs: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(studio.app.repository), "settle_send", die)
        with pytest.raises(KeyboardInterrupt):
            notifier.tick()
    assert notifier.tick() == 0  # its claim still holds
    let_time_pass(studio)
    assert notifier.tick() == 1
    assert len(receiver.ids) == 2
    assert len(set(receiver.ids)) == 1


def test_a_receiver_that_fails_is_left_alone_for_the_rest_of_the_tick(
    studio: Studio, notifier: Notifier, receiver: Receiver
) -> None:
    receiver.answers = [503]
    for _ in range(3):
        ended(studio)
    assert notifier.tick() == 0
    assert len(receiver.requests) == 1
    receiver.answers = [204]
    let_time_pass(studio)
    assert notifier.tick() == 3
    assert len(set(receiver.ids)) == 3


def test_what_cannot_be_sent_is_given_up_and_stays_to_be_seen(
    studio: Studio, notifier: Notifier, receiver: Receiver
) -> None:
    receiver.answers = [500]
    ended(studio)
    before = REGISTRY.get_sample_value("kontext_batch_webhook_sends_total", {"webhook": "dam", "outcome": "given_up"})
    for _ in range(MAX_TRIES + 1):
        notifier.tick()
        let_time_pass(studio)
    assert len(receiver.requests) == MAX_TRIES
    [row] = studio.app.repository.webhook_rows()
    assert (row.waiting, row.given_up, row.last_error) == (0, 1, "HTTP 500")
    after = REGISTRY.get_sample_value("kontext_batch_webhook_sends_total", {"webhook": "dam", "outcome": "given_up"})
    assert after == (before or 0) + 1


def test_a_receiver_that_wants_nothing_any_more_is_asked_once(
    studio: Studio, notifier: Notifier, receiver: Receiver
) -> None:
    receiver.answers = [410]
    ended(studio)
    notifier.tick()
    let_time_pass(studio)
    notifier.tick()
    assert len(receiver.requests) == 1
    assert studio.app.repository.webhook_rows()[0].given_up == 1


def test_what_ended_while_no_webhook_was_set_is_for_nobody(
    studio: Studio, notifier: Notifier, receiver: Receiver
) -> None:
    ended(studio)
    Notifier(notifier.repository, notifier.post, ()).tick()
    assert notifier.tick() == 0
    assert receiver.requests == []


@pytest.mark.parametrize(("tries", "seconds"), [(1, 5.0), (2, 10.0), (4, 40.0), (16, 21600.0), (17, None)])
def test_tries_are_made_ever_later(tries: int, seconds: float | None) -> None:
    assert retry_delay(tries, spread=lambda: 0.5) == seconds
    if seconds is not None:
        assert retry_delay(tries, spread=lambda: 0.0) == seconds / 2


def test_tries_end_after_more_than_a_day() -> None:
    waits = [retry_delay(tries, spread=lambda: 0.5) for tries in range(1, MAX_TRIES)]
    assert 24 < sum(wait for wait in waits if wait is not None) / 3600 < 48
