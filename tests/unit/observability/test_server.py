"""Metrics and health over a real port."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from kontext_batch.errors import InfrastructureError, SettingsError
from kontext_batch.observability import metrics
from kontext_batch.observability.health import KEPT_SECONDS, Pulse, Readiness
from kontext_batch.observability.server import Served, serve_metrics


class Clock:
    """Moves when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(60, clock)


@pytest.fixture
def asked() -> list[str]:
    """What the check of readiness was asked; it says no with the last of `no`."""
    return []


@pytest.fixture
def no() -> list[Exception]:
    return []


@pytest.fixture
def served(clock: Clock, pulse: Pulse, asked: list[str], no: list[Exception]) -> Iterator[Served]:
    def database() -> None:
        asked.append("database")
        if no:
            raise no[-1]

    readiness = Readiness({"store": lambda: None, "database": database}, clock)
    found = serve_metrics(host="127.0.0.1", port=0, pulse=pulse, readiness=readiness)
    yield found
    found.close()


@pytest.fixture
def get(served: Served) -> Callable[..., tuple[int, str]]:
    def ask(path: str, method: str = "GET") -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", served.port, timeout=10)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    return ask


def test_metrics_are_scraped(get: Callable[..., tuple[int, str]]) -> None:
    metrics.STEPS.labels("edit/scraped", "done").inc(3)
    status, text = get("/metrics")
    assert status == 200
    assert 'kontext_batch_steps_total{lane="edit/scraped",outcome="done"} 3.0' in text
    assert "process_resident_memory_bytes" in text


def test_a_process_is_healthy_while_it_comes_on(
    get: Callable[..., tuple[int, str]], pulse: Pulse, clock: Clock
) -> None:
    clock.now += 1000
    assert get("/healthz") == (200, '{"healthy": true}\n')  # it has nothing to do
    with pulse.working():
        assert get("/healthz")[0] == 200
        clock.now += 61
        status, text = get("/healthz")
        assert (status, json.loads(text)) == (503, {"healthy": False, "silent_seconds": 61.0})
        pulse.beat()
        assert get("/healthz")[0] == 200
        clock.now += 61
    assert get("/healthz")[0] == 200


def test_ready_is_who_can_reach_what_it_needs(
    get: Callable[..., tuple[int, str]], asked: list[str], no: list[Exception], clock: Clock
) -> None:
    assert get("/readyz") == (200, '{"ready": true, "faults": {}}\n')
    no.append(InfrastructureError("no connection to postgresql://kontext:pw1234@db/kontext"))
    assert get("/readyz")[0] == 200  # who asks often gets the last answer
    assert asked == ["database"]
    clock.now += KEPT_SECONDS
    status, text = get("/readyz")
    assert status == 503
    assert json.loads(text)["faults"] == {"database": "no connection to postgresql://***@db/kontext"}
    no.clear()
    clock.now += KEPT_SECONDS
    assert get("/readyz")[0] == 200


def test_checks_that_hang_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kontext_batch.observability.health.WAIT_SECONDS", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    def hang() -> Any:
        begun.set()
        return go_on.wait(10)

    readiness = Readiness({"database": hang})
    first = threading.Thread(target=readiness.faults)
    first.start()
    assert begun.wait(10)
    assert "at work" in readiness.faults()["checks"]
    go_on.set()
    first.join()
    assert readiness.faults() == {}


def test_nothing_else_is_served(get: Callable[..., tuple[int, str]]) -> None:
    assert get("/")[0] == 404
    assert get("/metrics/../etc")[0] == 404
    assert get("/metrics", "POST")[0] == 405
    assert get("/healthz", "HEAD") == (200, "")


def test_a_caller_that_says_nothing_keeps_nobody_from_being_served(
    served: Served, get: Callable[..., tuple[int, str]]
) -> None:
    with socket.create_connection(("127.0.0.1", served.port)):
        assert get("/healthz")[0] == 200


def test_a_port_that_is_taken_is_told(served: Served, pulse: Pulse) -> None:
    with pytest.raises(SettingsError, match=f"127.0.0.1:{served.port}.*another port"):
        serve_metrics(host="127.0.0.1", port=served.port, pulse=pulse, readiness=Readiness({}))
