"""Rings, on a broker that lives in this process."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from kontext_batch.messaging.app import edits_queue, make_app
from kontext_batch.messaging.wake_ups import MOST_WAITING, CeleryWakeUps

URL = "memory://"


def ring(wake_ups: CeleryWakeUps) -> None:
    with capture_logs() as logs:
        wake_ups.wake({"edit/tiny": 1})
    assert logs == [], "it was taken"


def made() -> CeleryWakeUps:
    return CeleryWakeUps(make_app(URL, queue_prefix="test"), batch_rows=8)


def test_who_closes_takes_nobody_elses_connections() -> None:
    """A beat opens and closes a workspace for each recipe that it plans; kombu keeps one pool for equal URLs."""
    first, second = made(), made()
    ring(first)
    ring(second)
    second.close()
    ring(first)
    first.close()
    third = made()
    ring(third)
    third.close()


def test_nothing_but_json_is_decoded_and_no_result_is_kept() -> None:
    app = make_app(URL, queue_prefix="test")
    assert list(app.conf.accept_content) == ["json"]
    assert app.conf.task_serializer == app.conf.event_serializer == "json"
    assert not app.conf.result_backend
    app.close()


@pytest.mark.parametrize("steps", [1, 8, 9, 10_000])
def test_a_ring_names_a_lane_and_nothing_else(steps: int) -> None:
    app = make_app(URL, queue_prefix=f"test-{steps}")
    wake_ups = CeleryWakeUps(app, batch_rows=8)
    wake_ups.wake({"edit/tiny": steps})
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(edits_queue(f"test-{steps}"))
        rings = [queue.get(block=False) for _ in range(min(8, -(-steps // 8)))]
        assert queue.qsize() == 0
        for each in rings:
            assert each.content_type == "application/json"
            assert each.payload[:2] == [["edit/tiny"], {}]
            each.ack()
        queue.close()
    wake_ups.close()


def test_rings_do_not_expire_and_do_not_pile_up() -> None:
    """An expiry is compared with the clock of whoever takes the ring; one that goes wrong would take all of them."""
    app = make_app(URL, queue_prefix="test-pile")
    wake_ups = CeleryWakeUps(app, batch_rows=8)
    for _ in range(20):
        wake_ups.wake({"edit/tiny": 10_000})
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(edits_queue("test-pile"))
        assert queue.qsize() == MOST_WAITING
        ring = queue.get(block=False)
        assert not ring.headers["expires"]
        ring.ack()
        queue.clear()
        queue.close()
    wake_ups.close()
