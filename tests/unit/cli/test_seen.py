"""What a workspace's processes show of themselves, and whom they tell, as one sets it up."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import pytest

from kontext_batch.cli import main
from tests.unit.receiver import Receiver, receiving

pytestmark = pytest.mark.timeout(300)
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def receiver(studio: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver that the settings know as `dam`."""
    with receiving() as found:
        (studio / "kontext-batch.yaml").write_text(
            f"webhooks: [{{name: dam, url: '{found.url}/private-path', secret_env: DAM_SECRET}}]\n"
        )
        monkeypatch.setenv("DAM_SECRET", SECRET)
        yield found


PATIENCE = 100.0
"""Seconds for a process to start, and to come round to it, beside others."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def get(port: int, path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, HTTPException) as error:
        return 0, str(error)
    finally:
        connection.close()


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command of its own process, which ends as Ctrl-C ends it."""
    command = [sys.executable, "-m", "kontext_batch.cli.main", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            yield started
            started.send_signal(signal.SIGINT)
            assert started.wait(30) == 0, started.communicate()
        finally:
            started.kill()


def test_a_beat_tells_the_webhook_and_shows_its_numbers(studio: Path, receiver: Receiver) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    port = free_port()
    with process("--log-json", "workers", "beat", "--every", "0.2", "--metrics-port", f"{port}") as beat:
        wait_for(lambda: receiver.requests, beat)
        wait_for(lambda: 'outcome="delivered",webhook="dam"} 1.0' in get(port, "/metrics")[1], beat)
        _, shown = get(port, "/metrics")
        assert "kontext_batch_workers 0.0" in shown
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/readyz") == (200, '{"ready": true, "faults": {}}\n')
        (studio / "kontext-out" / "kontext.db").rename(studio / "aside.db")
        wait_for(lambda: get(port, "/readyz")[0] == 503, beat)
        assert "db upgrade" in get(port, "/readyz")[1]
    assert json.loads(receiver.requests[0].body)["type"] == "run.done"


def test_a_worker_shows_what_it_computed(studio: Path) -> None:
    assert main.main(["submit", "sizes.yaml"]) == 0
    port = free_port()
    with process("workers", "start", "--metrics-port", f"{port}") as worker:
        wait_for(lambda: '{lane="operations",outcome="done"} 4.0' in get(port, "/metrics")[1], worker)
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/readyz")[0] == 200
    assert get(port, "/healthz")[0] == 0


def test_a_port_that_is_taken_ends_the_command(studio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert main.main(["workers", "beat", "--metrics-port", f"{port}"]) == 2
    assert "choose another port" in capsys.readouterr().err


def test_a_webhook_is_tried_and_listed(studio: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    assert main.main(["webhooks", "test", "dam"]) == 0
    assert json.loads(receiver.requests[0].body)["type"] == "test"
    receiver.answers = [500]
    assert main.main(["webhooks", "test", "dam"]) == 1
    assert main.main(["webhooks", "test", "pager"]) == 2
    capsys.readouterr()
    assert main.main(["webhooks", "list", "--json"]) == 0
    told = capsys.readouterr().out
    assert "private-path" not in told
    assert json.loads(told) == [
        {
            "webhook": "dam",
            "host": "127.0.0.1",
            "events": ["run.finished"],
            "waiting": 0,
            "delivered": 0,
            "given_up": 0,
            "last_error": None,
        }
    ]
    assert main.main(["webhooks", "list"]) == 0
    assert "run.finished" in capsys.readouterr().out


def doctor(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[bool, str]]:
    capsys.readouterr()
    main.main(["doctor", "--json"])
    return {each["name"]: (each["ok"], each["found"]) for each in json.loads(capsys.readouterr().out)}


def test_doctor_looks_at_webhooks_and_the_port_of_the_metrics(
    studio: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.main(["run", "sizes.yaml"]) == 0
    assert doctor(capsys)["webhook dam"] == (True, "http://127.0.0.1, signed with 1 secret")
    assert "metrics" not in doctor(capsys)
    monkeypatch.setenv("DAM_SECRET", "too short")
    ok, found = doctor(capsys)["webhook dam"]
    assert not ok
    assert "DAM_SECRET" in found
    assert "too short" not in found
    assert receiver.requests == []
    port = free_port()
    monkeypatch.setenv("KONTEXT_BATCH_METRICS_PORT", f"{port}")
    assert doctor(capsys)["metrics"] == (True, f"127.0.0.1:{port} is free")
    with process("workers", "beat") as beat:
        wait_for(lambda: get(port, "/healthz")[0] == 200, beat)
        assert doctor(capsys)["metrics"] == (True, f"a worker or beat serves them at 127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", port)):
        assert not doctor(capsys)["metrics"][0]
